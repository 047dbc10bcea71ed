"""The agent: streaming, what its encoders tell apart, reconstruction, and where gradients flow."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from htm_pytorch.envs import COLOURS, TILES, ballet_tables
from htm_pytorch.rl.agent import Agent, ImageEncoder, Observations, SymbolEncoder
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("observation", ["symbols", "image"])


def make_agent(observation: Any, **changes: Any) -> Agent:
    arguments: dict[str, Any] = {
        "actions": 8,
        "dim": 12,
        "depth": 2,
        "heads": 2,
        "topk_mems": 2,
        "mem_chunk_size": 3,
        "mem_chunks": 3,
        "window": 2,
        "detach_memories": False,
    }
    return Agent(observation, **arguments | changes)


def symbol(shape: int, colour: int) -> int:
    return ballet_tables.FIRST_DANCER + shape * len(COLOURS) + colour


def room(*dancers: tuple[tuple[int, int], int]) -> np.ndarray:
    """The symbols seen from the agent's first square, with dancers on some of the others."""
    symbols = ballet_tables.ROOMS[ballet_tables.AGENT_START].copy()
    for square, look in dancers:
        symbols[square] = look
    return symbols


def as_frames(observation: str, rooms: list[np.ndarray]) -> torch.Tensor:
    """[1, T, ...], as the environment shows them."""
    if observation == "symbols":
        return torch.from_numpy(np.stack(rooms).view(np.int16))[None]
    pictures = TILES[np.stack(rooms)].swapaxes(2, 3).reshape(-1, 99, 99, 3)
    return torch.from_numpy(pictures)[None]


def make_seen(observation: str, batch: int, length: int) -> Observations:
    """Two dancers somewhere, a word, and here and there a new episode."""
    draw = np.random.default_rng(0)
    rooms = []
    for _ in range(batch * length):
        squares = draw.permutation(81)[:2]
        looks = draw.integers(ballet_tables.FIRST_DANCER, ballet_tables.NUM_SYMBOLS, 2)
        places = [(1 + int(square) // 9, 1 + int(square) % 9) for square in squares]
        rooms.append(room(*zip(places, looks, strict=True)))
    frames = as_frames(observation, rooms)[0].unflatten(0, (batch, length))
    is_first = torch.rand(batch, length) < 0.1
    is_first[:, 0] = True
    return Observations(frames, torch.randint(14, (batch, length)), is_first)


@KINDS
def test_streamed_is_whole(observation: str) -> None:
    """In pieces of any length, asked about any of their steps, recalling or not."""
    agent = make_agent(observation).double()
    seen = make_seen(observation, 2, 17)
    assert seen.is_first[:, 1:].any()
    every = torch.arange(17).expand(2, 17)
    whole, _ = agent(seen, agent.initial_state(2), every)
    assert whole.features.shape == (2, 17, 12)
    assert whole.logits.shape == (2, 17, 8)
    assert whole.values.shape == (2, 17)

    some = torch.tensor([[3, 3, 16], [0, 7, 1]])
    for got in (
        agent(seen, agent.initial_state(2), some)[0],
        agent.recall(seen, agent.initial_state(2), some)[0],
    ):
        for name, part, all_parts in zip(got._fields, got, whole, strict=True):
            expected = torch.stack([all_parts[row, some[row]] for row in range(2)])
            assert_near(part, expected, 1e-12, name)

    state, start, pieces = agent.initial_state(2), 0, []
    for length in (1, 5, 1, 2, 8):
        piece = Observations(*(part[:, start : start + length] for part in seen))
        output, state = agent(piece, state, every[:, :length])
        pieces.append(output)
        start += length
    assert start == 17
    for name, *parts, expected in zip(whole._fields, *pieces, whole, strict=True):
        assert_near(torch.cat(parts, 1), expected, 1e-12, name)


NORTH, SOUTH = (2, 5), (8, 5)
BEFORE = room((NORTH, symbol(1, 2)), (SOUTH, symbol(3, 4)))
OTHERWISE = {
    "colours swapped": room((NORTH, symbol(1, 4)), (SOUTH, symbol(3, 2))),
    "shapes swapped": room((NORTH, symbol(3, 2)), (SOUTH, symbol(1, 4))),
    "dancers swapped": room((NORTH, symbol(3, 4)), (SOUTH, symbol(1, 2))),
    "a step aside": room(((2, 6), symbol(1, 2)), (SOUTH, symbol(3, 4))),
    "one gone": room((NORTH, symbol(1, 2))),
    "elsewhere in the room": np.roll(BEFORE, 1, 0),
}


@KINDS
@pytest.mark.parametrize("after", OTHERWISE.values(), ids=OTHERWISE)
def test_encoder_tells_who_stands_where(observation: str, after: np.ndarray) -> None:
    encode = {"symbols": SymbolEncoder, "image": ImageEncoder}[observation](16)
    one, other = encode(as_frames(observation, [BEFORE, after]))[0]
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@KINDS
def test_encoding_is_of_the_frame_alone(observation: str) -> None:
    encode = {"symbols": SymbolEncoder, "image": ImageEncoder}[observation](16).double()
    frames = as_frames(observation, [BEFORE, *OTHERWISE.values()])
    together = encode(frames)
    assert together.shape == (1, 7, 16)
    alone = torch.cat([encode(frames[:, step : step + 1]) for step in range(7)], 1)
    assert_near(together, alone, 1e-12)
    assert_near(encode(frames.transpose(0, 1)), together.transpose(0, 1), 1e-12)


def test_a_frame_without_dancers_can_be_encoded() -> None:
    assert SymbolEncoder(16)(as_frames("symbols", [room()])).isfinite().all()


@KINDS
def test_reconstruction_can_be_learned(observation: str) -> None:
    """To the least there is: 0, or for pictures the entropy of their shades of grey."""
    agent = make_agent(observation, dim=32)
    frames, word = as_frames(observation, [BEFORE]), torch.tensor([[5]])
    seen = Observations(frames, word, torch.ones(1, 1, dtype=torch.bool))
    least = 0.0
    if observation == "image":
        shades = frames.float() / 255
        least = nn.functional.binary_cross_entropy(shades, shades).item()
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        output, _ = agent(seen, agent.initial_state(1), torch.zeros(1, 1, dtype=torch.int64))
        loss = agent.reconstruction_loss(output.features[:, 0], frames[:, 0], word[:, 0])
        losses.append(loss.item() - least)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] >= -1e-4
    assert losses[-1] < 0.02 * losses[0], losses


@KINDS
def test_reconstruction_loss_is_a_mean_over_frames(observation: str) -> None:
    agent = make_agent(observation).double()
    seen = make_seen(observation, 3, 1)
    features = torch.randn(3, 12, dtype=torch.float64)
    frames, words = seen.frames[:, 0], seen.instructions[:, 0]
    together = agent.reconstruction_loss(features, frames, words)
    each = [
        agent.reconstruction_loss(features[row, None], frames[row, None], words[row, None])
        for row in range(3)
    ]
    assert_near(together, torch.stack(each).mean(), 1e-12)


@pytest.mark.parametrize("detach_memories", [False, True])
@KINDS
def test_gradient_flows_through_the_memory_unless_it_is_cut(
    observation: str, detach_memories: bool
) -> None:
    """A window of one step: nothing but the memory leads from an early frame to a late output."""
    agent = make_agent(observation, depth=1, window=1, detach_memories=detach_memories)
    encoded: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        encoded.append(output)

    agent.encode_frame.register_forward_hook(keep)
    seen = make_seen(observation, 1, 6)
    seen = seen._replace(is_first=torch.zeros_like(seen.is_first))
    output, _ = agent(seen, agent.initial_state(1), torch.tensor([[5]]))
    agent.reconstruction_loss(
        output.features[:, 0], seen.frames[:, 5], seen.instructions[:, 5]
    ).backward()
    size = encoded[0].grad[0].abs().amax(-1)
    assert size[5] > 0
    # Steps 0 to 2 are the chunk that is recalled; 3 and 4 wait for theirs to close.
    assert ((size[:3] == 0) if detach_memories else (size[:3] > 0)).all()
    assert (size[3:5] == 0).all()
