"""`TrainConfig`: the configuration and the command line; needs no torch."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Fixed, Suppress

from htm_pytorch.rl.ranges import check_kinds, check_range

Memory = Literal["htm", "window", "transformer", "gru", "lstm", "none"]


@dataclass(frozen=True)
class EnvironmentConfig:
    """How environments are made."""

    env_args: tuple[str, ...] = ()
    """Arguments of the environment: name=value, or a JSON object."""
    curriculum: tuple[str, ...] = ()
    """More such arguments, a stage each, as JSON objects."""
    promote_at: tuple[float, ...] = (0.9,)
    """Mean return at which the next stage begins; of all stages, or one for each."""
    rehearse: float = 0.0
    """Share of rollouts that play an earlier stage, so that none is forgotten."""
    num_envs: int = 64
    """Environments in all, shared by the processes."""
    vectorize: Literal["auto", "sync", "async"] = "auto"
    """auto: the environment's own batch, else one after another; async: a process each."""
    observe: tuple[str, ...] = ()
    """Parts of a Dict observation to keep; default all."""
    frame_stack: int = 1
    """Newest observations seen at once."""
    time_limit: int = 0
    """Steps after which an episode is truncated; 0: as registered."""
    normalize_observations: bool = False
    """Vectors less their running mean, over their deviation."""
    normalize_rewards: bool = False
    """Rewards over the running deviation of discounted returns."""
    see_previous: bool = False
    """Previous action and reward are inputs, too."""
    see_time: bool = False
    """The number of the step in its episode is an input, too."""


@dataclass(frozen=True)
class MemoryConfig:
    """What the agent remembers by; parameter counts of all memories are alike."""

    memory: Memory = "htm"
    """The paper's; its layers without it; attention to as much; others."""
    dim: int = 64
    """Width of the agent."""
    depth: int = 1
    """Layers."""
    heads: int = 4
    """Heads of each attention."""
    topk_mems: int = 2
    """Chunks a step recalls in each layer."""
    mem_chunk_size: int = 16
    """Steps in a chunk."""
    mem_chunks: int = 8
    """Chunks a layer remembers."""
    window: int = 16
    """Steps that local attention covers."""
    newest: int = 1
    """Newest inputs that an MLP binds together before the memory, for their order."""
    recency: bool = True
    """The age of chunks counts, too."""
    detach_memories: bool = False
    """Stop gradients at the memory, as the paper does."""


@dataclass(frozen=True)
class RolloutConfig:
    """What is played between two updates, and how far gradients reach in it."""

    rollout: Literal["steps", "episodes"] = "steps"
    """steps: goes on across episodes; episodes: begins new ones each time."""
    steps: int = 128
    """Steps of each environment in a rollout; of episodes at most so many."""
    decisions: int = 0
    """Of episodes: decisions before one is cut and bootstrapped; 0: until its end."""
    action_repeat: int = 1
    """Steps that one decision lasts."""
    bptt: int = 0
    """Steps that gradients reach back; 0: the whole rollout."""
    start: Literal["stored", "refreshed", "zeros"] = "stored"
    """State that learning starts from: as when acting, of today's weights, or none."""


@dataclass(frozen=True)
class LearnerConfig:
    """How is learned from a rollout."""

    algorithm: Literal["ppo", "vtrace"] = "ppo"
    """arXiv 1707.06347, or that of IMPALA, arXiv 1802.01561."""
    learning_rate: float = 1e-3
    """Of Adam."""
    final_learning_rate: float = 1.0
    """Share of it that is left at the end; linear."""
    discount: float = 0.99
    """From decision to decision."""
    trace: float = 0.95
    """Lambda of generalized advantage estimation, and of V-trace."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatches: int = 4
    """Updates a pass, each on some of the environments."""
    clip: float = 0.2
    """Of the probability ratio in PPO."""
    normalize_advantages: bool = True
    """To mean 0 and deviation 1, so that rewards of any size move the policy alike."""
    value_clip: float = 0.0
    """How far a value may move in PPO; 0: any, as clipping rarely helps."""
    value_weight: float = 0.5
    """Of the value's loss."""
    entropy_weight: float = 0.01
    """Against a policy that decides too early."""
    final_entropy: float = 1.0
    """Share of it that is left at the end; linear."""
    reconstruction_weight: float = 0.03
    """Of telling the present input from the memory's output, as in the paper."""
    target_kl: float = 0.0
    """Divergence from the policy that played at which a rollout has taught enough; 0: any."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened, so that one rare batch does not spoil the weights."""


@dataclass(frozen=True)
class BudgetConfig:
    """How long is trained, and how the agent is judged."""

    frames: int = 1_000_000
    """Training ends with the rollout that reaches so many steps of all environments."""
    stop_at: float = math.inf
    """Or at this mean return of training episodes."""
    average_over: int = 100
    """Newest training episodes that means are over."""
    checkpoint_every: int = 50
    """Rollouts between checkpoints; of steps, each begins new episodes."""
    eval_every: int = 0
    """Rollouts between judgements while training; 0: none."""
    eval_episodes: int = 100
    """Unseen episodes that an agent is judged on."""


@dataclass(frozen=True)
class TrainConfig:
    """How an agent is trained. All values are our choices; the paper's were not at hand."""

    env: Suppress[Fixed[str]] = "CartPole-v1"
    """Any Gymnasium id; `module:id` imports the module before."""
    run_dir: Path = Path("runs/run")
    """Folder of the run: config, checkpoint, metrics, curve."""
    resume: bool = False
    """Go on from the checkpoint in run-dir, if there is one."""
    init_from: Path | None = None
    """Folder of a run whose agent is the first one."""
    seed: int = 0
    """Of weights, episodes and actions."""
    seeds: int = 1
    """Trainings, with seeds one after another, each in a folder of run-dir."""
    processes: int = 1
    """Processes that share the environments and learn as one."""
    device: str = "cpu"
    """Where the agent computes: cpu, or cuda."""
    tensorboard: bool = False
    """Write events for TensorBoard; metrics.csv is the record."""
    task: Suppress[Fixed[str]] = ""
    """The task of ours whose encoders the agent has, if any."""
    environments: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    memories: MemoryConfig = field(default_factory=MemoryConfig)
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the option."""
        for name in ("run_dir", "init_from"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, Path(given))
        for part in (self, *(getattr(self, name) for name in _GROUPS)):
            check_kinds(part)
        for name, value in self.options().items():
            check_range(name, value)
        sizes, count = self.memories, self.environments.num_envs
        if sizes.dim % sizes.heads:
            raise ValueError(f"heads: expected a divisor of dim = {sizes.dim}, got {sizes.heads}")
        for name, parts in (
            ("minibatches", self.learner.minibatches),
            ("processes", self.processes),
        ):
            if count % parts:
                raise ValueError(f"{name}: expected a divisor of num_envs = {count}, got {parts}")
        bars, stages = self.environments.promote_at, len(self.environments.curriculum)
        if len(bars) != 1 and len(bars) != stages - 1:
            raise ValueError(
                f"promote_at: expected one mean return, or one for each of {stages} stages but the "
                f"last, got {bars}"
            )
        if self.rollouts.rollout == "episodes" and self.rollouts.start != "stored":
            raise ValueError(
                f"start: expected 'stored' with rollouts of episodes, which begin with no past, "
                f"got {self.rollouts.start!r}"
            )

    def options(self) -> dict[str, Any]:
        """Return all options by name, without their groups."""
        flat: dict[str, Any] = {}
        for name, value in vars(self).items():
            flat |= dict(vars(value)) if name in _GROUPS else {name: value}
        return flat

    def replace(self, **options: Any) -> "TrainConfig":
        """Return the config with other options, named without their groups."""
        groups: dict[str, Any] = {}
        for name in _GROUPS:
            group = getattr(self, name)
            own = {key: options.pop(key) for key in list(options) if hasattr(group, key)}
            groups[name] = dataclasses.replace(group, **own)
        if unknown := sorted(options.keys() - vars(self)):
            near = difflib.get_close_matches(unknown[0], self.options(), 1, 0.75)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{unknown[0]}: expected the name of an option{meant}")
        return dataclasses.replace(self, **groups | options)


_GROUPS = ("environments", "memories", "rollouts", "learner", "budget")
