"""A step by one call of the kernel is the step that the layers compute, or is left to them."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from htm_pytorch import HTMAttention, HTMTransformer, kernels
from htm_pytorch.memory import ring
from htm_pytorch.nn import TransformerState, fused
from htm_pytorch.nn import layer as layers
from tests.helpers import assert_near, rounding

pytestmark = pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="needs the compiled kernel")

# dim, depth, heads, dim_head, topk_mems, mem_chunk_size, mem_chunks, window, rows
SIZES = {
    "usual": (16, 2, 2, 8, 2, 4, 3, 5, 3),
    "of-one": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "no-window": (24, 1, 3, 5, 2, 3, 4, 1, 2),
    "odd": (33, 1, 3, 11, 3, 3, 7, 4, 5),
    "wide-head": (20, 1, 1, 100, 1, 2, 5, 33, 2),
    "long-window": (8, 1, 2, 4, 40, 2, 20, 70, 4),
    "many-rows": (40, 1, 2, 17, 2, 5, 4, 3, 35),
}


def build(
    dim: int, depth: int, heads: int, dim_head: int, k: int, size: int, chunks: int, window: int
) -> HTMTransformer:
    model = HTMTransformer(
        dim,
        depth,
        heads,
        dim_head,
        topk_mems=k,
        mem_chunk_size=size,
        mem_chunks=chunks,
        window=window,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[-1] == window:
                parameter.add_(torch.randn_like(parameter) / 2)
    return model


class Calls:
    """Counts the steps that were fused, and those that were not; `on` lets none be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on, self.fused, self.left = True, 0, 0
        real: Callable[..., Any] = fused.step

        def step(*arguments: Any) -> Any:
            made = real(*arguments) if self.on else None
            self.fused, self.left = self.fused + (made is not None), self.left + (made is None)
            return made

        monkeypatch.setattr(layers.fused, "step", step)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@torch.no_grad()
def stream(
    model: HTMTransformer, x: Tensor, is_first: Tensor | None
) -> tuple[Tensor, TransformerState]:
    state = model.initial_state(len(x))
    ys: list[Tensor] = []
    for time in range(x.shape[1]):
        now = slice(time, time + 1)
        y, state = model(x[:, now], state, None if is_first is None else is_first[:, now])
        ys.append(y)
    return torch.cat(ys, 1), state


def parts(state: TransformerState) -> dict[str, Tensor]:
    """What a state says, without what lies behind `filled` and in chunks that are not valid."""
    named: dict[str, Tensor] = {}
    for number, layer in enumerate(state):
        assert layer.memory is not None
        held = layer.memory._tensors()
        for name in ("contents", "summaries"):
            rest = (1,) * (held[name].ndim - 2)
            held[name] = held[name].where(held["valid"].view(*held["valid"].shape, *rest), 0.0)
        past = layer.keys.shape[1]
        seen = (torch.arange(past) >= past - layer.filled[:, None])[..., None, None]
        for name in ("first_steps", "episodes"):
            held[name] = held[name].where(held["valid"], 0)
        held |= {"keys": layer.keys.where(seen, 0.0), "values": layer.values.where(seen, 0.0)}
        named |= {f"{number}.{name}": part for name, part in held.items()}
        named[f"{number}.filled"] = layer.filled
    return named


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bordered", [False, True], ids=["on", "over-episodes"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_it_is_the_step(sizes: tuple[int, ...], bordered: bool, threads: int, calls: Calls) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        *shape, rows = sizes
        model = build(*shape)  # pyright: ignore[reportCallIssue]
        x = torch.randn(rows, 45, sizes[0])
        is_first = torch.rand(rows, 45) < 0.1 if bordered else None
        got, after = stream(model, x, is_first)
        assert calls.fused and not calls.left
        calls.on = False
        plain, plain_after = stream(model, x, is_first)
        exact, exact_after = stream(model.double(), x.double(), is_first)
    finally:
        torch.set_num_threads(before)
    tolerance = 3 * float((plain.double() - exact).abs().max() / exact.abs().max())
    assert_near(got, exact, tolerance + rounding(torch.float32), "outputs")
    exact_parts, plain_parts = parts(exact_after), parts(plain_after)
    for name, part in parts(after).items():
        assert part.dtype == plain_parts[name].dtype and part.shape == plain_parts[name].shape
        if part.is_floating_point():
            assert_near(part, exact_parts[name], 64 * torch.finfo(torch.float32).eps, name)
        else:
            assert torch.equal(part, exact_parts[name]), name


def test_streamed_is_whole(calls: Calls) -> None:
    model = build(16, 2, 2, 8, 2, 4, 3, 5)
    x, is_first = torch.randn(3, 40, 16), torch.rand(3, 40) < 0.1
    got, after = stream(model, x, is_first)
    with torch.no_grad():
        whole, whole_after = model(x, None, is_first)
    assert calls.fused == 80
    torch.testing.assert_close(got, whole)
    torch.testing.assert_close(parts(after), parts(whole_after))


def test_states_before_stay_what_they_were(calls: Calls) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    x = torch.randn(3, 20, 16)
    states = [model.initial_state(3)]
    copies = [copy.deepcopy(states[0])]
    with torch.no_grad():
        for step in x.split(1, 1):
            states.append(model(step, states[-1])[1])
            copies.append(copy.deepcopy(states[-1]))
        for state, kept in zip(states, copies, strict=True):
            torch.testing.assert_close(parts(state), parts(kept))
    assert calls.fused == 20


def test_weights_may_change_between_steps(calls: Calls) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    x = torch.randn(2, 9, 16)
    for change in (
        lambda: model.layers[0].mlp[3].weight.data.mul_(2.0),
        lambda: setattr(model.layers[0].htm.attn.attn, "to_q", nn.Linear(16, 16, bias=False)),
        lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
        lambda: setattr(model.layers[0].local.norm, "eps", 0.1),
        lambda: setattr(model.layers[0].htm, "residual", "normed"),
        lambda: setattr(model.layers[0].htm.attn, "topk_mems", 1),
        lambda: setattr(model.layers[0].htm.attn, "add_pos_enc", False),
    ):
        before, _ = stream(model, x, None)
        change()
        calls.on = False
        expected, _ = stream(model, x, None)
        calls.on = True
        got, _ = stream(model, x, None)
        torch.testing.assert_close(got, expected)
        assert not torch.allclose(before, expected)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _hook(model: HTMTransformer) -> Any:
    return model.layers[0].mlp[1].register_forward_hook(lambda module, x, y: 2 * y)


def _hook_of_all(model: HTMTransformer) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda module, x, y: y)


def _replaced(model: HTMTransformer) -> None:
    model.layers[0].htm.attn.attn.to_q = Doubled(16, 16, bias=False)


def _other_forward(model: HTMTransformer) -> None:
    mlp = model.layers[0].mlp
    mlp.forward = lambda x: x


def _longer_mlp(model: HTMTransformer) -> None:
    model.layers[0].mlp.append(nn.Tanh())


def _other_activation(model: HTMTransformer) -> None:
    model.layers[0].mlp[2] = nn.GELU("tanh")


def _named(model: HTMTransformer) -> None:
    model.layers[0].htm.attn.impl = "reference"


def _in_half(model: HTMTransformer) -> None:
    model.bfloat16()


def _no_weights(model: HTMTransformer) -> None:
    model.layers[0].mlp[0] = nn.LayerNorm(16, elementwise_affine=False)


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _hook_of_all,
        _replaced,
        _other_forward,
        _longer_mlp,
        _other_activation,
        _named,
        _in_half,
        _no_weights,
    ],
)
def test_what_it_would_not_do_is_left_to_the_layers(
    change: Callable[[HTMTransformer], Any], calls: Calls
) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    handle = change(model)
    try:
        x = torch.randn(2, 6, 16, dtype=model.norm.weight.dtype)
        got, _ = stream(model, x, None)
        assert not calls.fused and calls.left == 6
        with torch.no_grad():
            whole, _ = model(x)
        tolerance = 1e-5 if x.dtype == torch.float32 else 0.1
        torch.testing.assert_close(got, whole, rtol=tolerance, atol=tolerance)
    finally:
        if handle is not None:
            handle.remove()


def test_nor_where_gradients_flow_or_operators_are_watched(calls: Calls) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    x = torch.randn(2, 1, 16)
    y, state = model(x)
    assert y.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x, state)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, state)
    assert counter.get_total_flops() > 0
    with torch.no_grad():
        model(x, state, at=torch.zeros(2, 2, dtype=torch.int64))
        model(x, state, mask=torch.tensor([[True], [False]]))
    assert not calls.fused
    with torch.inference_mode():
        y, state = model(x, state)
        model(x, state)
    assert calls.fused == 2


@pytest.mark.parametrize("name", ["local.to_qkv", "htm.attn.attn.to_kv", "mlp.3", "mlp.0"])
def test_weights_of_other_sizes_are_an_error_of_torch(name: str, calls: Calls) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    x = torch.randn(2, 3, 16)
    stream(model, x, None)
    module = model.layers[0].get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach()[:3].clone())  # pyright: ignore
    with pytest.raises((RuntimeError, ValueError)):
        stream(model, x, None)


def test_a_step_makes_few_operators() -> None:
    model = build(64, 1, 4, 16, 2, 16, 100, 16)
    with torch.no_grad():
        _, state = model(torch.randn(4, 65, 64))
        _, state = model(torch.randn(4, 1, 64), state)
        for _ in range(3):
            with torch.profiler.profile() as profile:
                _, state = model(torch.randn(4, 1, 64), state)
            assert sum(event.name.startswith("aten::") for event in profile.events()) <= 60


class Scaled(nn.Sequential):
    def forward(self, input: Any) -> Any:
        return 0.1 * super().forward(input)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def _prune(layer: Any) -> None:
    up, down = layer.mlp[1], layer.mlp[3]
    up.weight.data, up.bias.data = up.weight.data[:9], up.bias.data[:9]
    down.weight.data = down.weight.data[:, :9]


def _other_stride(layer: Any) -> None:
    weight = layer.mlp[1].weight
    base = torch.randn(4 * weight.numel())
    weight.data = base.as_strided(weight.shape, (16, 1))
    layer(torch.randn(2, 1, 16), START[0], None, None, None, False)
    weight.data = base.as_strided(weight.shape, (32, 1))


def _other_heads(layer: Any) -> None:
    layer.local.heads, layer.local.dim_head = 1, 16
    layer.htm.attn.attn.heads, layer.htm.attn.attn.dim_head = 1, 16
    layer.local.distance_bias.data = layer.local.distance_bias.data[:1]
    START[0] = START[0]._replace(
        keys=START[0].keys.flatten(2)[:, :, None], values=START[0].values.flatten(2)[:, :, None]
    )


def _expanded_bias(layer: Any) -> None:
    layer.local.distance_bias = nn.Parameter(torch.randn(1, 5).expand(2, 5))


def _strided_bias(layer: Any) -> None:
    layer.local.distance_bias = nn.Parameter(torch.randn(2, 9)[:, :5])


def _negated(layer: Any) -> None:
    layer.mlp[1].weight = nn.Parameter(torch._neg_view(layer.mlp[1].weight.data))


START: list[Any] = []
"""The state of the layer that is changed."""


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "mlp", Scaled(*layer.mlp)),
        lambda layer: setattr(layer, "mlp", Bare()),
        _prune,
        _other_stride,
        _other_heads,
        _expanded_bias,
        _strided_bias,
        _negated,
    ],
    ids=["sequential", "bare", "prune", "stride", "heads", "expanded", "strided", "negated"],
)
@torch.no_grad()
def test_a_layer_that_was_changed_does_what_it_says(
    change: Callable[[Any], None], calls: Calls
) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    _, state = model(torch.randn(2, 9, 16))
    layer: Any = model.layers[0]
    START[:] = [state[0]]
    layer(torch.randn(2, 1, 16), START[0], None, None, None, False)
    change(layer)
    x = torch.randn(2, 1, 16)
    got, after, _ = layer(x, START[0], None, None, None, False)
    calls.on = False
    plain, plain_after, _ = layer(x, START[0], None, None, None, False)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(after.keys, plain_after.keys)


@torch.no_grad()
def test_a_layer_of_other_sizes_is_an_error_of_torch() -> None:
    x = torch.randn(3, 1, 16)
    model = build(16, 2, 2, 8, 2, 2, 3, 5)
    model.layers[1] = build(4096, 1, 2, 8, 2, 2, 3, 5).layers[0]
    with pytest.raises((RuntimeError, ValueError)):
        model(x)
    model = build(16, 2, 2, 8, 2, 2, 3, 5)
    state = model.initial_state(3)
    model.layers[1].local = build(16, 1, 2, 8, 2, 2, 3, 60_000).layers[0].local  # pyright: ignore
    with pytest.raises((RuntimeError, ValueError)):
        model(x, state)
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    model.layers[0].mlp[1].weight.untyped_storage().resize_(0)  # pyright: ignore
    with pytest.raises(RuntimeError):
        model(x)


@torch.no_grad()
def test_states_of_odd_strides_and_numbers(calls: Calls) -> None:
    model = build(16, 1, 2, 8, 2, 2, 3, 5)
    _, state = model(torch.randn(3, 12, 16))
    memory, x = state[0].memory, torch.randn(3, 1, 16)
    assert memory is not None
    for valid in (torch.tensor(True).expand(3, 3), torch.rand(3, 3).gt(0.5).t()):
        odd = TransformerState((state[0]._replace(memory=memory._replace(valid=valid)),))
        calls.on = True
        got, _ = model(x, odd)
        calls.on = False
        torch.testing.assert_close(got, model(x, odd)[0])
    calls.on = True
    state[0].filled.fill_(-100_000)
    assert model(x, state)[0].shape == x.shape


def test_nothing_that_stands_for_a_tensor_is_kept() -> None:
    layer = HTMAttention(24, 2, 2, 4, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        HTMAttention(24, 2, 2, 4, 8)(torch.randn(2, 5, 24), torch.randn(2, 9, 24))
    assert type(layer(torch.randn(2, 5, 24), torch.randn(2, 9, 24))) is Tensor


@torch.no_grad()
def test_hooks_may_keep_what_they_get_and_recall_says_that_it_runs_none() -> None:
    model = build(8, 1, 1, 8, 1, 1, 2, 1)
    kept: list[Any] = []
    layer: Any = model.layers[0]
    handle = layer.htm.attn.register_forward_pre_hook(lambda _, given: kept.append(given[1]))
    state = None
    for _ in range(4):
        _, state = model(torch.randn(1, 1, 8), state)
    memory = kept[-1]
    before = memory.contents.clone()
    model(torch.randn(1, 1, 8), state)
    assert torch.equal(memory.contents, before)
    with pytest.raises(ValueError, match="recall: expected a HTMAttention with the forward of its"):
        model.recall(torch.randn(1, 1, 8), state)
    handle.remove()
    model.recall(torch.randn(1, 1, 8), state)


@torch.no_grad()
def test_threads_that_step_from_one_state() -> None:
    model = build(16, 1, 2, 8, 2, 1, 3, 5)
    x = torch.randn(2, 40, 16)
    for trial in range(30):
        _, state = model(x[:, :9])
        step = x[:, 9 + trial : 10 + trial]
        expected, _ = model(step, TransformerState.cat([state]))
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(_step, model, step, state) for _ in range(3)]
            found = [one.result() for one in asked]
        again, _ = model(step, state)
        for got in (*found, again):
            torch.testing.assert_close(got, expected)


def _step(model: HTMTransformer, step: Tensor, state: TransformerState) -> Tensor:
    # Whether gradients are taken is each thread's own.
    with torch.no_grad():
        return model(step, state)[0]


def test_chunks_are_found_by_their_codes(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Each step of a ring that fills and turns gives the same bits with codes and without."""
    torch.manual_seed(0)
    model = build(32, 1, 2, 16, 2, 2, 70, 4)
    x = torch.randn(3, 2 * 70 + 41, 32)
    is_first = torch.rand(x.shape[:2]) < 0.01
    for borders in (None, is_first):
        y, state = stream(model, x, borders)
        with monkeypatch.context() as patch:
            patch.setattr(ring, "CODED_NUMBERS", 0)
            patch.setattr(ring, "CODED_KEPT", 0)
            patch.setattr(ring, "CODED_WRITTEN", 0)
            patch.setattr(ring, "CODED_STEPS", 0)
            patch.setattr(ring, "CODED_AFTER", 2)
            coded_y, coded = stream(model, x, borders)
        assert torch.equal(coded_y, y)
        assert coded[0].memory is not None
        assert state[0].memory is not None
        assert coded[0].memory._ring._codes is not None
        assert state[0].memory._ring._codes is None
    assert calls.fused
