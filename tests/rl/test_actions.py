"""Policies of all spaces of actions, beside torch's own distributions."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from htm_pytorch.rl.actions import make_policy
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

BOX = spaces.Box(np.array([-1.0, 0.0, -np.inf]), np.array([3.0, 1.0, np.inf]), dtype=np.float64)
SPACES: dict[str, spaces.Space[Any]] = {
    "choice": spaces.Discrete(5),
    "choice from 3": spaces.Discrete(4, start=3),
    "choices": spaces.MultiDiscrete([2, 3, 4]),
    "grid of choices": spaces.MultiDiscrete(
        np.array([[2, 3], [4, 5]]), start=np.array([[0, 1], [0, 2]])
    ),
    "switches": spaces.MultiBinary(3),
    "grid of switches": spaces.MultiBinary([2, 2]),
    "numbers": BOX,
    "grid of numbers": spaces.Box(-2, 2, (2, 2), np.float32),
}
each = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


@each
def test_samples_lie_in_the_space_and_are_as_probable_as_said(space: Any) -> None:
    policy = make_policy(space, 8)
    features = torch.randn(1, 8).expand(20_000, 8)
    parameters = policy(features)
    assert parameters.shape == (20_000, policy.parameters_count)
    distribution = policy.distribution(parameters)
    actions = distribution.sample(policy.noise(20_000, torch.Generator().manual_seed(0)))
    assert actions.shape == (20_000, policy.size) and actions.dtype == policy.dtype
    done = policy.to_environment(actions.detach().numpy())
    for action in done[:100]:
        assert space.contains(action) or space.contains(np.asarray(action, space.dtype)[()])
    # The mean of -log p of what is sampled is the entropy.
    surprise = -distribution.log_prob(actions)
    assert surprise.shape == (20_000,)
    error = surprise.std() / 20_000**0.5
    assert abs(surprise.mean() - distribution.entropy()[0]) < 5 * error
    best = distribution.log_prob(distribution.mode())
    assert (best >= distribution.log_prob(actions) - 1e-5).all()


def test_choices_are_torchs_categoricals() -> None:
    policy = make_policy(spaces.MultiDiscrete([2, 3]), 4)
    logits = torch.randn(6, 5)
    ours = policy.distribution(logits)
    actions = torch.stack([torch.randint(2, (6,)), torch.randint(3, (6,))], 1)
    theirs = [torch.distributions.Categorical(logits=part) for part in logits.split([2, 3], -1)]
    expected = sum(d.log_prob(a) for d, a in zip(theirs, actions.unbind(1), strict=True))
    assert isinstance(expected, torch.Tensor)
    assert_near(ours.log_prob(actions), expected, 1e-6)
    assert_near(ours.entropy(), theirs[0].entropy() + theirs[1].entropy(), 1e-6)


def test_numbers_are_torchs_normals() -> None:
    policy = make_policy(BOX, 4)
    parameters = torch.randn(6, 6)
    ours = policy.distribution(parameters)
    theirs = torch.distributions.Normal(parameters[:, :3], parameters[:, 3:].exp())
    actions = torch.randn(6, 3)
    assert_near(ours.log_prob(actions), theirs.log_prob(actions).sum(-1), 1e-6)
    assert_near(ours.entropy(), theirs.entropy().sum(-1), 1e-6)


def test_numbers_are_in_units_of_the_range_and_clipped() -> None:
    policy = make_policy(BOX, 4)
    done = policy.to_environment(np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 7.0], [9.0, -9.0, -9.0]]))
    assert done.tolist() == [[1.0, 0.5, 0.0], [3.0, 0.0, 7.0], [3.0, 0.0, -9.0]]


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(3),
        spaces.Box(0, 255, (2,), np.uint8),
        spaces.Box(-1, 1, ()),
        spaces.Dict({"a": spaces.Discrete(2)}),
    ],
    ids=str,
)
def test_other_spaces_are_refused_in_a_sentence(space: Any) -> None:
    with pytest.raises(ValueError, match="^env: expected actions that are Discrete, .* got "):
        make_policy(space, 8)
