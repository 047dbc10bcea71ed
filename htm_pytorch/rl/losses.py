"""The mathematics of learning from reward: pure functions on arrays [time, batch].

Names carry their time: `v_tm1` is the value before the step that earned `r_t`, `v_t` after it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def generalized_advantages(
    r_t: Tensor, discount_t: Tensor, trace_t: Tensor, v_tm1: Tensor, v_t: Tensor
) -> Tensor:
    """Return the advantages [T, B] of GAE (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    Args:
        r_t: [T, B] rewards.
        discount_t: [T, B] gamma; 0 where the episode terminated, so that `v_t` does not count.
        trace_t: [T, B] lambda; 0 where the next step is of another episode, also after a
            truncation, which bootstraps from `v_t` but does not continue.
        v_tm1: [T, B] values.
        v_t: [T, B] values of what followed; need not be `v_tm1` shifted.
    """
    _require_same_shape(r_t=r_t, discount_t=discount_t, trace_t=trace_t, v_tm1=v_tm1, v_t=v_t)
    errors = r_t + discount_t * v_t - v_tm1
    advantages = torch.empty_like(errors)
    following = errors.new_zeros(errors.shape[1])
    for time in reversed(range(len(errors))):
        following = errors[time] + discount_t[time] * trace_t[time] * following
        advantages[time] = following
    return advantages


class PolicyLosses(NamedTuple):
    """Scalars, each a mean over the steps that count."""

    policy: Tensor
    value: Tensor
    entropy: Tensor


def clipped_policy_losses(
    log_probs: Tensor,
    entropies: Tensor,
    values: Tensor,
    old_log_probs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    counts: Tensor,
    clip: float,
    value_clip: float = 0.0,
    total: Tensor | None = None,
) -> PolicyLosses:
    """Return the losses of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9).

    All [T, B]. The value loss is half the squared error, and the entropy is to be maximised.

    Args:
        log_probs: of the actions that were taken, by the policy that learns.
        entropies: of that policy.
        values: of the value function that learns.
        old_log_probs: when the actions were taken.
        old_values: when the actions were taken.
        advantages: of the actions.
        returns: what the values should be.
        counts: bool, False for steps to leave out, whatever was recorded there.
        clip: how far from 1 the ratio of probabilities still counts.
        value_clip: how far a value may move from the old one; 0: any.
        total: number of steps that means are over; None: those that count here.
    """
    _require_same_shape(
        log_probs=log_probs,
        entropies=entropies,
        values=values,
        old_log_probs=old_log_probs,
        old_values=old_values,
        advantages=advantages,
        returns=returns,
        counts=counts,
    )
    # Left out here already: a NaN would pass the mean's mask backwards.
    old_log_probs, old_values, advantages, returns = (
        part.where(counts, 0.0) for part in (old_log_probs, old_values, advantages, returns)
    )
    ratio = (log_probs - old_log_probs).where(counts, 0.0).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    errors = (values - returns) ** 2
    if value_clip:
        moved = old_values + (values - old_values).clamp(-value_clip, value_clip)
        errors = torch.maximum(errors, (moved - returns) ** 2)
    return PolicyLosses(
        policy=-masked_mean(surrogate, counts, total),
        value=masked_mean(0.5 * errors, counts, total),
        entropy=masked_mean(entropies, counts, total),
    )


class VTrace(NamedTuple):
    """What V-trace corrects, [T, B] each."""

    targets: Tensor
    """What the values should be, v_s of the paper."""
    advantages: Tensor
    """Of the actions, by which their log probabilities are weighted."""


def vtrace(
    r_t: Tensor,
    discount_t: Tensor,
    trace_t: Tensor,
    v_tm1: Tensor,
    v_t: Tensor,
    log_rho_tm1: Tensor,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> VTrace:
    """Correct for actions of an older policy (Espeholt et al. 2018, arXiv 1802.01561, eq. 1).

    Args:
        r_t: [T, B] rewards.
        discount_t: [T, B] gamma; 0 where the episode terminated.
        trace_t: [T, B] lambda; 0 where the next step is of another episode.
        v_tm1: [T, B] values.
        v_t: [T, B] values of what followed; need not be `v_tm1` shifted.
        log_rho_tm1: [T, B] logarithms of the new probability of an action over the old one.
        clip_rho: largest weight of a temporal difference.
        clip_c: largest weight with which later ones count.
    """
    _require_same_shape(
        r_t=r_t,
        discount_t=discount_t,
        trace_t=trace_t,
        v_tm1=v_tm1,
        v_t=v_t,
        log_rho_tm1=log_rho_tm1,
    )
    rho = log_rho_tm1.exp()
    clipped, c = rho.clamp(max=clip_rho), rho.clamp(max=clip_c) * trace_t
    errors = clipped * (r_t + discount_t * v_t - v_tm1)
    corrections = torch.zeros_like(errors)
    following = errors.new_zeros(errors.shape[1])
    advantages = torch.zeros_like(errors)
    for time in reversed(range(len(errors))):
        # `following` is v_s - V(x_s) of the next step.
        later = trace_t[time] * following
        gain = r_t[time] + discount_t[time] * (v_t[time] + later) - v_tm1[time]
        advantages[time] = clipped[time] * gain
        following = errors[time] + discount_t[time] * c[time] * following
        corrections[time] = following
    return VTrace(v_tm1 + corrections, advantages)


def policy_gradient_losses(
    log_probs: Tensor,
    entropies: Tensor,
    values: Tensor,
    corrected: VTrace,
    counts: Tensor,
    total: Tensor | None = None,
) -> PolicyLosses:
    """Return the losses of IMPALA (arXiv 1802.01561, section 4.2), all [T, B].

    Args:
        log_probs: of the actions that were taken, by the policy that learns.
        entropies: of that policy.
        values: of the value function that learns.
        corrected: what V-trace made of them, without gradients.
        counts: bool, False for steps to leave out.
        total: number of steps that means are over; None: those that count here.
    """
    _require_same_shape(
        log_probs=log_probs,
        entropies=entropies,
        values=values,
        targets=corrected.targets,
        advantages=corrected.advantages,
        counts=counts,
    )
    targets, advantages = (part.where(counts, 0.0) for part in corrected)
    return PolicyLosses(
        policy=-masked_mean(log_probs * advantages, counts, total),
        value=masked_mean(0.5 * (values - targets) ** 2, counts, total),
        entropy=masked_mean(entropies, counts, total),
    )


def divergence(
    log_probs: Tensor, old_log_probs: Tensor, counts: Tensor, total: Tensor | None = None
) -> Tensor:
    """Return how far a policy is from the one that played: its Kullback-Leibler divergence.

    Estimated as the mean of ratio - 1 - log ratio, which is never negative (Schulman 2020,
    "Approximating KL divergence", k3). All [T, B]; `counts` and `total` as for the losses.
    """
    moved = (log_probs - old_log_probs).where(counts, 0.0)
    return masked_mean(moved.exp() - 1 - moved, counts, total)


def masked_mean(values: Tensor, mask: Tensor, total: Tensor | None = None) -> Tensor:
    """Return the mean of `values` where `mask`; 0 where nothing counts.

    `total` stands for the number of values where they are a part of all.
    """
    count = mask.sum() if total is None else total
    return values.where(mask, 0.0).sum() / count.clamp(min=1)


def _require_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape [T, B], got {shapes}")
