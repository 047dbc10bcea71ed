"""The agent plays: vector environment -> one `Rollout`.

A rollout begins new episodes in all environments, so that memories are written from their first
step on and gradients may flow through them. Dancers ignore the agent while they dance, so it is
asked only where its action counts. Frames wait until some row has to decide; then all of them enter
the memory at once, which is the same as one by one and costs less.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_pytorch.rl.agent import Agent, Observations
from htm_pytorch.rl.losses import generalized_advantages


class Rollout(NamedTuple):
    """T steps of B environments, and the P points of each row where a value counts.

    A point is a decision, or the last frame of an episode that ran out of time.
    """

    seen: Observations
    at: Tensor
    """[B, P] int64, the step of each point, in order; rows with fewer repeat 0."""
    actions: Tensor
    """[B, P] int64."""
    log_probs: Tensor
    """[B, P] of the actions when they were taken."""
    advantages: Tensor
    """[B, P]."""
    returns: Tensor
    """[B, P]."""
    counts: Tensor
    """[B, P] bool, the decisions whose outcome is known."""

    def rows(self, index: Tensor) -> "Rollout":
        """Return some rows of it."""
        seen = Observations(*(part[index] for part in self.seen))
        return Rollout(seen, *(part[index] for part in self[1:]))


@torch.no_grad()
def play(
    env: Any,
    agent: Agent,
    steps: int,
    *,
    action_repeat: int,
    discount: float,
    trace: float,
    generator: torch.Generator | None,
) -> tuple[Rollout, np.ndarray]:
    """Play `steps` steps of new episodes; return them and the returns of the rows' first episodes.

    Args:
        env: a vector environment, resetting in the step after an end.
        agent: chooses the actions.
        steps: T at most. An episode still going on then bootstraps from its last decision. Play
            ends earlier when every row's first episode has, its last frame included.
        action_repeat: steps that one decision lasts.
        discount: from decision to decision.
        trace: lambda of the advantages.
        generator: samples the actions; None takes the most probable. Episodes come from the
            environment's own.

    The returns are NaN for rows whose first episode did not end.
    """
    rows = env.num_envs
    state = agent.initial_state(rows)
    observed, _ = env.reset()
    is_first, (ended, truncated) = np.ones(rows, bool), np.zeros((2, rows), bool)
    held, held_action = np.zeros((2, rows), np.int64)
    frames: list[Tensor] = []
    words: list[Tensor] = []
    firsts: list[Tensor] = []
    waiting = 0
    point, decided, terminated = np.zeros((3, steps, rows), bool)
    reward, first_return = np.zeros((steps, rows)), np.full(rows, np.nan)
    value, log_prob = np.zeros((2, steps, rows), np.float32)
    action = np.zeros((steps, rows), np.int64)
    for step in range(steps):
        frame, word = observation_tensors(observed)
        frames.append(frame)
        words.append(word)
        firsts.append(torch.from_numpy(is_first))
        waiting += 1
        decided[step] = (held == 0) & (observed["instruction"] > 0) & ~ended
        point[step] = decided[step] | truncated
        if point[step].any():
            recent = [torch.stack(parts[-waiting:], 1) for parts in (frames, words, firsts)]
            last = torch.full((rows, 1), waiting - 1)
            output, state = agent(Observations(*recent), state, last)
            waiting = 0
            policy = output.logits[:, 0].log_softmax(-1)
            if generator is None:
                choice = policy.argmax(1, keepdim=True)
            else:
                choice = torch.multinomial(policy.exp(), 1, generator=generator)
            value[step] = output.values[:, 0].numpy()
            log_prob[step] = policy.gather(1, choice)[:, 0].numpy()
            action[step] = choice[:, 0].numpy()
            held_action = np.where(decided[step], action[step], held_action)
            held = np.where(decided[step], action_repeat, held)
        if not np.isnan(first_return).any():
            break
        observed, reward[step], terminated[step], truncated, _ = env.step(held_action)
        is_first = ended
        ended = terminated[step] | truncated
        held = np.where(is_first | ended, 0, np.maximum(held - 1, 0))
        over = ended & np.isnan(first_return)
        first_return = np.where(over, reward[: step + 1].sum(0), first_return)
    played = len(frames)
    seen = Observations(torch.stack(frames, 1), torch.stack(words, 1), torch.stack(firsts, 1))
    history = (point, decided, reward, terminated, value, log_prob, action)
    points = _compress(*(part[:played] for part in history))
    return _with_advantages(points, seen, discount, trace), first_return


def observation_tensors(observed: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return frames [B, ...] and instructions [B] of what a vector environment shows."""
    frames = observed["symbols"].view(np.int16) if "symbols" in observed else observed["image"]
    return torch.from_numpy(frames), torch.from_numpy(observed["instruction"])


class _Points(NamedTuple):
    """[P, B] each."""

    step: np.ndarray
    known: np.ndarray  # it is a decision and its outcome fell into the rollout
    ends: np.ndarray  # the episode terminated before the next point
    next_known: np.ndarray  # the next point's outcome is known too
    reward: np.ndarray  # up to the next point
    value: np.ndarray
    log_prob: np.ndarray
    action: np.ndarray


def _compress(
    point: np.ndarray,
    decided: np.ndarray,
    reward: np.ndarray,
    terminated: np.ndarray,
    value: np.ndarray,
    log_prob: np.ndarray,
    action: np.ndarray,
) -> _Points:
    steps, rows = point.shape
    most = max(1, int(point.sum(0).max()))
    # Points first, in order of time.
    order = np.argsort(~point, axis=0, kind="stable")[:most]
    exists = np.take_along_axis(point, order, 0)
    step = np.where(exists, order, 0)
    following = np.concatenate([step[1:], np.full((1, rows), steps)])
    has_next = np.concatenate([exists[1:], np.zeros((1, rows), bool)])
    following = np.where(has_next, following, steps)

    def until_next(sequence: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((1, rows)), sequence.cumsum(0)])
        return np.take_along_axis(total, following, 0) - np.take_along_axis(total, step, 0)

    def here(sequence: np.ndarray) -> np.ndarray:
        return np.take_along_axis(sequence, step, 0)

    is_decision = exists & here(decided)
    ends = until_next(terminated) > 0
    known = is_decision & (ends | has_next)
    return _Points(
        step=step,
        known=known,
        ends=ends,
        next_known=np.concatenate([known[1:], np.zeros((1, rows), bool)]),
        reward=until_next(reward),
        value=here(value),
        log_prob=here(log_prob),
        action=here(action),
    )


def _with_advantages(points: _Points, seen: Observations, discount: float, trace: float) -> Rollout:
    value = torch.from_numpy(points.value)
    known = torch.from_numpy(points.known)
    goes_on = torch.from_numpy(points.known & ~points.ends)
    advantages = generalized_advantages(
        r_t=torch.from_numpy(points.reward).to(value.dtype),
        discount_t=discount * goes_on.to(value.dtype),
        # Out of time, or cut: the next value counts, what came after it does not.
        trace_t=trace * (goes_on & torch.from_numpy(points.next_known)).to(value.dtype),
        v_tm1=value,
        v_t=torch.cat([value[1:], torch.zeros_like(value[:1])]),
    )
    return Rollout(
        seen=seen,
        at=torch.from_numpy(points.step).T.contiguous(),
        actions=torch.from_numpy(points.action).T.contiguous(),
        log_probs=torch.from_numpy(points.log_prob).T.contiguous(),
        advantages=advantages.T.contiguous(),
        returns=(advantages + value).T.contiguous(),
        counts=known.T.contiguous(),
    )
