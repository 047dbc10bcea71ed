"""How often the chunk that was asked about is recalled, over episodes that nobody saw."""

import contextlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from htm_pytorch.report.agents import MOST_STEPS, check_agent, play
from htm_pytorch.report.recorder import Recorder
from htm_pytorch.report.scene import Plot, Scene
from htm_pytorch.report.trace import Moment, chunk_of
from htm_pytorch.rl import Agent, TrainConfig
from htm_pytorch.rl.making import most_steps
from htm_pytorch.rl.unseen import UNSEEN, begin, most_rows
from htm_pytorch.shapes import check_at_least, check_kind


class LayerTruth(NamedTuple):
    """Of one layer, shares of the episodes in which a chunk was asked about."""

    first: float
    """The chunk asked about has the largest weight."""
    among: float
    """It is among the chunks recalled."""
    weight: float
    """Its mean weight."""


class Truth(NamedTuple):
    """What was recalled at the first decisions of unseen episodes, beside what was asked for."""

    layers: tuple[LayerTruth, ...]
    chance_first: float
    """What a memory that recalls closed chunks at random would reach."""
    chance_among: float
    """What it would reach among the chunks recalled."""
    k: int
    """How many chunks are recalled."""
    episodes: int
    """In which a chunk was asked about that had closed."""
    left_out: int
    """Episodes in which none of the steps asked about was in a closed chunk."""
    success: float
    """Mean return of all of the episodes."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return self._asdict() | {"layers": [layer._asdict() for layer in self.layers]}

    def __str__(self) -> str:
        """Say it in a line a layer."""
        lines = [f"at the first decision of {self.episodes} unseen episodes:"]
        for number, layer in enumerate(self.layers, 1):
            lines.append(
                f"layer {number} recalls the chunk asked about first in "
                f"{_share(layer.first, self.episodes)} (chance {self.chance_first:.3f}), among "
                f"the {self.k} in {_share(layer.among, self.episodes)} (chance "
                f"{self.chance_among:.3f}); its mean weight is {layer.weight:.3f}"
            )
        if self.left_out:
            lines.append(f"{self.left_out} more episodes asked about steps in no closed chunk")
        lines.append(f"mean return {self.success:.3f}")
        return "\n".join(lines)


@torch.no_grad()
def measure(
    agent: Agent,
    config: TrainConfig,
    episodes: int,
    scene: Scene,
    *,
    stage: int = 0,
    greedy: bool = True,
) -> Truth:
    """Play so many unseen episodes and compare what is recalled with what is asked about.

    Raises:
        ValueError: nobody knows what is asked about, or nothing that was asked about could be
            recalled.
    """
    check_at_least("episodes", episodes, 1)
    check_agent(agent, config)
    check_kind("scene", scene, Scene, "a Scene")
    if scene.plots is None:
        raise ValueError(
            f"episodes: expected a task that knows which steps are asked about, as ballet does, "
            f"got {config.env}; without --episodes its report is written"
        )
    generator = None if greedy else torch.Generator().manual_seed(config.seed)
    most = most_rows(config)
    found: list[_Asked] = []
    returns: list[float] = []
    batch = 0
    while len(returns) < episodes:
        rows = min(episodes - len(returns), most)
        asked, totals = _play_batch(agent, config, rows, stage, scene, generator, UNSEEN + batch)
        found += asked
        returns += totals
        batch += 1
    known = [one for one in found if one.place is not None]
    if not known:
        raise ValueError(
            f"episodes: expected some whose first decision asks about a closed chunk, got none in "
            f"{episodes}; a smaller mem_chunk_size closes chunks earlier"
        )
    chances = np.array([(1, min(one.k, one.closed)) for one in known]) / np.array(
        [[one.closed] for one in known]
    )
    layers = tuple(_layer(known, number) for number in range(len(known[0].moment.layers)))
    return Truth(
        layers,
        *map(float, chances.mean(0)),
        k=max(one.k for one in known),
        episodes=len(known),
        left_out=len(found) - len(known),
        success=float(np.mean(returns)),
    )


class _Asked(NamedTuple):
    """The first decision of one episode."""

    moment: Moment
    place: int | None
    closed: int
    k: int


def _play_batch(
    agent: Agent,
    config: TrainConfig,
    rows: int,
    stage: int,
    scene: Scene,
    generator: torch.Generator | None,
    batch: int,
) -> tuple[list[_Asked], list[float]]:
    """Play the first episode of each row; return its first decision, and its return."""
    assert scene.plots is not None
    player = begin(agent, config, rows, stage, batch=batch)
    plots = scene.plots(player.environments)
    totals, over = np.zeros(rows), np.zeros(rows, bool)
    found: dict[int, _Asked] = {}
    patience = most_steps(config) or MOST_STEPS
    with contextlib.ExitStack() as playing, contextlib.ExitStack() as listening:
        playing.callback(player.close)
        recorder = listening.enter_context(Recorder(agent, range(rows)))
        for number, step in enumerate(play(player, generator)):
            totals += np.where(over, 0.0, step.shown.reward)
            over |= step.shown.ended
            if step.choice is not None and len(found) < rows:
                for row in np.flatnonzero(step.decides & ~over):
                    if row not in found:
                        found[int(row)] = _first(recorder, int(row), plots[row])
                if len(found) == rows:
                    # The rest is only played.
                    listening.close()
            if over.all():
                break
            if number > patience:
                raise ValueError(f"env: expected episodes that end in {patience:,} steps")
    return list(found.values()), totals.tolist()


def _first(recorder: Recorder, row: int, plot: Plot) -> _Asked:
    """Return what the row recalled when it was asked last."""
    moment, chunks = recorder.moments(row)[-1], recorder.chunks(row)
    closed = [span for span in chunks if span.first_step + span.count <= (moment.step or 0)]
    k = max((len(layer) for layer in moment.layers), default=0)
    return _Asked(moment, chunk_of(closed, *plot.asked), max(len(closed), 1), k)


def _layer(known: list[_Asked], number: int) -> LayerTruth:
    first, among, weight = [], [], []
    for one in known:
        kept = one.moment.layers[number]
        best = max(kept, key=lambda recalled: recalled.weight, default=None)
        first.append(best is not None and best.chunk == one.place)
        among.append(any(recalled.chunk == one.place for recalled in kept))
        weight.append(sum(recalled.weight for recalled in kept if recalled.chunk == one.place))
    return LayerTruth(float(np.mean(first)), float(np.mean(among)), float(np.mean(weight)))


def _share(share: float, episodes: int) -> str:
    return f"{share:.3f} +- {1.96 * math.sqrt(share * (1 - share) / episodes):.3f}"
