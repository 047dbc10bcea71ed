"""The mathematics of learning against numbers worked out by hand, plain loops and TorchRL."""

import math
from typing import Any

import pytest
import torch

from htm_pytorch.rl.losses import (
    VTrace,
    clipped_policy_losses,
    divergence,
    generalized_advantages,
    masked_mean,
    policy_gradient_losses,
    vtrace,
)
from tests.helpers import assert_near

NAN = float("nan")


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def random_steps(length: int, rows: int, generator: torch.Generator):
    """Rewards, values before and after, and steps where episodes end either way."""
    shape = (length, rows)
    r_t, v_tm1, v_t = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    fate = torch.rand(shape, generator=generator)
    return r_t, v_tm1, v_t, fate < 0.2, (fate >= 0.2) & (fate < 0.4)


def test_advantages_of_a_worked_example() -> None:
    # Step 0 goes on, step 1 is out of time, step 2 goes on, step 3 terminates.
    advantages = generalized_advantages(
        r_t=column(0, 0, 1, 2),
        discount_t=column(0.5, 0.5, 0.5, 0),
        trace_t=column(0.5, 0, 0.5, 0.5),
        v_tm1=column(1, 2, 3, 4),
        v_t=column(2, 8, 4, 100),
    )
    # Errors: 0 + 0.5 * 2 - 1 = 0; 0 + 0.5 * 8 - 2 = 2; 1 + 0.5 * 4 - 3 = 0; 2 - 4 = -2.
    assert advantages[:, 0].tolist() == [0 + 0.25 * 2, 2, 0 + 0.25 * -2, -2]


@pytest.mark.parametrize("length", [0, 1, 7])
def test_advantages_are_the_sum_of_what_follows(length: int) -> None:
    """The definition: discounted errors up to the first step without a trace."""
    generator = torch.Generator().manual_seed(length)
    r_t, v_tm1, v_t, terminated, truncated = random_steps(length, 5, generator)
    discount_t = 0.9 * (~terminated).double()
    trace_t = 0.8 * (~truncated).double()
    expected = torch.zeros(length, 5, dtype=torch.float64)
    for row in range(5):
        for start in range(length):
            weight = 1.0
            for time in range(start, length):
                error = r_t[time, row] + discount_t[time, row] * v_t[time, row] - v_tm1[time, row]
                expected[start, row] += weight * error
                weight *= float(discount_t[time, row] * trace_t[time, row])
    advantages = generalized_advantages(r_t, discount_t, trace_t, v_tm1, v_t)
    torch.testing.assert_close(advantages, expected)


def test_advantages_are_torchrls() -> None:
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    generator = torch.Generator().manual_seed(0)
    r_t, v_tm1, v_t, terminated, truncated = random_steps(12, 6, generator)
    assert truncated[1:-1].any() and terminated[1:-1].any()
    # TorchRL: [B, T, 1]; `done` cuts the trace, `terminated` the value that follows. It keeps
    # gamma and lambda in float32, so they are numbers that float32 holds.
    expected, targets = functional.generalized_advantage_estimate(
        0.75,
        0.5,
        *(part.T[..., None] for part in (v_tm1, v_t, r_t, terminated | truncated, terminated)),
    )
    advantages = generalized_advantages(
        r_t, 0.75 * (~terminated).double(), 0.5 * (~(terminated | truncated)).double(), v_tm1, v_t
    )
    assert_near(advantages, expected[..., 0].T, 1e-12)
    assert_near(advantages + v_tm1, targets[..., 0].T, 1e-12)


def test_advantages_refuse_shapes_that_differ() -> None:
    steps, row = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"one shape \[T, B\].*'v_t': \(2, 2\)"):
        generalized_advantages(steps, steps, steps, steps, steps[1:])
    with pytest.raises(ValueError, match=r"one shape \[T, B\]"):
        generalized_advantages(row, row, row, row, row)


def test_policy_losses_of_a_worked_example() -> None:
    """Ratios 2, 1 and 1/2, clip 0.2."""
    given: dict[str, Any] = {
        "log_probs": column(0.5, 0.5, 0.5).log(),
        "entropies": column(1, 2, 6),
        "values": column(1, 2, 3),
        "old_log_probs": column(0.25, 0.5, 1).log(),
        "old_values": column(1, 2, 4),
        "advantages": column(1, 3, -1),
        "returns": column(2, 2, 0),
        "counts": torch.ones(3, 1, dtype=torch.bool),
    }
    losses = clipped_policy_losses(**given, clip=0.2)
    # min(2, 1.2) * 1, 1 * 3 and min(-0.5, -0.8).
    assert losses.policy.item() == pytest.approx(-(1.2 + 3 - 0.8) / 3)
    assert losses.value.item() == pytest.approx((1 + 0 + 9) / 2 / 3)
    assert losses.entropy.item() == pytest.approx(3)
    # The last value moved by 1 towards its return; 0.5 of it do not count.
    losses = clipped_policy_losses(**given, clip=0.2, value_clip=0.5)
    assert losses.value.item() == pytest.approx((1 + 0 + 3.5**2) / 2 / 3)
    # As a part of 6 steps.
    losses = clipped_policy_losses(**given, clip=0.2, total=torch.tensor(6.0))
    assert losses.entropy.item() == pytest.approx(1.5)


def random_losses_input(rows: int = 4) -> dict[str, Any]:
    names = ("entropies", "values", "old_values", "advantages", "returns")
    made = {name: torch.randn(5, rows, dtype=torch.float64) for name in names}
    made |= {
        "log_probs": -torch.rand(5, rows, dtype=torch.float64),
        "old_log_probs": -torch.rand(5, rows, dtype=torch.float64),
        "counts": torch.rand(5, rows) < 0.6,
    }
    assert made["counts"].any() and not made["counts"].all()
    return made


def test_policy_losses_are_a_plain_loops() -> None:
    given = random_losses_input()
    policy, value, entropy, count = 0.0, 0.0, 0.0, 0
    for time, row in given["counts"].nonzero().tolist():
        here = {name: float(part[time, row]) for name, part in given.items()}
        ratio = math.exp(here["log_probs"] - here["old_log_probs"])
        gain = here["advantages"]
        policy -= min(ratio * gain, min(max(ratio, 0.7), 1.3) * gain)
        value += 0.5 * (here["values"] - here["returns"]) ** 2
        entropy += here["entropies"]
        count += 1
    losses = clipped_policy_losses(**given, clip=0.3)
    expected = (policy / count, value / count, entropy / count)
    assert [loss.item() for loss in losses] == pytest.approx(expected)


@pytest.mark.parametrize("filler", [7.0, NAN])
def test_steps_that_do_not_count_change_nothing(filler: float) -> None:
    """Neither the losses nor their gradients, whatever was recorded there."""
    given = random_losses_input()
    changed = dict(given)
    for name in ("old_log_probs", "old_values", "advantages", "returns"):
        changed[name] = given[name].where(given["counts"], filler)
    learned = ("log_probs", "entropies", "values")
    results = []
    for inputs in (given, changed):
        leaves = [inputs[name].clone().requires_grad_() for name in learned]
        parts = inputs | dict(zip(learned, leaves, strict=True))
        losses = clipped_policy_losses(**parts, clip=0.2, value_clip=0.5)
        results.append([*losses, *torch.autograd.grad(torch.stack(list(losses)).sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_no_step_that_counts_makes_no_loss() -> None:
    given = random_losses_input()
    given["counts"] = torch.zeros_like(given["counts"])
    assert [loss.item() for loss in clipped_policy_losses(**given, clip=0.2)] == [0, 0, 0]
    assert masked_mean(torch.full((2, 2), NAN), torch.zeros(2, 2, dtype=torch.bool)) == 0


@pytest.mark.parametrize("name", list(random_losses_input()))
def test_policy_losses_refuse_shapes_that_differ(name: str) -> None:
    given = random_losses_input()
    given[name] = given[name][:, :1]
    with pytest.raises(ValueError, match=rf"one shape \[T, B\].*'{name}': \(5, 1\)"):
        clipped_policy_losses(**given, clip=0.2)


def test_vtrace_of_a_worked_example() -> None:
    """Ratios 2 and 1/2: the first is clipped to 1."""
    corrected = vtrace(
        r_t=column(1, 2),
        discount_t=column(0.5, 0),
        trace_t=column(1, 1),
        v_tm1=column(1, 3),
        v_t=column(3, 100),
        log_rho_tm1=column(2, 0.5).log(),
    )
    # Errors: 1 * (1 + 0.5 * 3 - 1) = 1.5 and 0.5 * (2 - 3) = -0.5.
    assert corrected.targets[:, 0].tolist() == [1 + 1.5 + 0.5 * 1 * -0.5, 3 - 0.5]
    # The advantage of the first is from the corrected value of the second, 2.5.
    assert corrected.advantages[:, 0].tolist() == [1 + 0.5 * 2.5 - 1, 0.5 * (2 - 3)]


def test_vtrace_is_the_papers_sum() -> None:
    """Equation 1, written out, with products of clipped ratios."""
    generator = torch.Generator().manual_seed(0)
    r_t, v_tm1, _, terminated, truncated = random_steps(9, 4, generator)
    v_t = torch.cat([v_tm1[1:], torch.randn(1, 4, dtype=torch.float64, generator=generator)])
    v_t = torch.where(truncated, torch.randn(9, 4, dtype=torch.float64, generator=generator), v_t)
    log_rho = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    discount = 0.9 * (~terminated).double()
    trace = (~(terminated | truncated)).double()
    corrected = vtrace(r_t, discount, trace, v_tm1, v_t, log_rho, clip_rho=1.2, clip_c=0.8)
    rho = log_rho.exp()
    for row in range(4):
        for start in range(9):
            target, weight = float(v_tm1[start, row]), 1.0
            for time in range(start, 9):
                error = r_t[time, row] + discount[time, row] * v_t[time, row] - v_tm1[time, row]
                target += weight * float(rho[time, row].clamp(max=1.2) * error)
                c = float(rho[time, row].clamp(max=0.8))
                weight *= float(discount[time, row] * trace[time, row]) * c
            assert corrected.targets[start, row].item() == pytest.approx(target)


def test_vtrace_of_todays_policy_is_the_sum_of_rewards() -> None:
    """With ratios of 1, targets are those of lambda 1 (the paper's remark 1)."""
    generator = torch.Generator().manual_seed(0)
    r_t, v_tm1, _, terminated, _ = random_steps(9, 4, generator)
    v_t = torch.cat([v_tm1[1:], torch.zeros(1, 4, dtype=torch.float64)])
    discount = 0.9 * (~terminated).double()
    ones = torch.ones_like(r_t)
    corrected = vtrace(r_t, discount, ones, v_tm1, v_t, torch.zeros_like(r_t))
    expected = generalized_advantages(r_t, discount, ones, v_tm1, v_t)
    assert_near(corrected.targets, v_tm1 + expected, 1e-12)
    assert_near(corrected.advantages, expected, 1e-12)


def test_losses_of_the_policy_gradient() -> None:
    losses = policy_gradient_losses(
        log_probs=column(-1, -2, -3),
        entropies=column(1, 2, 6),
        values=column(1, 2, 3),
        corrected=VTrace(column(2, 2, NAN), column(1, -1, NAN)),
        counts=column(1, 1, 0).bool(),
    )
    assert [loss.item() for loss in losses] == pytest.approx([-(-1 + 2) / 2, 0.25, 1.5])


def test_divergence_of_policies() -> None:
    before, now = column(-1, -2, -3), column(-1.5, -1, NAN)
    counts = column(1, 1, 0).bool()
    expected = (math.exp(-0.5) - 0.5 + math.exp(1) - 2) / 2
    assert divergence(now, before, counts).item() == pytest.approx(expected)
    assert divergence(before, before, counts).item() == 0
    assert divergence(now, before, counts, torch.tensor(4.0)).item() == pytest.approx(expected / 2)
