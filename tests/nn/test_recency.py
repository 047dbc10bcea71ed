"""Ages that count: streamed = whole, fused = plain, old weights agree, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from htm_pytorch import ChunkedMemory, HTMAttention, HTMBlock, HTMTransformer, kernels
from htm_pytorch.nn import layer as layers
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import Recency, recall, recall_with_weights
from htm_pytorch.ops.reference import htm_attention
from tests.helpers import assert_near, normal

pytestmark = pytest.mark.usefixtures("one_thread")


def build(**changes: Any) -> HTMTransformer:
    """A transformer whose queries disagree about ages."""
    sizes: dict[str, Any] = {"dim": 12, "depth": 2, "heads": 2, "dim_head": 4, "topk_mems": 2}
    sizes |= {"mem_chunk_size": 3, "mem_chunks": 5, "window": 4, "dtype": torch.float64}
    model = HTMTransformer(**(sizes | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("to_recency.weight"):
            nn.init.normal_(parameter)
    return model


def pieces(
    model: HTMTransformer, x: Tensor, is_first: Tensor, mask: Tensor, cuts: list[int]
) -> Any:
    state, outputs = None, []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        here = slice(start, end)
        y, state = model(x[:, here], state, is_first[:, here], mask[:, here])
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("keep", [False, True], ids=["own", "keep"])
@pytest.mark.parametrize("detach", [False, True], ids=["flows", "stops"])
def test_streamed_is_whole(keep: bool, detach: bool) -> None:
    model = build(keep_across_episodes=keep, detach_memories=detach)
    for seed in range(12):
        torch.manual_seed(seed)
        length = int(torch.randint(30, 70, ()))
        x, is_first = normal(3, length, 12), torch.rand(3, length) < 0.05
        mask = torch.rand(3, length) < (1.0 if seed % 2 else 0.8)
        whole, _ = model(x, None, is_first, mask)
        assert_near(pieces(model, x, is_first, mask, list(range(1, length))), whole, 1e-10)
        cuts = torch.randint(length, (4,)).sort().values.tolist()
        assert_near(pieces(model, x, is_first, mask, cuts), whole, 1e-10)


def test_ages_change_what_is_recalled() -> None:
    model, plain = build(), build()
    plain.load_state_dict(model.state_dict())
    for name, parameter in plain.named_parameters():
        if name.endswith("to_recency.weight"):
            nn.init.zeros_(parameter)
    x = normal(2, 60, 12)
    assert (model(x)[0] - plain(x)[0]).abs().max() > 0.01


def test_in_a_few_steps_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    x, is_first = normal(2, 90, 12), torch.rand(2, 90) < 0.03
    whole, _ = model(x, None, is_first)
    monkeypatch.setattr(layers, "MASK_BYTES", 1)
    assert_near(model(x, None, is_first)[0], whole, 1e-12)


@pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="no kernel here")
@pytest.mark.parametrize("keep", [False, True], ids=["own", "keep"])
def test_the_fused_step_counts_ages(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(keep_across_episodes=keep).float()
    x, is_first = torch.randn(3, 40, 12), torch.rand(3, 40) < 0.05
    called: list[str] = []
    call = kernels.call

    def noted(name: str, *arguments: Any) -> None:
        called.append(name)
        call(name, *arguments)

    monkeypatch.setattr(kernels, "call", noted)
    everything = torch.ones(3, 40, dtype=torch.bool)
    with torch.no_grad():
        fast = pieces(model, x, is_first, everything, list(range(1, 40)))
    assert "step_f32" in called
    slow = pieces(model, x, is_first, everything, list(range(1, 40)))
    assert_near(fast, slow, 1e-5)


def test_what_was_recalled_is_what_counts() -> None:
    model, x = build(), normal(2, 60, 12)
    y, _, recalls = model.recall(x)
    assert_near(y, model(x)[0], 1e-12)
    assert any((r.chunks >= 0).any() for r in recalls)


@pytest.mark.parametrize("impl", ["reference", "native", "blocked"])
def test_the_layer_is_as_specified(impl: Any) -> None:
    if impl == "native" and not kernels.IS_AVAILABLE:
        pytest.skip("no kernel here")
    layer = HTMAttention(8, 2, 3, 4, 4, impl=impl, recency=True, dtype=torch.float64)
    nn.init.normal_(layer.to_recency.weight)
    queries, steps = normal(2, 5, 8), normal(2, 44, 8)
    memory = ChunkedMemory.from_steps(steps, 4, borders="newest")
    expected = htm_attention(
        queries,
        memory,
        dict(layer.named_parameters()),
        heads=2,
        k=3,
        positions=sinusoid(4, 8, torch.float64, torch.device("cpu")),
    )
    assert_near(layer(queries, steps), expected, 1e-12)


def test_weights_from_before_ages_counted_agree() -> None:
    old, new = HTMBlock(16, heads=2), HTMBlock(16, heads=2, recency=True)
    new.load_state_dict(old.state_dict())
    queries, steps = torch.randn(2, 3, 16), torch.randn(2, 640, 16)
    assert torch.equal(new(queries, steps), old(queries, steps))
    new(queries, steps).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())
    model = build(recency=False)
    other = build()
    other.load_state_dict(model.state_dict())
    x = normal(2, 50, 12)
    assert_near(other(x)[0], model(x)[0], 1e-12)


def test_ages_of_ones_own() -> None:
    layer = HTMAttention(8, 2, 1, 1, 4, recency=True, add_pos_enc=False)
    nn.init.zeros_(layer.to_recency.weight)
    layer.to_recency.bias.data[1] = 50.0
    queries, steps = torch.randn(1, 1, 8), torch.randn(1, 9, 8)
    assert layer.recall(queries, steps)[1].chunks.item() == 8
    ages = torch.tensor([[[8, 7, 0, 5, 4, 3, 2, 1, 6]]])
    assert layer.recall(queries, steps, ages=ages)[1].chunks.item() == 2


def test_a_ring_that_went_round_knows_its_newest() -> None:
    memory = ChunkedMemory.empty(1, 4, 1, 3).append(torch.randn(1, 6, 3))
    assert memory.ages.tolist() == [[1, 0, 3, 2]]


def test_of_many_alike_the_newest() -> None:
    """However often the others have what is looked for."""
    steps = torch.zeros(1, 64, 3, dtype=torch.float64)
    steps[0, 8:44, 0] = 10.0
    steps[0, 49, 0] = 10.0
    memory = ChunkedMemory.from_steps(steps, 4)
    route = torch.tensor([[[8.0, 0.0, 0.0]]], dtype=torch.float64)
    probe = route[:, :, None]
    number = torch.tensor([[3.0]], dtype=torch.float64)
    recency = Recency(number, torch.full_like(number, 0.5))
    for recent, chunk in ((None, 2), (recency, 12)):
        _, recalled = recall_with_weights(route, probe, memory, 1, recency=recent)
        assert recalled.chunks.item() == chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ceiling": torch.zeros(2, 4)}, "recency.ceiling: expected shape"),
        ({"ceiling": torch.full((2, 5), -torch.inf)}, "recency.ceiling: expected numbers above"),
        ({"decay": torch.zeros(3, 5)}, "recency.decay: expected shape"),
        ({"decay": torch.zeros(2, 5, dtype=torch.float64)}, "recency.decay: expected dtype"),
        ({"ages": torch.zeros(2, 5, 6, dtype=torch.int64)}, "recency.ages: expected shape"),
        ({"ages": torch.zeros(2, 5, 7)}, "recency.ages: expected dtype torch.int64"),
        ({"ages": torch.zeros(2, 4, 7, dtype=torch.int64)}, "recency.ages: expected Q of 1 or 5"),
    ],
)
def test_bad_recency_is_refused(changes: dict[str, Tensor], message: str) -> None:
    memory = ChunkedMemory.from_chunks(torch.randn(2, 7, 2, 6))
    recency = Recency(torch.zeros(2, 5), torch.zeros(2, 5))._replace(**changes)
    with pytest.raises(ValueError, match=message):
        recall(torch.randn(2, 5, 6), torch.randn(2, 5, 1, 6), memory, 2, recency=recency)
    with pytest.raises(ValueError, match="recency: expected a Recency, got tuple"):
        both: Any = (torch.zeros(2, 5), torch.zeros(2, 5))
        recall(torch.randn(2, 5, 6), torch.randn(2, 5, 1, 6), memory, 2, recency=both)


def test_high_products_keep_their_order_however_the_ring_turned() -> None:
    """Far above the ceiling scores would be rounded to one, and slots decide."""
    for seed in range(8):
        torch.manual_seed(seed)
        model = build().float()
        for name, parameter in model.named_parameters():
            if name.endswith("to_recency.weight"):
                nn.init.zeros_(parameter)
            if name.endswith("to_summary_queries.weight"):
                parameter.data *= 30
        x, is_first = torch.randn(2, 60, 12), torch.zeros(2, 60, dtype=torch.bool)
        everything = torch.ones(2, 60, dtype=torch.bool)
        whole, _ = model(x)
        assert_near(pieces(model, x, is_first, everything, list(range(1, 60))), whole, 1e-4)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_old_weights_stay_numbers_in_training(kind: Any) -> None:
    old, new = HTMBlock(16, heads=2), HTMBlock(16, heads=2, recency=True)
    new.load_state_dict(old.state_dict())
    optimizer = kind(new.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        new(torch.randn(2, 3, 16), torch.randn(2, 640, 16)).square().sum().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in new.parameters())


def test_old_weights_are_assigned() -> None:
    state = HTMAttention(8, 2, dim_head=4).half().state_dict()
    with torch.device("meta"):
        layer = HTMAttention(8, 2, dim_head=4, recency=True)
    layer.load_state_dict(state, assign=True)
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert {p.device.type for p in layer.parameters()} == {"cpu"}


def test_what_a_call_could_recall_has_no_ages_of_its_own() -> None:
    memory = ChunkedMemory.empty(1, 4, 2, 8).append(torch.randn(1, 13, 8))
    unrolled = memory.unroll(torch.randn(1, 5, 8))
    layer = HTMAttention(8, 2, dim_head=4, recency=True)
    with pytest.raises(ValueError, match="ages: expected to be given"):
        layer(torch.randn(1, 5, 8), unrolled.read, chunk_attn_mask=unrolled.visible)
    assert unrolled.after.ages.shape == (1, 4)
