"""Encoders and decoders of all spaces of observations."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from htm_pytorch.rl.observations import as_tensor, leaves, make_decoder, make_encoder, nested
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITLESS = float("inf")
SPACES: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-1, 1, (5,), np.float64),
    "vector without bounds": spaces.Box(-LIMITLESS, LIMITLESS, (5,), np.float32),
    "one number": spaces.Box(-1, 1, (), np.float32),
    "long vector of bytes": spaces.Box(0, 255, (128,), np.uint8),
    "picture": spaces.Box(0, 255, (40, 33, 3), np.uint8),
    "picture, channels first": spaces.Box(0, 255, (1, 40, 33), np.uint8),
    "stack of pictures": spaces.Box(0, 255, (4, 40, 33, 3), np.uint8),
    "stack of grey pictures": spaces.Box(0, 255, (4, 84, 84), np.uint8),
    "board": spaces.Box(0, 10, (7, 6), np.int64),
    "board of layers": spaces.Box(0, 255, (7, 7, 3), np.uint8),
    "large numbers": spaces.Box(0, 300, (11, 11), np.uint16),
    "choice": spaces.Discrete(4),
    "choice from 3": spaces.Discrete(4, start=3),
    "choices": spaces.MultiDiscrete([3, 2]),
    "switches": spaces.MultiBinary(6),
    "parts": spaces.Dict(
        {
            "where": spaces.Box(-1, 1, (2,), np.float32),
            "what": spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)]),
        }
    ),
}
each = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def samples(space: spaces.Space[Any], rows: int, length: int) -> Any:
    """[rows, length, ...], as an environment shows them."""
    batched = batch_space(space, rows * length)
    batched.seed(0)

    def cut(part: Any) -> torch.Tensor:
        return as_tensor(part).unflatten(0, (rows, length))

    return nested(cut, _plain(batched.sample()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


@each
def test_an_encoding_is_of_the_step_alone_and_tells_it_from_others(space: Any) -> None:
    encoder = make_encoder(space, 16).double()
    for name, buffer in encoder.named_buffers():
        assert buffer.device.type == "cpu", name
    seen = samples(space, 2, 5)
    encoded = encoder(seen)
    assert encoded.shape == (2, 5, 16)
    alone = torch.cat([encoder(nested(lambda p, t=t: p[:, t : t + 1], seen)) for t in range(5)], 1)
    assert_near(encoded, alone, 1e-12)
    flat = encoded.flatten(0, 1)
    parts = [part.reshape(10, -1).double() for part in leaves(seen)]
    shown = torch.cat(parts, 1)
    for one in range(1, 10):
        is_same = bool((shown[0] == shown[one]).all())
        assert torch.allclose(flat[0], flat[one], atol=1e-9) == is_same


@each
def test_what_is_seen_can_be_learned_to_be_told(space: Any) -> None:
    torch.manual_seed(0)
    encoder, decoder = make_encoder(space, 32), make_decoder(space, 32)
    # Dark: pictures of noise have an entropy that nothing takes away.
    seen = nested(lambda p: p // 16 if p.dtype == torch.uint8 else p, samples(space, 3, 1))
    shown = nested(lambda part: part[:, 0], seen)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
    losses = []
    for _ in range(30):
        loss: Any = decoder.loss(encoder(seen)[:, 0], shown)  # pyright: ignore[reportCallIssue]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], losses


@each
def test_a_decoders_loss_is_a_mean_over_steps(space: Any) -> None:
    decoder = make_decoder(space, 16).double()
    shown = nested(lambda part: part[:, 0], samples(space, 3, 1))
    features = torch.randn(3, 16, dtype=torch.float64)
    together: Any = decoder.loss(features, shown)  # pyright: ignore[reportCallIssue]
    alone = [
        decoder.loss(features[row, None], nested(lambda p, r=row: p[r, None], shown))  # pyright: ignore[reportCallIssue]
        for row in range(3)
    ]
    assert_near(together, torch.stack(alone).mean(), 1e-12)


@pytest.mark.parametrize(
    ("space", "place"),
    [
        (spaces.Text(5), ""),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Text(5)})}), " at a.b"),
        (spaces.Tuple([spaces.Discrete(2), spaces.Sequence(spaces.Discrete(2))]), r" at \[1\]"),
    ],
    ids=["text", "text inside", "sequence inside"],
)
def test_other_spaces_are_refused_in_a_sentence(space: Any, place: str) -> None:
    for make in (make_encoder, make_decoder):
        with pytest.raises(
            ValueError, match=f"^env: expected observations of .*{place}; --observe"
        ):
            make(space, 8)


@pytest.mark.parametrize("largest", [9, 40_000])
def test_integers_keep_their_values(largest: int) -> None:
    for kind in (np.uint16, np.uint32, np.uint64, np.int8, np.int64):
        value = largest % (np.iinfo(kind).max + 1)
        assert as_tensor(np.array([value], kind)).long().tolist() == [value]
