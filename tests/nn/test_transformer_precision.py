"""`HTMTransformer` in 16 bits against float64: streamed and whole, near and far from zero."""

import pytest
import torch
from torch import Tensor

from htm_pytorch import HTMTransformer
from tests.helpers import rounding

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.float16, torch.bfloat16]


def build(depth: int = 1) -> HTMTransformer:
    # All chunks are recalled: which of two are better may turn on a rounding.
    model = HTMTransformer(16, depth, 2, 8, topk_mems=8, mem_chunk_size=32, mem_chunks=8, window=8)
    torch.nn.init.normal_(model.layers[0].local.distance_bias)  # pyright: ignore
    return model


def streamed(model: HTMTransformer, x: Tensor) -> Tensor:
    state, pieces = model.initial_state(x.shape[0]), []
    for step in x.split(1, 1):
        y, state = model(step, state)
        pieces.append(y)
    return torch.cat(pieces, 1)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_outputs_are_those_of_float64_up_to_roundings(dtype: torch.dtype, way: str) -> None:
    model = build().to(dtype)
    exact = build().double()
    exact.load_state_dict({name: part.double() for name, part in model.state_dict().items()})
    x = torch.randn(2, 200, 16).to(dtype)
    with torch.no_grad():
        expected = exact(x.double())[0]
        got = model(x)[0] if way == "whole" else streamed(model, x)
        # What rounding every layer's output to 16 bits costs by itself: a float64 model whose
        # modules' outputs are rounded, and nothing else.
        for name, module in exact.named_modules():
            # The projections of the memory are moved to the queries' side, and never called.
            if not list(module.children()) and not name.endswith(("to_kv", "to_summary_keys")):
                module.register_forward_hook(lambda _, args, out: out.to(dtype).double())
        rounded = exact(x.double())[0]
    floor = error(rounded, expected)
    assert floor > torch.finfo(dtype).eps / 4
    assert error(got, expected) <= 4 * floor + rounding(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_steps_whose_sum_is_beyond_float16_are_remembered(dtype: torch.dtype, way: str) -> None:
    model = build().to(dtype)
    # A chunk of 32 such steps sums to 100,000, and float16 ends at 65,504.
    x = (torch.randn(1, 200, 16) * 8 + 3000).to(dtype)
    with torch.no_grad():
        got = model(x)[0] if way == "whole" else streamed(model, x)
        exact = build().double()
        exact.load_state_dict({name: part.double() for name, part in model.state_dict().items()})
        state = model(x)[1]
        summaries = exact(x.double())[1][0].memory.summaries
    assert got.isfinite().all()
    error_of_means = (state[0].memory.summaries.double() - summaries).abs().max()
    assert error_of_means <= 2 * torch.finfo(dtype).eps * summaries.abs().max()


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_gradients_are_finite_and_near_those_of_float64(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    exact = build().double()
    exact.load_state_dict({name: part.double() for name, part in model.state_dict().items()})
    x = torch.randn(2, 100, 16).to(dtype)
    cotangent = torch.randn(2, 100, 16).to(dtype)
    gradients = []
    for one, given in ((model, x), (exact, x.double())):
        loss = (one(given)[0] * cotangent.to(given.dtype)).sum()
        gradients.append(torch.autograd.grad(loss, list(one.parameters())))
    for (name, _), got, wanted in zip(model.named_parameters(), *gradients, strict=True):
        if not wanted.abs().max() > 1e-9:
            continue
        cosine = torch.nn.functional.cosine_similarity(got.double().flatten(), wanted.flatten(), 0)
        assert cosine > 1 - 64 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("length", [1, 9])
def test_the_softmax_over_the_window_is_in_float32(dtype: torch.dtype, length: int) -> None:
    model = build().to(dtype)
    seen: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
            if func._schema.name in ("aten::_softmax", "htm_pytorch::attend_window"):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        model(torch.randn(1, length, 16).to(dtype))
    assert seen and set(seen) == {torch.float32}


def test_autocast_does_not_change_what_a_state_is() -> None:
    model = build()
    x = torch.randn(2, 40, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = model(x)
        for step in torch.randn(2, 3, 16).split(1, 1):
            _, state = model(step, state)
    assert {state[0].keys.dtype, state[0].memory.dtype} == {torch.float32}
    model(x, state)
