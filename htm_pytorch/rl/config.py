"""`TrainConfig`: the configuration, the command line and the saved record, one dataclass."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Observation = Literal["symbols", "image"]


@dataclass(frozen=True)
class TrainConfig:
    """How an agent is trained on Ballet. The defaults are the demo, which takes minutes.

    The paper's hyper-parameters were not at hand: all values are our choices.
    """

    run_dir: Path = Path("runs/ballet")
    """Where the run is kept: config, checkpoint, metrics, curve, picture."""
    resume: bool = False
    """Go on from the checkpoint in run_dir, if there is one; the run is the same as unbroken."""
    seed: int = 0
    """Of weights, episodes and actions."""

    num_dancers: int = 2
    """Dancers to remember, 1 to 8."""
    dance_delay: int = 2
    """Empty steps after each dance, at least 1."""
    observation: Observation = "symbols"
    """What the agent sees: what stands on each square, or the picture."""

    dim: int = 64
    """Width of the agent."""
    depth: int = 1
    """Layers of its memory."""
    heads: int = 4
    """Heads of each attention."""
    topk_mems: int = 2
    """Chunks a step recalls in each layer."""
    mem_chunk_size: int = 17
    """Steps in a chunk."""
    mem_chunks: int = 4
    """Chunks a layer remembers."""
    window: int = 8
    """Steps that local attention covers; shorter than a chunk, as little is open at a choice."""
    detach_memories: bool = False
    """Stop gradients at the memory, as the paper does."""

    num_envs: int = 256
    """Episodes played at once."""
    action_repeat: int = 3
    """Steps that one decision lasts; dancers stand three squares away."""
    decisions: int = 3
    """Decisions a training episode may take before it is cut and bootstrapped."""
    discount: float = 0.9
    """From decision to decision."""
    trace: float = 0.95
    """Lambda of generalized advantage estimation."""

    episodes: int = 200_000
    """Training ends after this many."""
    stop_at: float = 0.93
    """Or when this share of the last 2,000 training episodes succeeded."""
    learning_rate: float = 1e-3
    epochs: int = 2
    """Passes over each batch of episodes."""
    minibatches: int = 4
    """Updates a pass."""
    clip: float = 0.2
    """Of the probability ratio in PPO."""
    value_weight: float = 0.5
    entropy_weight: float = 0.1
    reconstruction_weight: float = 0.03
    """Of telling the present input from the memory's output, at one random step an episode."""
    max_grad_norm: float = 1.0

    checkpoint_every: int = 50
    """Batches between checkpoints."""
    eval_episodes: int = 500
    """Unseen episodes that the trained agent is judged on."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the field."""
        counts = [f.name for f in dataclasses.fields(self) if f.type is int or f.type == "int"]
        for name in counts:
            least = 0 if name == "seed" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.observation not in get_args(Observation):
            raise ValueError(
                f"observation: expected one of {get_args(Observation)}, got {self.observation!r}"
            )
        if self.num_dancers > 8:
            raise ValueError(f"num_dancers: expected 1 to 8, got {self.num_dancers}")
        if self.dim % self.heads:
            raise ValueError(f"heads: expected a divisor of dim = {self.dim}, got {self.heads}")
        if self.num_envs % self.minibatches:
            raise ValueError(
                f"minibatches: expected a divisor of num_envs = {self.num_envs}, "
                f"got {self.minibatches}"
            )
        for name in ("discount", "trace", "stop_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")

    def to_json(self) -> str:
        """Return the record of the run, without where it is kept."""
        record = dataclasses.asdict(self)
        for name in _ABOUT_THE_CALL:
            del record[name]
        return json.dumps(record, indent=2)

    @classmethod
    def from_json(cls, text: str, **call: Any) -> "TrainConfig":
        """Read what `to_json` wrote; `call` are the fields it leaves out.

        Raises:
            ValueError: not such a record, or one of another version.
        """
        record = json.loads(text)
        expected = {field.name for field in dataclasses.fields(cls)} - set(_ABOUT_THE_CALL)
        found = set(record) if isinstance(record, dict) else set()
        if found != expected:
            others = sorted(found ^ expected)
            raise ValueError(f"config: expected the fields of this version, differs in {others}")
        return cls(**record, **call)

    def differs_in(self, other: "TrainConfig") -> list[str]:
        """Return the fields that would make the two runs learn differently."""
        own, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f for f in own if f not in (*_ABOUT_THE_CALL, *_ABOUT_THE_END) and own[f] != others[f]
        ]


_ABOUT_THE_CALL = ("run_dir", "resume")
_ABOUT_THE_END = ("episodes", "stop_at", "checkpoint_every", "eval_episodes")
