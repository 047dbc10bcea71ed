"""The package `htm-pytorch` 0.0.4, recorded: its checkpoints load and mean what they meant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htm_pytorch import HTMAttention, HTMBlock
from tests.helpers import assert_near

np = pytest.importorskip("numpy")

RECORDINGS = sorted((Path(__file__).parent / "data" / "published").glob("*.npz"))


class Recording:
    def __init__(self, path: Path):
        with np.load(path) as arrays:
            self.meta = json.loads(str(arrays["meta"]))
            self.arrays = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "meta"}

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def build(self) -> nn.Module:
        arguments: dict[str, Any] = {
            k: v for k, v in self.meta.items() if k not in ("block", "seed")
        }
        if self.meta["block"]:
            return HTMBlock(**arguments, residual="normed")
        return HTMAttention(**arguments)


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(request.param)


def test_recordings_are_there() -> None:
    assert {path.stem for path in RECORDINGS} == {
        "block",
        "masked_ragged",
        "no_positions",
        "plain",
    }


def test_output_and_every_gradient(recording: Recording) -> None:
    layer = recording.build()
    layer.load_state_dict(recording.named("param/"))
    queries = recording.arrays["in/queries"].requires_grad_()
    out = layer(queries, recording.arrays["in/memories"], mask=recording.arrays.get("in/mask"))
    assert_near(out, recording.arrays["out"], 1e-5, "out")

    out.backward(recording.arrays["cotangent"])
    assert queries.grad is not None
    assert_near(queries.grad, recording.arrays["grad_queries"], 1e-5, "queries")
    recorded = recording.named("grad/")
    assert recorded.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("to_summary_keys.bias"):
            # It cancels in the softmax: the recording holds the rounding errors of a zero.
            assert recorded[name].abs().max() < 1e-6
            assert not parameter.grad.any()
        else:
            assert_near(parameter.grad, recorded[name], 1e-5, name)


def test_checkpoint_loads_by_name_with_the_buffer_it_was_saved_with(recording: Recording) -> None:
    layer = recording.build()
    saved = recording.named("param/") | recording.named("buffer/")
    assert len(recording.named("buffer/")) == recording.meta["add_pos_enc"]
    layer.load_state_dict(saved, strict=True)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, saved.pop(name)), name
    assert saved.keys() == recording.named("buffer/").keys()


def test_buffer_is_dropped_at_any_depth_and_nothing_else_is() -> None:
    published = Recording(RECORDINGS[0].with_stem("plain"))
    model = nn.Sequential(nn.Identity(), published.build())
    saved = {f"1.{name}": value for name, value in published.named("param/").items()}
    saved["1.pos_emb.inv_freqs"] = torch.ones(16)
    model.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*1\.pos_emb\.other"):
        model.load_state_dict(saved | {"1.pos_emb.other": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*1\.attn\.to_q\.weight"):
        model.load_state_dict({k: v for k, v in saved.items() if k != "1.attn.to_q.weight"})
