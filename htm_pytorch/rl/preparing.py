"""From a config to a fresh agent, or to what is wrong with it: before anything is written."""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from htm_pytorch.rl.agent import Agent, Parts, make_agent
from htm_pytorch.rl.checkpoint import CHECKPOINT, Checkpoint
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.contract import check_state, described, detach, select_rows
from htm_pytorch.rl.cores import count_parameters
from htm_pytorch.rl.making import make_environments, seeds_of
from htm_pytorch.rl.observations import Steps
from htm_pytorch.rl.player import one_step
from htm_pytorch.rl.record import ENDS
from htm_pytorch.rl.run import check_free


def describe_sizes(config: TrainConfig) -> str:
    """Return how many parameters the memory has, beside that of the paper at the same sizes."""
    memories = config.memories
    count = count_parameters(memories)
    paper = count_parameters(config.replace(memory="htm").memories)
    return f"memory {memories.memory}: {count:,} parameters ({count / paper:.2f} of htm's)"


def prepare(config: TrainConfig, parts: Parts | None = None) -> Agent:
    """Return a fresh agent, if the config can be trained; nothing is written.

    Raises:
        ValueError: names the option that cannot work.
    """
    check_free(config)
    _check_packages(config)
    torch.manual_seed(config.seed)
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one of this machine, got {config.device!r}") from error
    agent = _fresh_agent(config, 0, parts).to(device)
    for stage in range(1, len(config.environments.curriculum)):
        try:
            agent.load_state_dict(_fresh_agent(config, stage, parts).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"curriculum: expected stages that look alike, stage {stage} differs"
            ) from error
    if _begins_as_another(config):
        _source(config).take_what_fits(agent)
    _check_fits(agent, config, config.environments.num_envs)
    return agent


def describe_beginning(config: TrainConfig) -> str:
    """Return where a training that resumes goes on, and with which other options; "" for others."""
    if not config.resume:
        return ""
    path = config.run_dir / CHECKPOINT
    if not path.exists():
        return f"no {CHECKPOINT} in {config.run_dir} yet, so the training begins anew"
    checkpoint = Checkpoint(path)
    own, others = config.options(), checkpoint.config.options()
    told = f"goes on after {checkpoint.progress['frames']:,} frames"
    for name in ENDS:
        # Whatever it began as, it does so no more.
        if own[name] != others[name] and name != "init_from":
            told += f", {name} {own[name]} instead of {others[name]}"
    return told


def describe_source(config: TrainConfig, agent: Agent) -> str:
    """Return how much of the agent is that of `init_from`; "" where it is not asked."""
    if not _begins_as_another(config):
        return ""
    taken = _source(config).take_what_fits(agent)
    count = sum(part.numel() for part in agent.parameters())
    return f"of {count:,} parameters of the agent {taken:,} are those of {config.init_from}"


def _begins_as_another(config: TrainConfig) -> bool:
    goes_on = config.resume and (config.run_dir / CHECKPOINT).exists()
    return config.init_from is not None and not goes_on


def _source(config: TrainConfig) -> Checkpoint:
    place = config.init_from or Path()
    if not (place / CHECKPOINT).exists():
        raise ValueError(
            f"init_from: expected the folder of a run that has a {CHECKPOINT}, got {str(place)!r}"
        )
    return Checkpoint(place / CHECKPOINT)


def _check_packages(config: TrainConfig) -> None:
    """Refuse a training whose packages would be missed after something was written."""
    for name in ("filelock", "matplotlib", "tqdm"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard: expected the package tensorboard, which is not installed; "
            "pip install '.[tensorboard]'"
        )


def _fresh_agent(config: TrainConfig, stage: int, parts: Parts | None) -> Agent:
    with contextlib.closing(make_environments(config, 1, stage)) as environments:
        agent = make_agent(config, environments.observation_space, environments.action_space, parts)
        _check_core(agent.core)
        _check_fits(agent, config, 2)
        shown = one_step(environments.reset(seeds_of(config, 0, range(1))))
    with _untouched(agent):
        check_parts(agent, shown, config.memories.dim)
    return agent


@contextlib.contextmanager
def _untouched(agent: Agent) -> Iterator[None]:
    """Leave nothing of a call: no random number drawn, no statistics of layers, no gradient."""
    kept = [(buffer, buffer.clone()) for buffer in agent.buffers()]
    with torch.random.fork_rng(devices=()), torch.no_grad():
        yield
        for buffer, before in kept:
            buffer.copy_(before)


def _check_core(core: nn.Module) -> None:
    taken = inspect.signature(core.forward).parameters
    any_name = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    if not hasattr(core, "initial_state") or not ("at" in taken or any_name):
        raise ValueError(
            f"parts.core: expected a module with initial_state(batch_size) and "
            f"forward(x, state, is_first, mask, at=at), got {described(core)} with "
            f"forward({', '.join(taken)})"
        )


def _check_fits(agent: Agent, config: TrainConfig, rows: int) -> None:
    try:
        agent.initial_state(rows)
    except RuntimeError as error:
        sizes = config.memories
        raise ValueError(
            f"mem_chunks: expected a memory that fits, got {sizes.mem_chunks} chunks of "
            f"{sizes.mem_chunk_size} steps of width {sizes.dim} in {rows} environments"
        ) from error


def check_parts(agent: Agent, shown: Steps, dim: int) -> None:
    """Refuse an encoder of another width and a core that breaks its contract.

    Args:
        agent: on the CPU.
        shown: [1, 1, ...], the first observation of an episode.
        dim: the agent's width.

    Raises:
        ValueError: names the part, what it returned and what was expected.
    """
    # So many rows as no other axis is likely to have.
    rows, steps, at = 7, 3, torch.tensor([[2, 1]] * 7, device="cpu")
    seen = shown.map(lambda part: part.expand(rows, steps, *part.shape[2:]).contiguous())
    is_first = torch.arange(steps, device="cpu").expand(rows, steps) == 0
    x = agent.encode(seen._replace(is_first=is_first))
    if not isinstance(x, Tensor) or x.shape != (rows, steps, dim):
        raise ValueError(
            f"parts.encoder: expected a module that returns [B, T, D = {dim}] of observations "
            f"[B = {rows}, T = {steps}, ...], got {described(x)}"
        )
    state = agent.initial_state(rows)
    for step in ("before its first step", "after some steps"):
        try:
            check_state(state, rows)
            detach(select_rows(state, torch.tensor([1, 0], device="cpu")))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"parts.core: expected a state that is a tree of tensors with the {rows} rows "
                f"first, or has select(rows) and detach(), got {described(state)} {step} ({error})"
            ) from error
        answer = agent.core(x, state, is_first, torch.ones_like(is_first), at=at)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError(
                f"parts.core: expected it to return (y, state), got {described(answer)}"
            )
        y, state = answer
        if not isinstance(y, Tensor) or y.shape != (*at.shape, dim):
            raise ValueError(
                f"parts.core: expected outputs [B, P, D = {dim}] at the P = {at.shape[1]} steps "
                f"`at` of {steps}, got {described(y)}"
            )
