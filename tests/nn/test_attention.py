"""The contract of `HTMAttention` and `HTMBlock`: each test changes what must not matter."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import htm_pytorch
from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import Impl, reference
from tests.helpers import (
    assert_near,
    leaf,
    normal,
    on_cpu,
    relative_error,
    rounding,
    value_and_gradients,
)

IMPLS = on_cpu(Impl)


def build(kind: Any = HTMAttention, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    sizes = {"dim": 6, "heads": 2, "topk_mems": 2, "mem_chunk_size": 4, "dim_head": 3}
    return kind(**(sizes | changes)).to(dtype)


def gradients_of(layer: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def plain(
    layer: HTMAttention, queries: Tensor, memories: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The layer's output in the paper's order, computed in the dtype of the parameters."""
    memory = ChunkedMemory.from_steps(
        memories, layer.mem_chunk_size, mask, borders="newest", eps=layer.eps
    )
    positions = None
    if layer.add_pos_enc:
        positions = sinusoid(memory.chunk_size, memory.dim, memories.dtype, memories.device)
    weights = dict(layer.named_parameters())
    heads, k = layer.attn.heads, layer.topk_mems
    return reference.htm_attention(queries, memory, weights, heads=heads, k=k, positions=positions)


class TestWhatMustNotMatter:
    """Values and gradients stay equal to the last bit, and no gradient goes to what is unseen."""

    @staticmethod
    def check(run: Callable[[Tensor, Tensor], Tensor], unseen: Tensor) -> None:
        """Compare `run(queries, memories)` with two fillings of the `unseen` entries."""
        queries, memories = normal(2, 5, 6), normal(2, *unseen.shape[1:])
        for filling in (1e3, float("nan")):
            changed = memories.clone()
            changed[unseen] = filling
            value, gradients = value_and_gradients(run, [queries, memories])
            again, gradients_again = value_and_gradients(run, [queries, changed])
            assert torch.equal(value, again)
            assert value.any()
            for got, wanted in zip(gradients_again, gradients, strict=True):
                assert torch.equal(got, wanted)
                assert got.any()
            assert not gradients[1][unseen].any()

    @pytest.mark.parametrize("length", [16, 18], ids=["whole-chunks", "ragged"])
    def test_masked_steps(self, length: int) -> None:
        layer = build(detach_memories=False)
        mask = torch.rand(2, length) < 0.6
        # A chunk without any step, too.
        mask[0, -4:] = False
        unseen = ~mask[..., None].expand(-1, -1, 6)
        self.check(lambda q, m: layer(q, m, mask), unseen)

    def test_chunks_that_the_query_is_forbidden(self) -> None:
        layer = build(detach_memories=False)
        allowed = torch.ones(2, 5, 4, dtype=torch.bool)
        allowed[0, :, 1] = allowed[1, :, 3] = False
        unseen = torch.zeros(2, 4, 4, 6, dtype=torch.bool)
        unseen[0, 1] = unseen[1, 3] = True
        self.check(lambda q, m: layer(q, m, None, allowed), unseen.flatten(1, 2))

    def test_chunks_that_only_other_queries_may_see(self) -> None:
        layer = build(topk_mems=4)
        queries, memories = normal(2, 5, 6), normal(2, 16, 6)
        allowed = torch.ones(2, 5, 4, dtype=torch.bool)
        allowed[:, :2, 1] = False
        changed = memories.clone()
        changed[:, 4:8] += 1.0
        out, again = (layer(queries, m, None, allowed) for m in (memories, changed))
        assert torch.equal(out[:, :2], again[:, :2])
        assert (out[:, 2:] != again[:, 2:]).any(-1).all()

    def test_evicted_chunks_and_steps_of_the_open_chunk(self) -> None:
        layer = build(detach_memories=False)

        def run(queries: Tensor, steps: Tensor) -> Tensor:
            memory = ChunkedMemory.empty(2, 3, 4, 6, dtype=torch.float64)
            return layer(queries, memory.append(steps))

        # 5 chunks and 2 steps go into a ring of 3 chunks.
        unseen = torch.zeros(2, 22, 6, dtype=torch.bool)
        unseen[:, :8] = unseen[:, 20:] = True
        self.check(run, unseen)

    def test_earlier_episodes(self) -> None:
        layer = build(detach_memories=False)
        is_first = torch.zeros(2, 22, dtype=torch.bool)
        is_first[0, 6] = is_first[1, 9] = True
        unseen = torch.zeros(2, 22, 6, dtype=torch.bool)
        unseen[0, :6] = unseen[1, :9] = True
        # Then the open chunk: row 0 has closed 4 chunks, row 1 has closed 3.
        unseen[1, 21:] = True

        def run(queries: Tensor, steps: Tensor) -> Tensor:
            memory = ChunkedMemory.empty(2, 5, 4, 6, dtype=torch.float64)
            return layer(queries, memory.append(steps, is_first))

        self.check(run, unseen)

    def test_other_rows(self) -> None:
        layer = build(detach_memories=False)
        inputs = [normal(2, 5, 6), normal(2, 18, 6)]
        changed = [part.clone() for part in inputs]
        for part in changed:
            part[1] = float("nan")
        value, gradients = value_and_gradients(layer, inputs)
        again, gradients_again = value_and_gradients(layer, changed)
        # Not the same bits: how many chunks all rows pick is the shape of a matrix product.
        assert_near(again[0], value[0], 1e-14)
        assert again[1].isnan().all()
        for got, wanted in zip(gradients_again, gradients, strict=True):
            assert_near(got[0], wanted[0], 1e-13)

    def test_other_queries(self) -> None:
        layer = build()
        queries, memories = normal(2, 5, 6), normal(2, 18, 6)
        out = layer(queries, memories)
        changed = queries.clone()
        changed[:, 3] += 1.0
        others = [0, 1, 2, 4]
        again = layer(changed, memories)
        assert_near(again[:, others], out[:, others], 1e-14)
        assert (again[:, 3] != out[:, 3]).all()
        assert_near(layer(queries[:, 3:4], memories), out[:, 3:4], 1e-14)

    @pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "mask"])
    @pytest.mark.parametrize("padding", [2, 6], ids=["filling-a-chunk", "and-a-chunk-more"])
    def test_padding_of_ragged_lengths(self, masked: bool, padding: int) -> None:
        # eps changes summaries under a mask, on purpose; without it, masks say nothing but what
        # exists.
        layer = build(eps=0.0)
        queries, memories = normal(2, 5, 6), normal(2, 18, 6)
        mask = torch.rand(2, 18) < 0.7 if masked else None
        exists = torch.ones(2, 18, dtype=torch.bool) if mask is None else mask
        garbage = torch.full((2, padding, 6), float("nan"), dtype=torch.float64)
        padded = torch.cat([garbage, memories], 1)
        padded_mask = torch.cat([torch.zeros(2, padding, dtype=torch.bool), exists], 1)
        out = layer(queries, memories, mask)
        assert_near(layer(queries, padded, padded_mask), out, 1e-12)

    def test_order_of_chunks_but_not_of_steps(self) -> None:
        layer = build()
        queries, contents = normal(2, 5, 6), normal(2, 7, 4, 6)
        out = layer(queries, ChunkedMemory.from_chunks(contents))
        shuffled = ChunkedMemory.from_chunks(contents[:, torch.randperm(7)])
        assert_near(layer(queries, shuffled), out, 1e-13)
        reversed_steps = ChunkedMemory.from_chunks(contents.flip(2))
        assert relative_error(layer(queries, reversed_steps), out) > 1e-3
        without = build(add_pos_enc=False)
        out = without(queries, ChunkedMemory.from_chunks(contents))
        assert_near(without(queries, reversed_steps), out, 1e-12)


class TestChunkBorders:
    def test_of_a_tensor_count_from_the_newest_end(self) -> None:
        layer = build()
        queries, memories = normal(2, 5, 6), normal(2, 18, 6)
        for chunk in range(1, 5):
            only = torch.zeros(2, 5, 5, dtype=torch.bool)
            only[..., chunk] = True
            steps = memories[:, 4 * chunk - 2 : 4 * chunk + 2]
            assert_near(layer(queries, memories, None, only), layer(queries, steps), 1e-13)
        only = torch.zeros(2, 5, 5, dtype=torch.bool)
        only[..., 0] = True
        oldest = layer(queries, memories, None, only)
        assert_near(oldest, layer(queries, memories[:, :2]), 1e-13)

    def test_of_a_memory_count_from_the_oldest_end(self) -> None:
        layer = build()
        queries, steps = normal(2, 5, 6), normal(2, 18, 6)
        memory = ChunkedMemory.empty(2, 4, 4, 6, dtype=torch.float64).append(steps)
        for chunk in range(4):
            only = torch.zeros(2, 5, 4, dtype=torch.bool)
            only[..., chunk] = True
            alone = layer(queries, steps[:, 4 * chunk : 4 * chunk + 4])
            assert_near(layer(queries, memory, None, only), alone, 1e-13)


def blind_calls() -> dict[str, tuple[Any, Tensor | None, Tensor | None]]:
    whole = normal(2, 18, 6)
    return {
        "forbidden": (whole, None, torch.zeros(2, 5, 5, dtype=torch.bool)),
        "masked": (whole, torch.zeros(2, 18, dtype=torch.bool), None),
        "masked-and-forbidden": (
            whole,
            torch.arange(18).expand(2, 18) < 6,
            (torch.arange(5) > 1).expand(2, 5, 5),
        ),
        "no-steps": (whole[:, :0], None, None),
        "no-steps-shared": (whole[:1, :0], None, None),
        "no-steps-with-masks": (
            whole[:, :0],
            torch.ones(2, 0, dtype=torch.bool),
            torch.ones(2, 5, 0, dtype=torch.bool),
        ),
        "empty-ring": (ChunkedMemory.empty(2, 3, 4, 6, dtype=torch.float64), None, None),
        "open-chunk-only": (
            ChunkedMemory.empty(2, 3, 4, 6, dtype=torch.float64).append(whole[:, :3]),
            None,
            None,
        ),
        "reset": (
            ChunkedMemory.from_chunks(whole[:, :16].unflatten(1, (4, 4))).reset(
                torch.ones(2, dtype=torch.bool)
            ),
            None,
            None,
        ),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", blind_calls())
def test_nothing_to_see_gives_exactly_zeros(name: str, impl: Any) -> None:
    memories, mask, chunk_mask = blind_calls()[name]
    queries = normal(2, 5, 6).requires_grad_()
    layer = build(inner_bias=True, impl=impl)
    out = layer(queries, memories, mask, chunk_mask)
    assert out.shape == (2, 5, 6)
    assert not out.any()
    out.backward(normal(2, 5, 6))
    for parameter, gradient in gradients_of(layer).items():
        assert not gradient.any(), parameter
    assert queries.grad is not None
    assert not queries.grad.any()

    block = build(HTMBlock, inner_bias=True, impl=impl)
    assert torch.equal(block(queries, memories, mask, chunk_mask), queries)
    normed = build(HTMBlock, residual="normed", inner_bias=True, impl=impl)
    assert torch.equal(normed(queries, memories, mask, chunk_mask), normed.norm(queries))


def test_only_the_queries_that_see_nothing_get_zeros() -> None:
    layer = build(inner_bias=True)
    queries, memories = normal(2, 5, 6), normal(2, 16, 6)
    chunk_mask = torch.rand(2, 5, 4) < 0.7
    chunk_mask[0, 2] = chunk_mask[1, 0] = False
    blind = ~chunk_mask.any(-1)
    out = layer(queries, memories, None, chunk_mask)
    assert not out[blind].any()
    assert out[~blind].all()
    # Which other queries stand beside them does not matter.
    opened = chunk_mask.clone()
    opened[blind] = True
    assert_near(layer(queries, memories, None, opened)[~blind], out[~blind], 1e-14)
    # A row without any step: the other row is as if alone.
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0] = False
    out = layer(queries, memories, mask)
    assert not out[0].any()
    assert_near(out[1], layer(queries[1:], memories[1:], mask[1:])[0], 1e-13)


def test_k_is_clamped_to_the_chunks_there_are() -> None:
    layer = build(topk_mems=5)
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    out = layer(queries, memories)
    layer.topk_mems = 100
    assert torch.equal(layer(queries, memories), out)
    # And for each query alone: a forbidden chunk never fills a place.
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[:, :, 2:] = False
    two = layer(queries, memories, None, mask)
    layer.topk_mems = 2
    assert_near(layer(queries, memories, None, mask), two, 1e-13)
    assert_near(layer(queries, memories[:, :6]), two, 1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_memory_of_batch_1_is_shared(impl: Any) -> None:
    layer = build(impl=impl, detach_memories=False)
    queries, memories = normal(3, 5, 6), normal(1, 18, 6)
    mask, chunk_mask = torch.rand(1, 18) < 0.8, torch.rand(3, 5, 5) < 0.8

    def shared(queries: Tensor, memories: Tensor) -> Tensor:
        return layer(queries, memories, mask, chunk_mask)

    def repeated(queries: Tensor, memories: Tensor) -> Tensor:
        return layer(queries, memories.repeat(3, 1, 1), mask.repeat(3, 1), chunk_mask)

    value, gradients = value_and_gradients(shared, [queries, memories])
    expected, expected_gradients = value_and_gradients(repeated, [queries, memories])
    assert_near(value, expected, 1e-13)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert_near(got, wanted, 1e-12)
    memory = ChunkedMemory.from_steps(memories, 4, mask, borders="newest", eps=layer.eps)
    assert_near(layer(queries, memory, None, chunk_mask), value, 1e-13)


def test_chunk_size_of_a_memory_is_its_own() -> None:
    layer = build(mem_chunk_size=4)
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    memory = ChunkedMemory.from_steps(memories, 3, borders="newest")
    other = copy.deepcopy(layer)
    other.mem_chunk_size = 3
    assert_near(layer(queries, memory), other(queries, memories), 1e-13)


def test_no_queries() -> None:
    layer = build()
    out = layer(normal(2, 0, 6), normal(2, 18, 6))
    assert out.shape == (2, 0, 6)
    out.sum().backward()
    assert not any(gradient.any() for gradient in gradients_of(layer).values())


def test_an_empty_batch() -> None:
    layer = build()
    assert layer(normal(0, 5, 6), normal(0, 18, 6)).shape == (0, 5, 6)
    assert layer(normal(0, 5, 6), normal(1, 18, 6)).shape == (0, 5, 6)


@pytest.mark.parametrize("dim", [1, 5, 7])
def test_odd_widths_have_positions(dim: int) -> None:
    layer = build(dim=dim)
    queries, memories = normal(2, 5, dim), normal(2, 16, dim)
    assert_near(layer(queries, memories), plain(layer, queries, memories), 1e-10)


def test_block_adds_its_input_or_the_normed_input() -> None:
    block = build(HTMBlock)
    nn.init.normal_(block.norm.weight)
    normed = build(HTMBlock, residual="normed")
    normed.load_state_dict(block.state_dict())
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    inside = block.norm(queries)
    attended = block.attn(inside, memories)
    assert torch.equal(block(queries, memories), queries + attended)
    assert torch.equal(normed(queries, memories), inside + attended)


@pytest.mark.parametrize("kind", [HTMAttention, HTMBlock])
def test_recall_is_returned_on_request_and_changes_nothing(kind: Any) -> None:
    layer = build(kind, topk_mems=3)
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    mask, chunk_mask = torch.rand(2, 18) < 0.8, torch.rand(2, 5, 5) < 0.6
    out = layer(queries, memories, mask, chunk_mask)
    again, recalled = layer.recall(queries, memories, mask, chunk_mask)
    assert_near(again, out, 1e-13)
    assert recalled.chunks.shape == recalled.chunk_weights.shape == (2, 5, 3)
    assert recalled.step_weights.shape == (2, 5, 2, 3, 4)

    attention = layer.attn if kind is HTMBlock else layer
    inside = layer.norm(queries) if kind is HTMBlock else queries
    memory = ChunkedMemory.from_steps(memories, 4, mask, borders="newest", eps=attention.eps)
    keys = attention.to_summary_keys(memory.summaries)
    scores = attention.to_summary_queries(inside) @ keys.mT / 6**0.5
    scores = scores.masked_fill(~(chunk_mask & memory.valid[:, None]), -torch.inf)
    top, chunks = scores.topk(3)
    assert torch.equal(recalled.chunks, chunks.masked_fill(top.isneginf(), -1))
    assert_near(recalled.chunk_weights, top.softmax(-1).nan_to_num(0.0), 1e-12)


def test_readme_attention() -> None:
    attn = HTMAttention(
        dim=512, heads=8, dim_head=64, topk_mems=8, mem_chunk_size=32, add_pos_enc=True
    )
    queries = torch.randn(1, 128, 512)
    memories = torch.randn(1, 20000, 512)
    mask = torch.ones(1, 20000).bool()
    with torch.no_grad():
        attended = attn(queries, memories, mask=mask)
        assert attended.shape == (1, 128, 512)
        some = slice(0, 128, 32)
        expected = plain(attn, queries[:, some], memories, mask)
    # Both orders of the same sums in float32, over 512 features.
    assert_near(attended[:, some], expected, 64 * torch.finfo(torch.float32).eps)


def test_readme_block() -> None:
    block = HTMBlock(dim=512, topk_mems=8, mem_chunk_size=32)
    queries = torch.randn(1, 128, 512)
    memories = torch.randn(1, 20000, 512)
    mask = torch.ones(1, 20000).bool()
    with torch.no_grad():
        out = block(queries, memories, mask=mask)
        assert out.shape == (1, 128, 512)
        some = slice(0, 128, 32)
        normed = block.norm(queries[:, some])
        expected = queries[:, some] + plain(block.attn, normed, memories, mask)
    assert_near(out[:, some], expected, 64 * torch.finfo(torch.float32).eps)


def low_precision_problem(
    dtype: torch.dtype,
) -> tuple[HTMAttention, HTMAttention, Tensor, Tensor]:
    """A layer, its double, and inputs that `dtype` holds exactly, whose best chunks are clear."""
    low = build(dtype=dtype, dim=16, dim_head=8, mem_chunk_size=8, topk_mems=2)
    exact = copy.deepcopy(low).double()
    contents = torch.randn(2, 6, 8, 16) + 3 * torch.randn(2, 6, 1, 16)
    memories = contents.flatten(1, 2).to(dtype)
    queries = torch.randn(2, 64, 16).to(dtype)
    # Those whose best chunks are furthest apart: rounding does not change which are kept.
    summaries = ChunkedMemory.from_steps(memories.double(), 8, borders="newest").summaries
    scores = exact.to_summary_queries(queries.double()) @ exact.to_summary_keys(summaries).mT
    gaps = -scores.topk(3).values.diff(dim=-1).amax(-1)
    clear = gaps.topk(7).indices[..., None].expand(-1, -1, 16)
    return low, exact, queries.gather(1, clear), memories


def assert_as_accurate(
    layer: HTMAttention,
    exact: HTMAttention,
    plain_layer: HTMAttention,
    queries: Tensor,
    memories: Tensor,
) -> None:
    """Output and gradients err little more than twice the paper's order in the low dtype."""
    true = exact(queries.double(), memories.double())
    cotangent = torch.randn_like(true)
    true.backward(cotangent)
    out, recalled = layer.recall(queries, memories)
    _, true_recalled = exact.recall(queries.double(), memories.double())
    assert torch.equal(recalled.chunks, true_recalled.chunks)
    out = layer(queries, memories)
    out.backward(cotangent.to(out.dtype))
    low_dtype = plain_layer.to_summary_queries.weight.dtype
    rounded = plain(plain_layer, queries.to(low_dtype), memories.to(low_dtype))
    rounded.backward(cotangent.to(low_dtype))
    assert out.dtype == low_dtype
    unit = torch.finfo(low_dtype).eps
    chance = rounding(low_dtype)
    error = relative_error(rounded, true)
    assert error < 16 * unit
    assert relative_error(out, true) <= 2 * max(error, unit) + chance
    got, low, wanted = gradients_of(layer), gradients_of(plain_layer), gradients_of(exact)
    for name, value in wanted.items():
        if name == "to_summary_keys.bias":
            assert not got[name].any()
            continue
        allowed = 2 * max(relative_error(low[name], value), 4 * unit) + chance
        assert relative_error(got[name], value) <= allowed, name


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    low, exact, queries, memories = low_precision_problem(dtype)
    assert_as_accurate(low, exact, copy.deepcopy(low), queries, memories)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    low, exact, queries, memories = low_precision_problem(dtype)
    layer = copy.deepcopy(low).float()

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **options: Any) -> Any:
            with torch.autocast("cpu", dtype=dtype):
                return self.layer(*args, **options)

        def recall(self, *args: Any) -> Any:
            with torch.autocast("cpu", dtype=dtype):
                return self.layer.recall(*args)

        def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
            return self.layer.named_parameters()

    wrapped: Any = Autocast()
    assert_as_accurate(wrapped, exact, low, queries.float(), memories.float())
    # In a mixed model, queries come out of an autocast layer and the memory does not, or both.
    with torch.autocast("cpu", dtype=dtype):
        out = layer(queries.float(), memories.float())
        for q, m in [(queries, memories), (queries, memories.float())]:
            assert_near(layer(q, m), out.float(), 4 * torch.finfo(dtype).eps)
        block = HTMBlock(16).eval()
        assert block(queries.float(), memories.float()).dtype == torch.float32


def test_constructor_and_call_are_those_of_the_published_package() -> None:
    # By position, too: dim, heads, topk_mems, mem_chunk_size, dim_head, add_pos_enc, eps.
    layer = HTMAttention(24, 3, 5, 7, 10, False, 0.25)
    assert layer.to_summary_queries.weight.shape == (24, 24)
    assert layer.attn.to_q.weight.shape == (30, 24)
    assert layer.attn.heads == 3
    assert (layer.topk_mems, layer.mem_chunk_size, layer.add_pos_enc, layer.eps) == (
        5,
        7,
        False,
        0.25,
    )
    assert HTMAttention(24).attn.heads == 8
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "to_summary_queries.weight": [24, 24],
        "to_summary_queries.bias": [24],
        "to_summary_keys.weight": [24, 24],
        "to_summary_keys.bias": [24],
        "attn.to_q.weight": [30, 24],
        "attn.to_kv.weight": [60, 24],
        "attn.to_out.weight": [24, 30],
        "attn.to_out.bias": [24],
    }
    block = HTMBlock(24, 3, 5, 7, 10, False, 0.25)
    assert block.attn.mem_chunk_size == 7
    inside = {f"attn.{name}" for name in shapes}
    assert block.state_dict().keys() == inside | {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", [HTMAttention, HTMBlock])
def test_copies_work_and_stand_alone(kind: Any, copied: Any) -> None:
    layer = build(kind)
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    out = layer(queries, memories)
    other = copied(layer)
    assert torch.equal(other(queries, memories), out)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(queries, memories), out)
    saved = {"pos_emb.inv_freqs" if kind is HTMAttention else "attn.pos_emb.inv_freqs": None}
    other.load_state_dict(layer.state_dict() | saved)
    assert torch.equal(other(queries, memories), out)


@pytest.mark.parametrize("inner_bias", [False, True])
def test_every_parameter_gets_a_gradient(inner_bias: bool) -> None:
    layer = build(inner_bias=inner_bias)
    layer(normal(2, 5, 6), normal(2, 18, 6)).square().sum().backward()
    for name, gradient in gradients_of(layer).items():
        # Biases of keys cancel in a softmax: zero, but there, since DDP waits for them.
        assert gradient.any() == (name != "to_summary_keys.bias"), name
        if name == "attn.to_kv.bias":
            assert not gradient.chunk(2)[0].any()
            assert gradient.chunk(2)[1].all()


def test_memory_gets_gradients_only_when_asked() -> None:
    queries, memories = normal(2, 5, 6), normal(2, 18, 6).requires_grad_()
    build()(queries, memories).sum().backward()
    assert memories.grad is None
    memory = ChunkedMemory.from_steps(memories, 4)
    build()(queries.requires_grad_(), memory).sum().backward()
    assert memories.grad is None
    build(detach_memories=False)(queries, memory).sum().backward()
    assert memories.grad is not None
    assert memories.grad.any(-1).any()


def test_used_twice_in_one_graph() -> None:
    layer = build()
    queries, memories = normal(2, 5, 6), normal(2, 18, 6)
    first, second = normal(2, 5, 6), normal(2, 5, 6)
    layer(layer(queries, memories), memories).backward(first)
    twice = {name: gradient.clone() for name, gradient in gradients_of(layer).items()}

    # As two layers with equal weights, whose gradients add up.
    inner, outer = copy.deepcopy(layer), copy.deepcopy(layer)
    for part in (inner, outer):
        part.zero_grad()
    outer(inner(queries, memories), memories).backward(first)
    for name, gradient in twice.items():
        expected = gradients_of(inner)[name] + gradients_of(outer)[name]
        assert_near(gradient, expected, 1e-12, name)

    layer.zero_grad()
    pair = layer(queries, memories), layer(queries.flip(1), memories)
    torch.autograd.backward(pair, (first, second))
    together = {name: gradient.clone() for name, gradient in gradients_of(layer).items()}
    layer.zero_grad()
    layer(queries, memories).backward(first)
    layer(queries.flip(1), memories).backward(second)
    for name, gradient in gradients_of(layer).items():
        assert_near(gradient, together[name], 1e-12, name)


class TestFunctionalTransforms:
    UNABLE = ("blocked", "native", "projected")
    IMPLS = tuple(impl for impl in IMPLS if impl not in ("blocked", "native", "projected"))

    @pytest.mark.parametrize("impl", UNABLE)
    def test_an_implementation_that_cannot_says_so(self, impl: Any) -> None:
        layer, memories = build(impl=impl), normal(2, 18, 6)
        with pytest.raises(ValueError, match="impl: expected .* under a torch.func transform"):
            torch.vmap(layer, in_dims=(0, None))(normal(3, 2, 5, 6), memories)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_grad_of_functional_call(self, impl: Any) -> None:
        layer = build(inner_bias=True, impl=impl)
        queries, memories, cotangent = normal(2, 5, 6), normal(2, 18, 6), normal(2, 5, 6)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(layer, parameters, (queries, memories))
            return (out * cotangent).sum()

        gradients = torch.func.grad(loss)(dict(layer.named_parameters()))
        layer(queries, memories).backward(cotangent)
        for name, gradient in gradients_of(layer).items():
            assert_near(gradients[name], gradient, 1e-12, name)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_vmap_over_queries(self, impl: Any) -> None:
        layer = build(impl=impl)
        queries, memories = normal(3, 2, 5, 6), normal(2, 18, 6)
        got = torch.vmap(layer, in_dims=(0, None))(queries, memories)
        expected = torch.stack([layer(part, memories) for part in queries])
        assert_near(got, expected, 1e-12)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_vmap_over_rows_gives_gradients_per_sample(self, impl: Any) -> None:
        layer = build(impl=impl)
        queries, memories = normal(3, 5, 6), normal(3, 18, 6)
        mask = torch.rand(3, 18) < 0.8
        parameters = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(parameters: dict[str, Tensor], q: Tensor, m: Tensor, mask: Tensor) -> Tensor:
            arguments = (q[None], m[None], mask[None])
            return torch.func.functional_call(layer, parameters, arguments).square().sum()

        per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(
            parameters, queries, memories, mask
        )
        for row in range(3):
            layer.zero_grad()
            some = slice(row, row + 1)
            layer(queries[some], memories[some], mask[some]).square().sum().backward()
            for name, gradient in gradients_of(layer).items():
                assert_near(per_sample[name][row], gradient, 1e-10, name)

    # torch itself still scripts some of its forward derivatives.
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_jacobian_forward_equals_reverse(self) -> None:
        # Of plain operations; a kernel with a derivative of its own has the reverse one only.
        layer = build(impl="reference")
        queries, memories = normal(1, 2, 6), normal(1, 18, 6)

        def run(queries: Tensor) -> Tensor:
            return layer(queries, memories)

        reverse = torch.func.jacrev(run)(queries)
        assert_near(torch.func.jacfwd(run)(queries), reverse, 1e-10)


def test_gradcheck_of_the_layer() -> None:
    layer = build(HTMBlock, dim=4, inner_bias=True, detach_memories=False, mem_chunk_size=3)
    names = list(dict(layer.named_parameters()))
    mask = torch.rand(2, 8) < 0.8
    chunk_mask = torch.rand(2, 3, 3) < 0.8

    def run(queries: Tensor, memories: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (queries, memories, mask, chunk_mask))

    inputs = (leaf(2, 3, 4), leaf(2, 8, 4), *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


DDP = """
import os
import torch
from torch import distributed, nn
from htm_pytorch import HTMBlock

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = HTMBlock(6, 2, 2, 4, 3, inner_bias=True).double()

    def forward(self, queries, memories):
        return self.block(self.block(queries, memories), memories)

torch.manual_seed(0)
model = Twice()
queries, memories = torch.randn(2, 5, 6).double(), torch.randn(2, 18, 6).double()
model(queries, memories).square().sum().backward()
expected = [parameter.grad.clone() for parameter in model.parameters()]
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
# A parameter that got no gradient would make the second step an error.
for _ in range(2):
    model.zero_grad()
    wrapped(queries, memories).square().sum().backward()
for parameter, gradient in zip(model.parameters(), expected, strict=True):
    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
print("equal", flush=True)
# Taking a gloo group down can wait for a thread that waits for the interpreter (torch 2.13).
os._exit(0)
"""


def test_ddp_with_the_layer_used_twice() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    root = str(Path(htm_pytorch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DDP], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "equal\n", done.stderr


def test_shapes_can_be_worked_out_on_the_meta_device() -> None:
    layer = build(HTMBlock).to("meta")
    queries = torch.zeros(2, 5, 6, dtype=torch.float64, device="meta")
    out = layer(queries, queries.new_zeros(2, 18, 6))
    assert out.shape == (2, 5, 6)
    assert out.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    layer = build(HTMBlock, dtype=dtype, inner_bias=True)
    queries, memories = normal(2, 5, 6).to(dtype), normal(2, 18, 6).to(dtype)
    mask, chunk_mask = torch.rand(2, 18) < 0.8, torch.rand(2, 5, 5) < 0.8
    out = layer(queries, memories, mask, chunk_mask)
    out.sum().backward()
    on_gpu = copy.deepcopy(layer).cuda()
    on_gpu.zero_grad()
    arguments = [part.cuda() for part in (queries, memories, mask, chunk_mask)]
    again = on_gpu(*arguments)
    again.sum().backward()
    tolerance = 64 * torch.finfo(dtype).eps
    assert_near(again.cpu(), out, tolerance)
    for name, gradient in gradients_of(on_gpu).items():
        assert_near(gradient.cpu(), gradients_of(layer)[name], tolerance, name)
    memory = ChunkedMemory.from_steps(memories, 4)
    on_gpu(arguments[0], memory.to("cuda"))
    with pytest.raises(ValueError, match=r"^memories: expected device cuda:0, got cpu$"):
        on_gpu(arguments[0], memory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_mems": 0}, "^topk_mems: expected an integer >= 1, got 0$"),
        ({"topk_mems": 2.0}, "^topk_mems: expected an integer >= 1, got 2.0$"),
        ({"mem_chunk_size": 0}, "^mem_chunk_size: expected an integer >= 1, got 0$"),
        ({"heads": 0}, "^heads: expected an integer >= 1, got 0$"),
        ({"dim_head": -1}, "^dim_head: expected an integer >= 1, got -1$"),
        ({"dim": 0}, "^dim: expected an integer >= 1, got 0$"),
        ({"dim_memory": 0}, "^dim_memory: expected an integer >= 1, got 0$"),
        ({"dim_features": 0}, "^dim_features: expected an integer >= 1, got 0$"),
        ({"impl": "fastest"}, r"^impl: expected one of \('auto', .*\), got 'fastest'$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_constructor_arguments(changes: dict[str, Any], message: str) -> None:
    for kind in (HTMAttention, HTMBlock):
        with pytest.raises(ValueError, match=message):
            build(kind, **changes)


def test_bad_block_arguments() -> None:
    with pytest.raises(ValueError, match="^residual: expected 'input' or 'normed', got 'none'$"):
        build(HTMBlock, residual="none")
    with pytest.raises(ValueError, match="^dim_features: expected dim = 6 for the skip, got 5$"):
        build(HTMBlock, dim_features=5)


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    memory = ChunkedMemory.from_chunks(normal(2, 5, 4, 6))
    mask, chunk_mask = torch.ones(2, 18).bool(), torch.ones(2, 5, 5).bool()
    return {
        "queries-width": (
            {"queries": normal(2, 5, 7)},
            r"queries: expected shape \[B, Q, D = 6\], got \[2, 5, 7\]",
        ),
        "queries-rank": (
            {"queries": normal(2, 6)},
            r"queries: expected shape \[B, Q, D = 6\], got \[2, 6\]",
        ),
        "queries-dtype": (
            {"queries": torch.zeros(2, 5, 6)},
            "queries: expected dtype torch.float64, got torch.float32",
        ),
        "queries-integers": (
            {"queries": torch.zeros(2, 5, 6, dtype=torch.int64)},
            "queries: expected dtype torch.float64, got torch.int64",
        ),
        "queries-device": (
            {"queries": normal(2, 5, 6).to("meta")},
            "queries: expected device cpu, got meta",
        ),
        "memories-width": (
            {"memories": normal(2, 18, 7)},
            r"memories: expected shape \[B, N, D = 6\], got \[2, 18, 7\]",
        ),
        "memories-rank": (
            {"memories": normal(2, 5, 4, 6)},
            r"memories: expected shape \[B, N, D = 6\], got \[2, 5, 4, 6\]",
        ),
        "memories-batch": (
            {"memories": normal(3, 18, 6)},
            "memories: expected batch 1 or 2, got 3",
        ),
        "memories-integers": (
            {"memories": torch.zeros(2, 18, 6, dtype=torch.int64)},
            "memories: expected dtype floating point, got torch.int64",
        ),
        "memories-device": (
            {"memories": normal(2, 18, 6).to("meta")},
            "memories: expected device cpu, got meta",
        ),
        "memories-type": (
            {"memories": None},
            "memories: expected a tensor or a memory, got NoneType",
        ),
        "memory-width": (
            {"memories": ChunkedMemory.from_chunks(normal(2, 5, 4, 7))},
            "memories: expected width 6, got 7",
        ),
        "memory-batch": (
            {"memories": ChunkedMemory.from_chunks(normal(4, 5, 4, 6))},
            "memories: expected batch 1 or 2, got 4",
        ),
        "memory-device": (
            {"memories": memory.to("meta")},
            "memories: expected device cpu, got meta",
        ),
        "memory-and-mask": (
            {"memories": memory, "mask": mask},
            "mask: expected None beside a ChunkedMemory",
        ),
        "mask-length": (
            {"mask": mask[:, :17]},
            r"mask: expected shape \[B = 2, N = 18\], got \[2, 17\]",
        ),
        "mask-batch": (
            {"mask": mask[:1]},
            r"mask: expected shape \[B = 2, N = 18\], got \[1, 18\]",
        ),
        "mask-rank": (
            {"mask": mask[..., None]},
            r"mask: expected shape \[B = 2, N = 18\], got \[2, 18, 1\]",
        ),
        "mask-dtype": (
            {"mask": mask.float()},
            "mask: expected dtype torch.bool, got torch.float32",
        ),
        "mask-device": (
            {"mask": mask.to("meta")},
            "mask: expected device cpu, got meta",
        ),
        "chunk-mask-chunks": (
            {"chunk_attn_mask": chunk_mask[..., :4]},
            r"chunk_attn_mask: expected shape \[B = 2, Q = 5, M = 5\], got \[2, 5, 4\]",
        ),
        "chunk-mask-rank": (
            {"chunk_attn_mask": chunk_mask[:, 0]},
            r"chunk_attn_mask: expected shape \[B = 2, Q = 5, M = 5\], got \[2, 5\]",
        ),
        "chunk-mask-dtype": (
            {"chunk_attn_mask": chunk_mask.int()},
            "chunk_attn_mask: expected dtype torch.bool, got torch.int32",
        ),
        "chunk-mask-device": (
            {"chunk_attn_mask": chunk_mask.to("meta")},
            "chunk_attn_mask: expected device cpu, got meta",
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
@pytest.mark.parametrize("kind", [HTMAttention, HTMBlock])
def test_bad_call_arguments(name: str, kind: Any) -> None:
    changes, message = bad_calls()[name]
    good = {"queries": normal(2, 5, 6), "memories": normal(2, 18, 6)}
    layer = build(kind)
    layer(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        layer(**(good | changes))
