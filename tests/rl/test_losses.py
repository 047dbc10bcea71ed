"""The mathematics of learning against numbers worked out by hand, plain loops and TorchRL."""

import math

import pytest
import torch

from htm_pytorch.rl.losses import clipped_policy_losses, generalized_advantages, masked_mean
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
    """Two actions of probability 1/2 that had 1/4, 1/2 and 1: ratios 2, 1 and 1/2, clip 0.2."""
    losses = clipped_policy_losses(
        logits=torch.zeros(3, 1, 2, dtype=torch.float64),
        values=column(1, 2, 3),
        actions=torch.tensor([[0], [1], [0]]),
        old_log_probs=column(0.25, 0.5, 1).log(),
        advantages=column(1, 3, -1),
        returns=column(2, 2, 0),
        counts=torch.ones(3, 1, dtype=torch.bool),
        clip=0.2,
    )
    # min(2, 1.2) * 1, 1 * 3 and min(-0.5, -0.8).
    assert losses.policy.item() == pytest.approx(-(1.2 + 3 - 0.8) / 3)
    assert losses.value.item() == pytest.approx((1 + 0 + 9) / 2 / 3)
    assert losses.entropy.item() == pytest.approx(math.log(2))


def random_losses_input(rows: int = 4) -> dict[str, torch.Tensor]:
    made = {
        "logits": torch.randn(5, rows, 3, dtype=torch.float64),
        "values": torch.randn(5, rows, dtype=torch.float64),
        "actions": torch.randint(3, (5, rows)),
        "old_log_probs": -torch.rand(5, rows, dtype=torch.float64),
        "advantages": torch.randn(5, rows, dtype=torch.float64),
        "returns": torch.randn(5, rows, dtype=torch.float64),
        "counts": torch.rand(5, rows) < 0.6,
    }
    assert made["counts"].any() and not made["counts"].all()
    return made


def test_policy_losses_are_a_plain_loops() -> None:
    given = random_losses_input()
    policy, value, entropy, count = 0.0, 0.0, 0.0, 0
    for time, row in given["counts"].nonzero().tolist():
        weights = [math.exp(logit) for logit in given["logits"][time, row].tolist()]
        probabilities = [weight / sum(weights) for weight in weights]
        taken = probabilities[int(given["actions"][time, row])]
        ratio = taken / math.exp(given["old_log_probs"][time, row])
        gain = float(given["advantages"][time, row])
        policy -= min(ratio * gain, min(max(ratio, 0.7), 1.3) * gain)
        value += 0.5 * float(given["values"][time, row] - given["returns"][time, row]) ** 2
        entropy -= sum(p * math.log(p) for p in probabilities)
        count += 1
    losses = clipped_policy_losses(**given, clip=0.3)
    expected = (policy / count, value / count, entropy / count)
    assert [loss.item() for loss in losses] == pytest.approx(expected)


@pytest.mark.parametrize("filler", [7.0, NAN])
def test_steps_that_do_not_count_change_nothing(filler: float) -> None:
    """Neither the losses nor their gradients, whatever was recorded there."""
    given = random_losses_input()
    changed = dict(given)
    for name in ("old_log_probs", "advantages", "returns"):
        changed[name] = given[name].where(given["counts"], filler)
    changed["actions"] = given["actions"].where(given["counts"], 0)
    results = []
    for inputs in (given, changed):
        leaves = [inputs[name].clone().requires_grad_() for name in ("logits", "values")]
        parts = inputs | {"logits": leaves[0], "values": leaves[1]}
        losses = clipped_policy_losses(**parts, clip=0.2)
        results.append([*losses, *torch.autograd.grad(sum(losses), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_no_step_that_counts_makes_no_loss() -> None:
    given = random_losses_input()
    given["counts"] = torch.zeros_like(given["counts"])
    assert [loss.item() for loss in clipped_policy_losses(**given, clip=0.2)] == [0, 0, 0]
    assert masked_mean(torch.full((2, 2), NAN), torch.zeros(2, 2, dtype=torch.bool)) == 0


@pytest.mark.parametrize(
    "name", ["values", "actions", "old_log_probs", "advantages", "returns", "counts"]
)
def test_policy_losses_refuse_shapes_that_differ(name: str) -> None:
    given = random_losses_input()
    given[name] = given[name][:, :1]
    with pytest.raises(ValueError, match=rf"one shape \[T, B\].*'{name}': \(5, 1\)"):
        clipped_policy_losses(**given, clip=0.2)
