"""`Stages`: of a curriculum, those that are played, and how well of late."""

import collections
import contextlib
from typing import Any

import numpy as np
import torch

from htm_pytorch.rl.agent import Agent
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.making import make_environments
from htm_pytorch.rl.player import Episode, Player


class Recent:
    """The newest training episodes of a stage, at most `most`."""

    def __init__(self, most: int):
        self.returns: collections.deque[float] = collections.deque(maxlen=most)
        self.lengths: collections.deque[int] = collections.deque(maxlen=most)

    def add(self, episode: Episode) -> None:
        """Take note of one that ended."""
        self.returns.append(episode.total)
        self.lengths.append(episode.length)

    def mean(self) -> float:
        """Return their mean return; NaN before any ended."""
        return float(np.mean(self.returns)) if self.returns else float("nan")

    def length(self) -> float:
        """Return their mean steps; NaN before any ended."""
        return float(np.mean(self.lengths)) if self.lengths else float("nan")

    def reached(self, mean: float) -> bool:
        """Say whether so many ended as count, and their mean return is `mean` at least."""
        return len(self.returns) == self.returns.maxlen and self.mean() >= mean


class Stages:
    """The stages of a curriculum, of which there is one without a curriculum.

    The newest one is played and, in a share of the rollouts, one of those before it.

    Args:
        config: everything.
        agent: that plays.
        rows: which of all environments are in this process.
        progress: of a run that goes on, as `progress` returned it.
    """

    def __init__(
        self, config: TrainConfig, agent: Agent, rows: range, progress: dict[str, Any] | None
    ):
        self.config, self.agent, self.rows = config, agent, rows
        self.newest = 0 if progress is None else int(progress["stage"])
        self.recent: list[Recent] = []
        self.players: dict[int, Player] = {}
        rehearses = config.environments.rehearse > 0
        try:
            for stage in range(self.newest + 1):
                self._enter(stage, is_played=rehearses or stage == self.newest)
        except BaseException:
            self.close()
            raise
        for recent, held in zip(self.recent, _held(progress, self.newest), strict=True):
            recent.returns.extend(held[0])
            recent.lengths.extend(held[1])

    def next(self, generator: torch.Generator) -> int:
        """Return the stage that the next rollout plays."""
        share = self.config.environments.rehearse
        chance, which = torch.rand(2, generator=generator, device="cpu").tolist()
        return int(which * self.newest) if chance < share else self.newest

    def promote(self) -> bool:
        """Go to the next stage if the newest one is mastered; say whether."""
        options = self.config.environments
        if self._is_last():
            return False
        bars = options.promote_at
        if not self.recent[self.newest].reached(bars[self.newest if len(bars) > 1 else 0]):
            return False
        if not options.rehearse:
            self.players.pop(self.newest).close()
        self.newest += 1
        self._enter(self.newest, is_played=True)
        return True

    def reached(self, mean: float) -> bool:
        """Say whether the newest episodes have so high a mean return, in all stages played."""
        return self._is_last() and all(self.recent[stage].reached(mean) for stage in self.players)

    def begin(self, seeds: list[int]) -> None:
        """Begin new episodes in all stages played."""
        for player in self.players.values():
            player.begin(seeds)

    def close(self) -> None:
        """Give back what the environments hold."""
        with contextlib.ExitStack() as closing:
            for player in self.players.values():
                closing.callback(player.close)

    def progress(self) -> dict[str, Any]:
        """Return what JSON can hold, from which another process goes on."""
        recent = [[list(one.returns), list(one.lengths)] for one in self.recent]
        return {"stage": self.newest, "recent": recent}

    def _is_last(self) -> bool:
        return self.newest + 1 >= len(self.config.environments.curriculum)

    def _enter(self, stage: int, *, is_played: bool) -> None:
        config = self.config
        self.recent.append(Recent(config.budget.average_over))
        if is_played:
            environments = make_environments(config, len(self.rows), stage)
            repeat, total = config.rollouts.action_repeat, config.environments.num_envs
            self.players[stage] = Player(environments, self.agent, repeat, self.rows, total)


def _held(progress: dict[str, Any] | None, newest: int) -> list[Any]:
    if progress is None:
        return [[[], []]]
    if "lengths" in progress:
        # Of a run from before stages were rehearsed.
        return [[[], []]] * newest + [[progress["recent"], progress["lengths"]]]
    return progress["recent"]
