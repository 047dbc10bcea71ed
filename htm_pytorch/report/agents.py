"""From an agent to the `Trace` of an episode that it never saw, noted while it plays as ever."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.report.png import LARGEST
from htm_pytorch.report.recorder import Recorder, transformer_of
from htm_pytorch.report.scene import Plot, Scene
from htm_pytorch.report.trace import Seen, Trace, chunk_of
from htm_pytorch.rl import Agent, TrainConfig
from htm_pytorch.rl.environments import Seen as Shown
from htm_pytorch.rl.making import is_batched, most_steps
from htm_pytorch.rl.observations import Nested, nested
from htm_pytorch.rl.player import Choice, Player
from htm_pytorch.rl.unseen import begin
from htm_pytorch.shapes import check_at_least, check_kind

MOST_STEPS = 20_000
"""Of an episode that is shown."""


class Step(NamedTuple):
    """What happened at one step of all rows."""

    shown: Shown
    decides: np.ndarray
    """[B] bool."""
    choice: Choice | None
    """None: nobody decided."""


def check_agent(agent: Agent, config: TrainConfig) -> None:
    """Refuse an agent without a memory in chunks.

    Raises:
        ValueError: says so.
    """
    check_kind("agent", agent, Agent, "an Agent")
    check_kind("config", config, TrainConfig, "a TrainConfig")
    try:
        transformer_of(agent)
    except ValueError as error:
        raise ValueError(
            f"agent: expected one that recalls chunks (--memory htm), got --memory "
            f"{config.memories.memory} ({error})"
        ) from error


def play(player: Player, generator: torch.Generator | None) -> Iterator[Step]:
    """Play on, one step of all rows a time; the last one is that at which the caller stops."""
    while True:
        shown = player.seen
        decides, choice = player.decide(generator)
        yield Step(shown, decides, choice)
        player.advance()


@torch.no_grad()
def trace_agent(
    agent: Agent,
    config: TrainConfig,
    *,
    stage: int = 0,
    greedy: bool = True,
    scene: Scene | None = None,
    title: str = "",
) -> Trace:
    """Play one unseen episode and return what the agent recalled in it.

    The agent plays on the path of `rl.evaluate`, with the same seeds, and is only listened to: its
    actions and values are those of an episode that nobody traces. Where the environment fails to
    draw itself, a warning says why, and there are no pictures.

    Args:
        agent: trained, with a memory in chunks.
        config: of its run; the seed chooses the episode.
        stage: of the curriculum.
        greedy: whether it takes the most probable actions; otherwise they are sampled.
        scene: how the task is shown.
        title: of the page; default the environment's name.

    Raises:
        ValueError: the agent has no such memory, was never asked for an action with a chunk
            closed, or its episode does not end.
    """
    check_agent(agent, config)
    check_at_least("stage", stage, 0)
    scene = Scene() if scene is None else scene
    check_kind("scene", scene, Scene, "a Scene")
    player = begin(agent, config, 1, stage)
    has_frames = scene.frames_of(_stacked([player.seen.observation])) is not None
    # A batch of environments would become single ones, whose episodes are others.
    if not has_frames and not is_batched(config) and _draws_itself(player):
        player.close()
        player = _begin_drawn(agent, config, stage)
    plot = None if scene.plots is None else scene.plots(player.environments)[0]
    generator = None if greedy else torch.Generator().manual_seed(config.seed)
    most = most_steps(config) or MOST_STEPS
    steps: list[Step] = []
    drawn: list[Tensor | None] = []
    try:
        with Recorder(agent) as recorder:
            for step in play(player, generator):
                steps.append(step)
                drawn.append(_drawn(player, config) if not drawn or drawn[-1] is not None else None)
                if step.shown.ended[0]:
                    break
                if len(steps) > most:
                    raise ValueError(
                        f"env: expected an episode that ends within {most:,} steps, got one of "
                        f"{config.env} that goes on; --time-limit cuts them"
                    )
    finally:
        player.close()
    observed = _stacked([step.shown.observation for step in steps])
    frames = scene.frames_of(observed)
    if frames is None and all(picture is not None for picture in drawn):
        frames = torch.stack([picture for picture in drawn if picture is not None])
    labels = scene.labels_of(observed)
    if plot is not None:
        labels = [plot.label_of(number) or label for number, label in enumerate(labels)]
    trace = recorder.trace(title or player.environments.name, labels=labels, frames=frames)
    return _with_outcomes(trace, player, recorder, steps, plot, scene)


def _with_outcomes(
    trace: Trace,
    player: Player,
    recorder: Recorder,
    steps: list[Step],
    plot: Plot | None,
    scene: Scene,
) -> Trace:
    """Return the trace with actions, values, rewards, and what was asked about."""
    rewards = [float(step.shown.reward[0]) for step in steps]
    decisions = [step.choice for step in steps if step.choice is not None]
    moments = [
        moment._replace(
            action=scene.action_of(player.agent.policy.to_environment(choice.actions)[0]),
            value=float(choice.values[0]),
            asked=None if plot is None else _asked(trace, plot, moment.step),
        )
        for moment, choice in zip(trace.moments, decisions, strict=True)
    ]
    facts = {
        "return": f"{sum(rewards):.3g}",
        "steps": f"{len(steps)}, decisions at {len(moments)} of them",
        "check": "the weights were computed beside the run; its outputs were found again within "
        f"{recorder.difference:.1g} of the largest",
    }
    seen = tuple(Seen(old.label, reward) for old, reward in zip(trace.steps, rewards, strict=True))
    return replace(trace, steps=seen, moments=tuple(moments), facts=facts)


def _asked(trace: Trace, plot: Plot, step: int | None) -> int | None:
    """Return the chunk that was asked about, of those that had closed when it was asked."""
    closed = [s for s in trace.chunks if step is None or s.first_step + s.count <= step]
    return chunk_of(closed, *plot.asked)


def _draws_itself(player: Player) -> bool:
    return "rgb_array" in (player.environments.vector.metadata.get("render_modes") or ())


def _begin_drawn(agent: Agent, config: TrainConfig, stage: int) -> Player:
    """Begin an episode whose environment draws itself, or, where it cannot, one without pictures.

    Tried before anything is played, as a process of its own ends where its environment fails.
    """
    player: Player | None = None
    try:
        player = begin(agent, config, 1, stage, render_mode="rgb_array")
        player.environments.vector.render()
    except Exception as error:
        _warn(config, error)
        if player is not None:
            player.close()
        return begin(agent, config, 1, stage)
    return player


def _warn(config: TrainConfig, error: Exception) -> None:
    warnings.warn(
        f"env: {config.env} does not draw itself, so the report has no pictures "
        f"({type(error).__name__}: {error})",
        stacklevel=3,
    )


def _drawn(player: Player, config: TrainConfig) -> Tensor | None:
    """Return the environment's picture of what is seen, if it has one."""
    if player.environments.vector.render_mode != "rgb_array":
        return None
    try:
        shown = player.environments.vector.render()
    except Exception as error:
        _warn(config, error)
        return None
    picture = None if shown is None else np.asarray(shown[0])
    is_picture = picture is not None and picture.ndim == 3 and picture.shape[2] == 3
    if picture is None or not is_picture or picture.dtype != np.uint8:
        return None
    made = torch.from_numpy(picture.copy())
    # Large pictures of a long episode would fill the RAM.
    step = math.ceil(max(made.shape[:2]) / LARGEST)
    return made[::step, ::step].contiguous()


def _stacked(observations: list[Nested]) -> Any:
    """Return the observations [T, ...] of row 0."""

    def stack(*parts: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(part)[0] for part in parts])

    return nested(stack, *observations)
