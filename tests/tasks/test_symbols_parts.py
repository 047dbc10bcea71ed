"""Symbols that are new in each episode, as an agent sees them."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from htm_pytorch.tasks.symbols_parts import BindingEncoder

DIM = 48


def observed(*steps: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return observations as [1, T, ...]."""
    return {
        name: torch.from_numpy(np.stack([step[name] for step in steps]))[None] for name in steps[0]
    }


@pytest.fixture
def seen() -> tuple[Any, list[dict[str, np.ndarray]]]:
    name = "htm_pytorch.envs:htm_pytorch/RapidBinding-v0"
    env = gymnasium.make(name, distractions=0, disable_env_checker=True)
    steps = [env.reset(seed=0)[0]]
    while len(steps) < 6:
        steps.append(env.step(0)[0])
    return env.observation_space, steps


def test_a_name_looks_alike_in_a_binding_and_in_its_question(
    seen: tuple[Any, list[dict[str, np.ndarray]]],
) -> None:
    space, steps = seen
    encoder = BindingEncoder(space, DIM)
    with torch.no_grad():
        encoded = encoder(observed(*steps))[0]
        shown = {name: value.clone() for name, value in observed(*steps).items()}
        shown["name"].zero_()
        names = encoded - encoder(shown)[0]
    bindings, questions = names[:3], names[3:]
    assert [step["asks"] for step in steps] == [0, 0, 0, 1, 1, 1]
    alike = torch.cdist(questions, bindings) < 1e-4
    assert (alike.sum(1) == 1).all() and (alike.sum(0) == 1).all()


def test_the_order_of_the_objects_is_seen_in_questions_alone(
    seen: tuple[Any, list[dict[str, np.ndarray]]],
) -> None:
    space, steps = seen
    encoder = BindingEncoder(space, DIM)
    turned = [{**step, "objects": np.roll(step["objects"], 1, 0)} for step in steps]
    with torch.no_grad():
        change = (encoder(observed(*steps)) - encoder(observed(*turned)))[0].abs().amax(1)
    # A binding has its object in the first place.
    assert (change > 1e-3).all()
    with torch.no_grad():
        padded = [{**step, "objects": step["objects"].copy()} for step in steps]
        for step in padded[:3]:
            step["objects"][1:] = 7
        change = (encoder(observed(*steps)) - encoder(observed(*padded)))[0].abs().amax(1)
    assert not change[:3].any()
