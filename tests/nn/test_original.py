"""DeepMind's JAX module, recorded, against the layer that `from_haiku` makes of its parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn import from_haiku
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import reference
from tests.helpers import assert_near

DATA = Path(__file__).parent / "data" / "original"
NAMES = ["a_masked", "b_q1", "e_allmask"]
ROOT = "hierarchical_memory_attention/"


class Recording:
    def __init__(self, name: str):
        np = pytest.importorskip("numpy")
        with np.load(DATA / f"{name}.npz") as arrays:
            self.meta = json.loads(str(arrays["meta"]))
            self.arrays = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "meta"}

    def haiku(self, prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): value.numpy()
            for name, value in self.arrays.items()
            if name.startswith(prefix)
        }

    def layer(self, prefix: str = "param/") -> HTMAttention:
        return from_haiku(
            self.haiku(prefix),
            heads=self.meta["H"],
            topk_mems=self.meta["k"],
            add_pos_enc=self.meta["pos"],
        )

    def memory(self, dtype: torch.dtype = torch.float32) -> ChunkedMemory:
        contents = self.arrays["in/contents"].to(dtype)
        return ChunkedMemory.from_chunks(contents, summaries=self.arrays["in/keys"].to(dtype))

    @property
    def mask(self) -> Tensor | None:
        return self.arrays.get("in/mask")

    def legal(self) -> Tensor:
        """[B, Q] how many chunks each query may see."""
        shape = [self.meta[axis] for axis in "BQM"]
        return (torch.ones(shape) if self.mask is None else self.mask).sum(-1)


@pytest.fixture(params=NAMES)
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(request.param)


def test_outputs(recording: Recording) -> None:
    layer, seen = recording.layer(), recording.legal() > 0
    out = layer(recording.arrays["in/queries"], recording.memory(), None, recording.mask)
    assert_near(out[seen], recording.arrays["out"][seen], 1e-5)
    # Where a query may see nothing the original averages chunks that are not legal.
    assert not out[~seen].any()

    queries = recording.arrays["in/queries"].double()
    exact = layer.double()(queries, recording.memory(torch.float64), None, recording.mask)
    assert_near(exact[seen], recording.arrays["out_f64"][seen], 1e-7, "float64")


def test_gradients(recording: Recording) -> None:
    layer, seen = recording.layer(), recording.legal() > 0
    queries = recording.arrays["in/queries"].requires_grad_()
    out = layer(queries, recording.memory(), None, recording.mask)
    out.backward(recording.arrays["in/cotangent"])
    assert queries.grad is not None
    assert_near(queries.grad[seen], recording.arrays["grad_queries"][seen], 1e-4, "queries")
    assert not queries.grad[~seen].any()
    if not seen.all():
        # The recorded gradients of the parameters include what came from illegal chunks.
        return
    # The recorded gradients have the form of parameters, so they can be translated alike.
    recorded = dict(recording.layer("grad/").named_parameters())
    inner = recorded["attn.to_q.weight"].shape[0]
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        expected = recorded[name].detach()
        if name == "attn.to_kv.bias":
            # The key half cancels in the softmax.
            assert expected[:inner].abs().max() < 1e-6 * expected.abs().max()
            assert not parameter.grad[:inner].any()
            assert_near(parameter.grad[inner:], expected[inner:], 1e-4, name)
        else:
            assert_near(parameter.grad, expected, 1e-4, name)


def test_chunks_and_their_weights(recording: Recording) -> None:
    k = recording.meta["k"]
    enough = recording.legal() >= k
    assert enough.any()
    queries = recording.arrays["in/queries"].double()
    layer = recording.layer().double()
    _, recalled = layer.recall(queries, recording.memory(torch.float64), None, recording.mask)
    assert torch.equal(recalled.chunks[enough], recording.arrays["topk_idx"][enough])
    weights = recording.arrays["topk_logits"][enough].softmax(-1)
    assert_near(recalled.chunk_weights[enough], weights, 1e-6)
    few = recording.legal() < k
    assert torch.equal((recalled.chunks >= 0).sum(-1)[few], recording.legal()[few].long())


def haiku_parameters(
    dim: int, dim_memory: int, dim_features: int, inner: int, biases: bool
) -> dict[str, dict[str, Tensor]]:
    """Parameters of the original's form whose sizes all differ."""
    widths = {
        "query": (dim, dim_features),
        "key": (dim_memory, dim_features),
        "within_mem_attn/query": (dim, inner),
        "within_mem_attn/key": (dim_memory, inner),
        "within_mem_attn/value": (dim_memory, inner),
        "within_mem_attn/linear": (inner, dim_features),
    }
    params = {}
    for name, (width_in, width_out) in widths.items():
        params[ROOT + name] = {"w": torch.randn(width_in, width_out, dtype=torch.float64)}
        if biases:
            params[ROOT + name]["b"] = torch.randn(width_out, dtype=torch.float64)
    return params


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no-biases"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
def test_widths_of_query_memory_and_output_may_differ(biases: bool, positions: bool) -> None:
    dim, dim_memory, dim_features, heads, chunk_size = 5, 7, 4, 3, 6
    params = haiku_parameters(dim, dim_memory, dim_features, heads * 2, biases)
    queries = torch.randn(2, 3, dim, dtype=torch.float64)
    contents = torch.randn(2, 8, chunk_size, dim_memory, dtype=torch.float64)
    # DeepMind's chunks come with summaries of any kind, not only means.
    memory = ChunkedMemory.from_chunks(contents, summaries=torch.randn_like(contents[:, :, 0]))
    layer = from_haiku(params, heads=heads, topk_mems=3, add_pos_enc=positions)
    out = layer(queries, memory)

    weights: dict[str, Tensor] = {}
    for part, suffix in {"w": "weight", "b": "bias"}.items():
        if part == "b" and not biases:
            continue
        one = {name.removeprefix(ROOT): module[part].t() for name, module in params.items()}
        weights[f"to_summary_queries.{suffix}"] = one["query"]
        weights[f"to_summary_keys.{suffix}"] = one["key"]
        weights[f"attn.to_q.{suffix}"] = one["within_mem_attn/query"]
        keys_values = [one["within_mem_attn/key"], one["within_mem_attn/value"]]
        weights[f"attn.to_kv.{suffix}"] = torch.cat(keys_values)
        weights[f"attn.to_out.{suffix}"] = one["within_mem_attn/linear"]
    table = sinusoid(chunk_size, dim_memory, torch.float64, queries.device) if positions else None
    expected = reference.htm_attention(queries, memory, weights, heads=heads, k=3, positions=table)
    assert out.shape == (2, 3, dim_features)
    assert_near(out, expected, 1e-10)


def test_nested_and_flat_mappings_are_the_same_layer() -> None:
    nested = haiku_parameters(6, 6, 6, 4, True)
    flat = {f"{module}:{name}": w for module, part in nested.items() for name, w in part.items()}
    states = [from_haiku(p, heads=2, topk_mems=1).state_dict() for p in (nested, flat)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_layer_does_not_share_the_arrays_it_was_made_from() -> None:
    params = haiku_parameters(6, 6, 6, 4, True)
    layer = from_haiku(params, heads=2, topk_mems=1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for module in params.values():
        for value in module.values():
            value.zero_()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_biases_that_only_some_modules_have_are_zero_in_the_others() -> None:
    params = haiku_parameters(6, 5, 4, 6, False)
    params[ROOT + "key"]["b"] = torch.randn(4, dtype=torch.float64)
    params[ROOT + "within_mem_attn/value"]["b"] = torch.randn(6, dtype=torch.float64)
    state = from_haiku(params, heads=3, topk_mems=1).state_dict()
    assert torch.equal(state["to_summary_keys.bias"], params[ROOT + "key"]["b"])
    assert not state["to_summary_queries.bias"].any()
    assert torch.equal(state["attn.to_kv.bias"][6:], params[ROOT + "within_mem_attn/value"]["b"])
    assert not state["attn.to_kv.bias"][:6].any()
    assert not state["attn.to_q.bias"].any()
    assert not state["attn.to_out.bias"].any()


def test_errors_name_what_is_wrong() -> None:
    params = haiku_parameters(6, 5, 4, 6, True)

    def make(changed: dict[str, Any], heads: int = 3) -> HTMAttention:
        return from_haiku(changed, heads=heads, topk_mems=2)

    assert make(params).dim_memory == 5
    without = {name: part for name, part in params.items() if name != ROOT + "key"}
    with pytest.raises(ValueError, match=r"missing \['hierarchical_memory_attention/key:w'\]"):
        make(without)
    with pytest.raises(ValueError, match=r"unknown \['linear:w'\]"):
        make(params | {"linear": {"w": torch.ones(2, 2)}})
    with pytest.raises(ValueError, match="heads: expected a divisor of the inner width 6, got 4"):
        make(params, heads=4)
    with pytest.raises(ValueError, match="heads: expected an integer >= 1, got 0"):
        make(params, heads=0)
    narrow = {**params[ROOT + "key"], "w": torch.ones(5, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"params: [\s\S]*to_summary_keys"):
        make(params | {ROOT + "key": narrow})
    with pytest.raises(ValueError, match=r"params: expected .* got \[\[5, 6\], \[4, 6\]\]"):
        values = {**params[ROOT + "within_mem_attn/value"], "w": torch.ones(4, 6)}
        make(params | {ROOT + "within_mem_attn/value": values})
    with pytest.raises(ValueError, match=r"query:w'\]: expected shape \[in, out\], got \[6\]"):
        make(params | {ROOT + "within_mem_attn/query": {"w": torch.ones(6)}})
    with pytest.raises(ValueError, match=r"query:w'\]: expected dtype floating point"):
        make(params | {ROOT + "query": {"w": torch.ones(6, 4, dtype=torch.int64)}})
