"""A `Player` plays -> one `Rollout`, that learning starts from."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.rl.config import RolloutConfig
from htm_pytorch.rl.contract import State, select_rows
from htm_pytorch.rl.observations import Steps
from htm_pytorch.rl.player import Episode, Player, joined


class Rollout(NamedTuple):
    """T steps of B environments, and the P points of each row where a value counts.

    A point is a decision, the final observation of an episode that was cut, or the end of the
    rollout. Rewards and discounts are of what came between a point and the next one.
    """

    seen: Steps
    """[B, T, ...]."""
    state: State
    """Of the agent before the first of the steps; None: it had seen nothing."""
    at: Tensor
    """[B, P] int64, the step of each point, in order; rows with fewer repeat 0."""
    actions: Tensor
    """[B, P, A]."""
    log_probs: Tensor
    """[B, P] of the actions when they were taken."""
    values: Tensor
    """[B, P] when they were taken."""
    rewards: Tensor
    """[B, P]."""
    goes_on: Tensor
    """[B, P] bool, the value of the next point counts: the episode did not terminate."""
    is_followed: Tensor
    """[B, P] bool, and what came after the next point counts, too: it is of the same episode."""
    counts: Tensor
    """[B, P] bool, the decisions whose outcome is known."""

    def rows(self, index: Tensor) -> "Rollout":
        """Return some rows [R] int64 of it."""
        state = None if self.state is None else select_rows(self.state, index)
        # Of pictures a fifth of the time that `part[index]` takes.
        parts = (part.index_select(0, index) for part in self[2:])
        return Rollout(self.seen.map(lambda part: part.index_select(0, index)), state, *parts)


class Played(NamedTuple):
    """A rollout, and what happened besides."""

    rollout: Rollout
    episodes: list[Episode]
    """That ended; of rollouts of episodes, the first of each row, ended or cut."""
    frames: int
    """Steps of all rows that exist."""
    discounted: Tensor
    """[X] discounted sums of rewards up to each step, whose deviation is a scale of rewards."""


@torch.no_grad()
def play(
    player: Player,
    config: RolloutConfig,
    generator: torch.Generator | None,
    discount: float = 0.99,
) -> Played:
    """Play on from where the player is.

    Rollouts of steps end after so many; the last observation is the first of the next rollout,
    where its action is chosen, and its value stands here for what will follow. Rollouts of episodes
    end when the first of each row has, or was cut because it had its decisions. Without a generator
    the most probable actions are taken.
    """
    history = _History(player, discount)
    at_episodes = config.rollout == "episodes"
    # The player goes on with the state, in whose place it may write.
    state = None
    if not at_episodes:
        every = torch.arange(len(player.rows), device=player.agent.device)
        state = select_rows(player.state, every)
    while True:
        step, decides = player.look()
        points = decides | player.seen.truncated
        choice = player.ask(decides, generator) if points.any() else None
        if choice is None and generator is not None:
            # So that what is drawn for a step depends on nothing that is drawn before.
            player.agent.policy.noise(player.total, generator)
        history.add(step, points, decides, choice)
        if at_episodes and (history.is_over(config.decisions) or len(history) >= config.steps):
            break
        history.outcome(player.advance())
        if not at_episodes and len(history) >= config.steps and player.seen.exists is None:
            history.end()
            break
    return history.played(state, at_episodes)


class _History:
    """What is noted at each step."""

    def __init__(self, player: Player, discount: float):
        self.player, self.discount = player, discount
        self.steps: list[Steps] = []
        self.points: list[np.ndarray] = []
        self.decided: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.log_probs: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []
        self.terminated: list[np.ndarray] = []
        self.discounted: list[np.ndarray] = []
        self.episodes: list[Episode] = []
        count = len(player.rows)
        self.nothing = np.zeros(count)
        self.over = np.zeros(count, bool)
        self.decisions = np.zeros(count, np.int64)
        self.ended: dict[int, Episode] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def add(
        self, step: Steps, points: np.ndarray, decides: np.ndarray, choice: "tuple | None"
    ) -> None:
        actions, log_probs, values = (
            (np.zeros_like(self.player.actions), self.nothing, self.nothing)
            if choice is None
            else choice
        )
        self.steps.append(step)
        self.points.append(points)
        self.decided.append(decides)
        self.actions.append(actions)
        self.log_probs.append(log_probs)
        self.values.append(values)
        self.decisions += decides
        self.over |= self.player.seen.ended

    def outcome(self, episodes: list[Episode]) -> None:
        seen = self.player.seen
        self.rewards.append(seen.reward)
        self.terminated.append(seen.terminated)
        before = self.discounted[-1] if self.discounted else self.nothing
        moved = True if seen.exists is None else seen.exists
        now = np.where(moved, self.discount * before * ~seen.is_first + seen.reward, before)
        self.discounted.append(now)
        for episode in episodes:
            episode = episode._replace(step=len(self))
            self.episodes.append(episode)
            self.ended.setdefault(episode.row, episode)

    def is_over(self, decisions: int) -> bool:
        enough = self.decisions > decisions if decisions else False
        return bool((self.over | enough).all())

    def end(self) -> None:
        """Note the values of what is seen at the end, which stand for what will follow."""
        player = self.player
        values = player.values()
        step, _ = player.look()
        player.waiting.clear()
        points = ~player.seen.terminated
        self.add(step, points, np.zeros_like(points), (player.actions, self.nothing, values))

    def played(self, state: State, at_episodes: bool) -> Played:
        seen = joined(self.steps)
        for _ in range(len(self) - len(self.rewards)):
            self.rewards.append(self.nothing)
            self.terminated.append(np.zeros_like(self.over))
        arrays = [
            np.stack(part)
            for part in (
                self.points,
                self.decided,
                self.rewards,
                self.terminated,
                self.values,
                self.log_probs,
                self.actions,
            )
        ]
        frames = seen.is_first.numel() if seen.exists is None else int(seen.exists.sum())
        episodes = self.episodes
        if at_episodes:
            player = self.player
            episodes = [
                self.ended.get(row)
                or Episode(row, float(player.returns[row]), int(player.lengths[row]))
                for row in range(len(player.rows))
            ]
        else:
            # The last observation is the first of the next rollout.
            frames -= len(self.over)
        discounted = np.concatenate(self.discounted) if self.discounted else np.zeros(0)
        rollout = _compress(seen, state, *arrays)
        return Played(rollout, episodes, frames, torch.from_numpy(discounted))


def _compress(
    seen: Steps,
    state: State,
    point: np.ndarray,
    decided: np.ndarray,
    reward: np.ndarray,
    terminated: np.ndarray,
    value: np.ndarray,
    log_prob: np.ndarray,
    action: np.ndarray,
) -> Rollout:
    """Keep of arrays [T, B, ...] what belongs to points."""
    steps, rows = point.shape
    most = max(1, int(point.sum(0).max()))
    # Points first, in order of time.
    order = np.argsort(~point, axis=0, kind="stable")[:most]
    exists = np.take_along_axis(point, order, 0)
    step = np.where(exists, order, 0)
    has_next = np.concatenate([exists[1:], np.zeros((1, rows), bool)])
    following = np.where(has_next, np.concatenate([step[1:], step[:1]]), steps)

    def until_next(sequence: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((1, rows)), sequence.cumsum(0)])
        return np.take_along_axis(total, following, 0) - np.take_along_axis(total, step, 0)

    def here(sequence: np.ndarray) -> np.ndarray:
        return np.take_along_axis(sequence, step, 0)

    ends = until_next(terminated) > 0
    known = exists & here(decided) & (ends | has_next)
    next_known = np.concatenate([known[1:], np.zeros((1, rows), bool)])

    def made(array: np.ndarray, kind: type | None = None) -> Tensor:
        return torch.from_numpy(array.astype(kind or array.dtype).swapaxes(0, 1).copy())

    return Rollout(
        seen,
        state,
        at=made(step),
        actions=made(np.take_along_axis(action, step[..., None], 0)),
        log_probs=made(here(log_prob), np.float32),
        values=made(here(value), np.float32),
        rewards=made(until_next(reward), np.float32),
        goes_on=made(known & ~ends),
        # Out of time, or cut: the next value counts, what came after it does not.
        is_followed=made(known & ~ends & next_known),
        counts=made(known),
    )
