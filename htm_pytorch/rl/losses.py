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
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    counts: Tensor,
    clip: float,
) -> PolicyLosses:
    """Return the losses of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9).

    All [T, B] but logits [T, B, A]; `counts` is bool, False for steps to leave out, whatever was
    recorded there. The value loss is half the squared error, and the entropy is to be maximised.
    """
    _require_same_shape(
        values=values,
        actions=actions,
        old_log_probs=old_log_probs,
        advantages=advantages,
        returns=returns,
        counts=counts,
    )
    # Left out here already: a NaN would pass the mean's mask backwards.
    old_log_probs, advantages, returns = (
        part.where(counts, 0.0) for part in (old_log_probs, advantages, returns)
    )
    log_policy = logits.log_softmax(-1)
    log_probs = log_policy.gather(-1, actions[..., None])[..., 0]
    ratio = (log_probs - old_log_probs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    return PolicyLosses(
        policy=-masked_mean(surrogate, counts),
        value=masked_mean(0.5 * (values - returns) ** 2, counts),
        entropy=masked_mean(entropy, counts),
    )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` where `mask`; 0 where nothing counts."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def _require_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape [T, B], got {shapes}")
