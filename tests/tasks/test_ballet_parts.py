"""Ballet's agent: streaming, what encoders tell apart, reconstruction, where gradients flow."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from htm_pytorch.envs import COLOURS, TILES, ballet_tables
from htm_pytorch.rl.agent import Agent, make_agent
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.making import make_environments
from htm_pytorch.rl.observations import Steps
from htm_pytorch.tasks import find
from htm_pytorch.tasks.ballet_parts import (
    FrameDecoder,
    FrameEncoder,
    SymbolEncoder,
    TileEncoder,
)
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("observation", ["symbols", "image"])


def make(observation: str, **changes: Any) -> Agent:
    sizes: dict[str, Any] = {
        "dim": 12,
        "depth": 2,
        "heads": 2,
        "mem_chunk_size": 3,
        "mem_chunks": 3,
        "window": 2,
        "env_args": (f"observation={observation}",),
    }
    config = TrainConfig(env="htm_pytorch.envs:htm_pytorch/Ballet-v0").replace(**sizes | changes)
    environments = make_environments(config, 1)
    parts = find("ballet").parts
    assert parts is not None
    return make_agent(config, environments.observation_space, environments.action_space, parts())


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
        return torch.from_numpy(np.stack(rooms))[None]
    pictures = TILES[np.stack(rooms)].swapaxes(2, 3).reshape(-1, 99, 99, 3)
    return torch.from_numpy(pictures)[None]


def make_seen(observation: str, batch: int, length: int) -> Steps:
    """Two dancers somewhere, a word, and a new episode here and there, and in the middle."""
    draw = np.random.default_rng(0)
    rooms = []
    for _ in range(batch * length):
        squares = draw.permutation(81)[:2]
        looks = draw.integers(ballet_tables.FIRST_DANCER, ballet_tables.NUM_SYMBOLS, 2)
        places = [(1 + int(square) // 9, 1 + int(square) % 9) for square in squares]
        rooms.append(room(*zip(places, looks, strict=True)))
    frames = as_frames(observation, rooms)[0].unflatten(0, (batch, length))
    is_first = torch.rand(batch, length) < 0.1
    is_first[:, 0] = is_first[0, length // 2] = True
    return Steps({observation: frames, "instruction": torch.randint(14, (batch, length))}, is_first)


@KINDS
def test_streamed_is_whole(observation: str) -> None:
    """In pieces of any length, asked about any of their steps."""
    agent = make(observation).double()
    seen = make_seen(observation, 2, 17)
    assert seen.is_first[:, 1:].any()
    every = torch.arange(17).expand(2, 17)
    whole, _ = agent(seen, agent.initial_state(2), every)
    assert whole.features.shape == (2, 17, 12)
    assert whole.policy.shape == (2, 17, 8)
    assert whole.values.shape == (2, 17)

    some = torch.tensor([[3, 3, 16], [0, 7, 1]])
    got = agent(seen, agent.initial_state(2), some)[0]
    for name, part, all_parts in zip(got._fields, got, whole, strict=True):
        expected = torch.stack([all_parts[row, some[row]] for row in range(2)])
        assert_near(part, expected, 1e-12, name)

    state, start, pieces = agent.initial_state(2), 0, []
    for length in (1, 5, 1, 2, 8):
        piece = seen.map(lambda part, s=start, n=length: part[:, s : s + n])
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


ENCODERS = {"symbols": SymbolEncoder, "image": TileEncoder}
STAGES = pytest.mark.parametrize("stages", [False, True], ids=["squares", "stages"])


@KINDS
@STAGES
@pytest.mark.parametrize("after", OTHERWISE.values(), ids=OTHERWISE)
def test_encoder_tells_who_stands_where(observation: str, stages: bool, after: np.ndarray) -> None:
    encode = ENCODERS[observation](16, stages)
    one, other = encode(as_frames(observation, [BEFORE, after]))[0]
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@KINDS
@STAGES
def test_encoding_is_of_the_frame_alone(observation: str, stages: bool) -> None:
    encode = ENCODERS[observation](16, stages).double()
    frames = as_frames(observation, [BEFORE, *OTHERWISE.values()])
    together = encode(frames)
    assert together.shape == (1, 7, 16)
    alone = torch.cat([encode(frames[:, step : step + 1]) for step in range(7)], 1)
    assert_near(together, alone, 1e-12)
    assert_near(encode(frames.transpose(0, 1)), together.transpose(0, 1), 1e-12)


@KINDS
def test_a_step_is_the_same_on_every_stage(observation: str) -> None:
    """Where dancers stand, and a step from there; not so without what the squares share."""
    homes = torch.tensor(ballet_tables.DANCER_SQUARES) @ torch.tensor([ballet_tables.BOARD, 1])
    encode = ENCODERS[observation](16, stages=True).double()
    steps = [encode.place(homes + move) - encode.square(homes + move) for move in (0, 1, -11)]
    for shared in steps:
        assert torch.equal(shared, shared[:1].expand_as(shared))
    assert len({tuple(shared[0].tolist()) for shared in steps}) == 3


def test_the_levels_have_the_encoder_that_shares() -> None:
    for name, stages in (("ballet", False), ("ballet-levels", True)):
        task = find(name)
        environments = make_environments(task.config, 1)
        assert task.parts is not None
        encoder = task.parts().encoder
        assert encoder is not None
        made = encoder(environments.observation_space, 12)
        assert isinstance(made, FrameEncoder) and (made.frame.step is not None) == stages


@KINDS
@STAGES
def test_a_frame_without_dancers_can_be_encoded(observation: str, stages: bool) -> None:
    assert ENCODERS[observation](16, stages)(as_frames(observation, [room()])).isfinite().all()


def test_things_of_a_picture_are_its_dancers() -> None:
    """Every shape in every colour, next to each other, as the symbols have them; nothing else."""
    looks = np.arange(ballet_tables.FIRST_DANCER, ballet_tables.NUM_SYMBOLS)
    rooms = [room() for _ in range(-(-len(looks) // 81))]
    for number, look in enumerate(looks):
        where, square = divmod(number, 81)
        rooms[where][1 + square // 9, 1 + square % 9] = look
    encode = TileEncoder(16)
    seen = encode.see(as_frames("image", rooms)[0])
    symbols = torch.from_numpy(np.stack(rooms)).flatten(1).long()
    frame, square = (symbols >= ballet_tables.FIRST_DANCER).nonzero(as_tuple=True)
    assert torch.equal(seen.frame, frame) and torch.equal(seen.square, square)
    tiles = torch.from_numpy(TILES)[symbols[frame, square]].flatten(1) / 255
    assert_near(seen.looks, encode.tile(tiles), 1e-6)
    shades = {ballet_tables.WALL: 40, ballet_tables.AGENT: 255}
    for symbol_, shade in shades.items():
        assert (seen.ground[symbols == symbol_] == torch.tensor(shade) / 255).all()
    assert seen.ground.count_nonzero() == sum((symbols == s).sum() for s in shades)


def _entropy(shades: np.ndarray) -> float:
    """Summed, of bytes as intensities."""
    share = torch.from_numpy(shades).float() / 255
    return nn.functional.binary_cross_entropy(share, share, reduction="sum").item()


@KINDS
def test_reconstruction_can_be_learned(observation: str) -> None:
    """To the least there is: 0, or for pictures the entropy of their shades of grey."""
    agent = make(observation, dim=32)
    frames = as_frames(observation, [BEFORE])
    shown = {observation: frames, "instruction": torch.tensor([[5]])}
    seen = Steps(shown, torch.ones(1, 1, dtype=torch.bool))
    least = 0.0
    if observation == "image":
        least = _entropy(TILES[BEFORE][:, :, 0, 0, 0][BEFORE < ballet_tables.FIRST_DANCER])
        dancers = BEFORE[BEFORE >= ballet_tables.FIRST_DANCER]
        least += _entropy(TILES[dancers]) / ballet_tables.TILE
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        output, _ = agent(seen, agent.initial_state(1), torch.zeros(1, 1, dtype=torch.int64))
        present = {name: part[:, 0] for name, part in shown.items()}
        loss = agent.reconstruction_loss(output.features[:, 0], present)
        losses.append(loss.item() - least)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] >= -1e-4
    assert losses[-1] < 0.02 * losses[0], losses


@KINDS
def test_reconstruction_loss_is_a_mean_over_frames(observation: str) -> None:
    agent = make(observation).double()
    seen = make_seen(observation, 3, 1)
    features = torch.randn(3, 12, dtype=torch.float64)
    shown = {name: part[:, 0] for name, part in seen.observation.items()}
    together = agent.reconstruction_loss(features, shown)
    each = [
        agent.reconstruction_loss(
            features[row, None], {name: part[row, None] for name, part in shown.items()}
        )
        for row in range(3)
    ]
    assert_near(together, torch.stack(each).mean(), 1e-12)


@pytest.mark.parametrize("detach_memories", [False, True])
@KINDS
def test_gradient_flows_through_the_memory_unless_it_is_cut(
    observation: str, detach_memories: bool
) -> None:
    """A window of one step: nothing but the memory leads from an early frame to a late output."""
    agent = make(observation, depth=1, window=1, detach_memories=detach_memories)
    encoded: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        encoded.append(output)

    agent.encoder.register_forward_hook(keep)
    seen = make_seen(observation, 1, 6)
    seen = seen._replace(is_first=torch.zeros_like(seen.is_first))
    output, _ = agent(seen, agent.initial_state(1), torch.tensor([[5]]))
    present = {name: part[:, 5] for name, part in seen.observation.items()}
    agent.reconstruction_loss(output.features[:, 0], present).backward()
    grad = encoded[0].grad
    assert grad is not None
    size = grad[0].abs().amax(-1)
    assert size[5] > 0
    # Steps 0 to 2 are the chunk that is recalled; 3 and 4 wait for theirs to close.
    assert ((size[:3] == 0) if detach_memories else (size[:3] > 0)).all()
    assert (size[3:5] == 0).all()


def test_only_ballets_observations_are_encoded() -> None:
    config = TrainConfig(env="htm_pytorch.envs:htm_pytorch/Ballet-v0").replace(
        observe=("instruction",)
    )
    environments = make_environments(config, 1)
    with pytest.raises(ValueError, match="env: expected Ballet's symbols or image"):
        FrameDecoder(environments.observation_space, 8)
