"""What only a compiled kernel can get wrong: strides, tails of vectors, threads, addresses."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import htm_pytorch
from benchmarks.harness import peak_allocation
from htm_pytorch import ChunkedMemory
from htm_pytorch.memory import Steps
from htm_pytorch.ops import attend, kernels, native, recall
from tests.helpers import assert_near, memory_of, relative_error

OPERATORS = torch.ops.htm_pytorch
ROOT = Path(htm_pytorch.__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Put what an operator may write between numbers that must stay; they are looked at by a call.

    A read beyond an end would need a sanitizer to be seen.
    """
    fence, mark = 1024, 77
    fenced: list[Tensor] = []

    def between_fences(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            plain = make(*arguments, **options)
            room = torch.full((plain.numel() + 2 * fence,), mark, dtype=plain.dtype)
            fenced.append(room)
            return room[fence:-fence].view(plain.shape).copy_(plain)

        return made

    def look() -> None:
        rooms = fenced.copy()
        fenced.clear()
        for room in rooms:
            assert (room[:fence] == mark).all(), "written before the beginning"
            assert (room[-fence:] == mark).all(), "written behind the end"

    for owner, name in ((torch, "empty"), (torch, "zeros"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, between_fences(getattr(owner, name)))
    monkeypatch.setattr(Tensor, "new_empty", between_fences(Tensor.new_empty))
    yield look
    look()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Sizes(NamedTuple):
    """The letters of `htm_pytorch.shapes`."""

    B: int = 2
    Q: int = 5
    H: int = 3
    M: int = 7
    C: int = 4
    D: int = 6


def inputs_of(sizes: Sizes, shared: bool = False) -> dict[str, Tensor]:
    """Inputs of order one, whose softmaxes are not saturated: no gradient is a rounding error."""
    b, q, h, m, c, d = sizes
    rows = 1 if shared else b
    return {
        "route": d**-0.5 * normal(b, q, d),
        "probe": d**-0.5 * normal(b, q, h, d),
        "positions": normal(c, d),
        "contents": normal(rows, m, c, d),
        "summaries": normal(rows, m, d),
    }


def masks_of(sizes: Sizes) -> dict[str, Tensor]:
    b, q, _, m, c, _ = sizes
    return {
        "valid": torch.rand(b, m) < 0.8,
        "step_mask": torch.rand(b, m, c) < 0.7,
        "chunk_mask": torch.rand(b, q, m) < 0.8,
    }


def cast(parts: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with all but the masks in `dtype`."""
    return {name: p.to(dtype) if p.is_floating_point() else p for name, p in parts.items()}


def run(impl: Any, k: int, parts: dict[str, Tensor]) -> Tensor:
    """Recall from a memory of these `contents` (and `summaries`), or of these `steps`."""
    if "steps" in parts:
        memory: Any = Steps(parts["steps"], 4, parts.get("mask"), 0.1)
    else:
        masks = parts.get("valid"), parts.get("step_mask")
        memory = memory_of(parts["contents"], parts.get("summaries"), *masks)
    return recall(
        parts["route"],
        parts["probe"],
        memory,
        k,
        positions=parts.get("positions"),
        chunk_mask=parts.get("chunk_mask"),
        impl=impl,
    )


def with_gradients(
    impl: Any,
    k: int,
    parts: dict[str, Tensor],
    cotangent: Tensor | None = None,
    seen_as: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """The context and the gradients by name; the kernel gets what `seen_as` makes of a part."""
    leaves = {
        name: part.detach().clone().requires_grad_(part.is_floating_point())
        for name, part in parts.items()
    }
    context = run(impl, k, {name: seen_as(name, part) for name, part in leaves.items()})
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(context.shape, generator=generator, dtype=torch.float64)
    named = {name: part for name, part in leaves.items() if part.requires_grad}
    cotangent = seen_as("cotangent", cotangent.to(context))
    gradients = torch.autograd.grad(context, list(named.values()), cotangent, allow_unused=True)
    filled = [
        torch.zeros_like(part) if gradient is None else gradient
        for part, gradient in zip(named.values(), gradients, strict=True)
    ]
    return {"context": context.detach(), **dict(zip(named, filled, strict=True))}


def assert_all_near(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, note: str = ""
) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(got[name], value, tolerance, f"{name} {note}")


def assert_as_accurate(
    got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], note: str = ""
) -> None:
    """Errors of at most a few of the plain ones, or of a few roundings of the result."""
    for name, true in truth.items():
        unit = torch.finfo(got[name].dtype).eps
        # The truth itself has the roundings of float64.
        unit = 8 * unit if got[name].dtype == torch.float64 else unit
        allowed = 8 * max(relative_error(plain[name], true), unit)
        error = relative_error(got[name], true)
        assert error <= allowed, f"{name} {note}: {error:.2e} > {allowed:.2e}"


class TestStrides:
    """What lies where must not matter. Whatever is not the argument's own is NaN, or true."""

    SIZES = {
        "plain": Sizes(),
        "one-query": Sizes(Q=1),
        "one-row": Sizes(B=1),
        "one-head": Sizes(Q=1, H=1),
        "one-step": Sizes(M=1, C=1),
        "one-wide": Sizes(D=1),
        "one-of-all": Sizes(B=3, Q=1, H=1, M=1, C=1, D=1),
    }
    OVER_CHUNKS = [
        *("route", "probe", "positions", "contents", "summaries", "cotangent"),
        *("valid", "step_mask", "chunk_mask"),
    ]
    OVER_STEPS = ["steps", "mask"]

    @staticmethod
    def garbage(like: Tensor) -> Tensor:
        return torch.full_like(like, float("nan") if like.is_floating_point() else True)

    @classmethod
    def layouts(cls, tensor: Tensor) -> dict[str, Tensor]:
        """Tensors of the same entries, each otherwise laid out."""
        made = {}
        other = cls.garbage(tensor)
        for axis in range(tensor.ndim):
            size = tensor.shape[axis]
            both = torch.stack([tensor, other], axis + 1).flatten(axis, axis + 1)
            made[f"gaps-{axis}"] = both.unflatten(axis, (size, 2)).select(axis + 1, 0)
            made[f"more-behind-{axis}"] = torch.cat([tensor, other], axis).narrow(axis, 0, size)
            made[f"more-before-{axis}"] = torch.cat([other, tensor], axis).narrow(axis, size, size)
            for to in range(axis + 1, tensor.ndim):
                # A clone: to be contiguous, an axis of size 1 may have any stride.
                moved = tensor.movedim(axis, to).clone(memory_format=torch.contiguous_format)
                made[f"moved-{axis}-{to}"] = moved.movedim(to, axis)
        return made

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    @pytest.mark.parametrize("which", [*OVER_CHUNKS, *OVER_STEPS])
    def test_of_one_argument(self, which: str, sizes: Sizes) -> None:
        parts = inputs_of(sizes)
        if which in self.OVER_STEPS:
            # Ragged: two steps are missing before the first.
            length = 4 * sizes.M - 2 * (sizes.M > 1)
            parts = {name: parts[name] for name in ("route", "probe")}
            parts |= {"steps": normal(sizes.B, length, sizes.D), "positions": normal(4, sizes.D)}
            parts["mask"] = torch.rand(sizes.B, length) < 0.8
        else:
            parts |= masks_of(sizes)
        cotangent = normal(*parts["probe"].shape)
        expected = with_gradients("reference", 3, parts, cotangent)
        subject = cotangent if which == "cotangent" else parts[which]
        for layout in self.layouts(subject):

            def seen_as(name: str, part: Tensor, layout: str = layout) -> Tensor:
                return self.layouts(part)[layout] if name == which else part

            laid_out = seen_as(which, subject)
            assert torch.equal(laid_out, subject)
            got = with_gradients("native", 3, parts, cotangent, seen_as)
            assert_all_near(got, expected, 1e-12, f"{layout} {laid_out.stride()}")

    @pytest.mark.parametrize("which", [*OVER_CHUNKS, *OVER_STEPS])
    def test_of_one_that_repeats_itself(self, which: str) -> None:
        sizes = Sizes()
        parts = inputs_of(sizes) | masks_of(sizes)
        if which in self.OVER_STEPS:
            parts |= {"steps": normal(sizes.B, 26, sizes.D)}
            parts |= {"mask": torch.rand(sizes.B, 26) < 0.8}
            for name in ("contents", "summaries", "valid", "step_mask"):
                del parts[name]
        cotangent = normal(*parts["probe"].shape)
        subject = cotangent if which == "cotangent" else parts[which]
        axes = [range(n) for n in range(1, subject.ndim + 1)] + [[n] for n in range(subject.ndim)]
        for some in axes:

            def repeated(name: str, part: Tensor, some: Any = some) -> Tensor:
                if name != which:
                    return part
                one = part
                for axis in some:
                    one = one.narrow(axis, 0, 1)
                return one.expand(part.shape)

            def written_out(name: str, part: Tensor, repeated: Any = repeated) -> Tensor:
                return repeated(name, part).contiguous()

            # All chunks are kept: which of equal ones were, would be another question.
            expected = with_gradients("reference", 9, parts, cotangent, written_out)
            got = with_gradients("native", 9, parts, cotangent, repeated)
            # Where all summaries are equal, the gradient of the route is zero.
            for name, value in expected.items():
                torch.testing.assert_close(
                    got[name], value, rtol=1e-11, atol=1e-11, msg=f"{name}, along {list(some)}"
                )

    def test_a_gradient_of_one_number_for_all(self) -> None:
        # As that of a sum: every stride is 0.
        for name in ("plain", "one-query", "one-head"):
            parts = inputs_of(self.SIZES[name])
            for impl in ("native", "projected"):
                route, probe = parts["route"].requires_grad_(), parts["probe"].requires_grad_()
                memory = ChunkedMemory.from_chunks(parts["contents"])
                both = []
                for cotangent in (torch.ones(()).double(), torch.ones_like(probe)):
                    if impl == "native":
                        value = recall(route, probe, memory, 2, impl=impl)
                    else:
                        projections = torch.eye(6).double().expand(2, probe.shape[2], 6, 6)
                        value, _ = attend(route, probe, projections, memory, 2, impl=impl)
                    expanded = cotangent.expand_as(value)
                    both.append(torch.autograd.grad(value, [route, probe], expanded))
                for got, wanted in zip(*both, strict=True):
                    assert_near(got, wanted, 1e-13, f"{name} {impl}")

    @pytest.mark.parametrize("batch", [1, 4])
    @pytest.mark.parametrize("heads", [1, 2])
    def test_one_query_of_the_layer(self, batch: int, heads: int) -> None:
        # What its projections return then has strides that only a size of 1 allows.
        sizes = {"dim": 6, "heads": heads, "topk_mems": 2, "mem_chunk_size": 4, "dim_head": 3}
        layer = htm_pytorch.HTMAttention(**sizes, detach_memories=False).double()
        queries, memories = normal(batch, 1, 6), normal(batch, 18, 6)
        cotangent = normal(batch, 1, 6)
        results = []
        for impl in ("reference", "native", "projected", "auto"):
            layer.impl = impl
            leaves = [queries.clone().requires_grad_(), memories.clone().requires_grad_()]
            value = layer(*leaves)
            gradients = torch.autograd.grad(value, [*leaves, *layer.parameters()], cotangent)
            results.append({str(i): part for i, part in enumerate([value, *gradients])})
        for got in results[1:]:
            assert_all_near(got, results[0], 1e-11)


class TestOperators:
    """The operators themselves, as a compiler or a hook may call them."""

    FORWARD = [
        *("pick-steps", "pick-steps-whole", "pick-summaries"),
        *("attend", "attend-plain", "attend_projected", "attend_projected-apart"),
    ]
    BACKWARD = [
        *("pick_backward-steps", "pick_backward-summaries"),
        *("attend_backward", "attend_backward-plain", "attend_projected_backward"),
    ]

    @staticmethod
    def samples() -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Arguments of every operator, by a name for each sample."""
        torch.manual_seed(0)
        route, probe = 0.4 * normal(2, 5, 6), 0.4 * normal(2, 5, 3, 6)
        steps, summaries, positions = normal(2, 11, 6), normal(2, 3, 6), normal(4, 6)
        mask, valid = torch.rand(2, 11) < 0.8, torch.rand(2, 3) < 0.8
        chunk_mask = torch.rand(2, 5, 3) < 0.8
        chunk_mask[0, 1] = False
        picked, weights = OPERATORS.pick(route, steps, None, mask, chunk_mask, 2, 4, 0.1)
        assert (picked < 0).any()
        grad, grad_picks = normal(2, 5, 3, 6), normal(2, 5, 2)
        inside = (probe, steps, mask, positions, picked, weights, 4)
        some = (part[:, :1].clone() for part in (probe, picked, weights))
        few, few_picked, few_weights = some
        plain = (few, steps[:1], None, None, few_picked, few_weights, 4)
        queries, projected = 0.4 * normal(2, 5, 3, 5), normal(12, 2, 3, 5)
        exists = torch.rand(12) < 0.8
        together = (queries, projected, exists, picked, weights, 4, 1, 0.5)
        # Two rows that share no chunk.
        own = torch.stack([torch.randperm(2) for _ in range(10)]).view(2, 5, 2)
        own = own + torch.tensor([0, 2])[:, None, None]
        own[0, 1, 1] = -1
        apart = (queries, projected, None, own, weights, 3, 2, 0.5)
        return {
            "pick-steps": ("pick", (route, steps, None, mask, chunk_mask, 2, 4, 0.1)),
            "pick-steps-whole": ("pick", (route, steps[:1], None, None, None, 3, 4, 0.0)),
            "pick-summaries": ("pick", (route, summaries, valid, None, chunk_mask, 2, 1, 0.0)),
            "attend": ("attend", inside),
            "attend-plain": ("attend", plain),
            "attend_projected": ("attend_projected", together),
            "attend_projected-apart": ("attend_projected", apart),
            "pick_backward-steps": (
                "pick_backward",
                (grad_picks, route, steps, mask, picked, weights, 4, 0.1, True),
            ),
            "pick_backward-summaries": (
                "pick_backward",
                (grad_picks, route, summaries, None, picked, weights, 1, 0.0, False),
            ),
            "attend_backward": ("attend_backward", (grad, *inside, True, True)),
            "attend_backward-plain": (
                "attend_backward",
                (grad[:, :1].clone(), *plain, False, False),
            ),
            "attend_projected_backward": (
                "attend_projected_backward",
                (normal(2, 5, 3, 5), *together),
            ),
        }

    @staticmethod
    def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            part.clone().requires_grad_()
            if isinstance(part, Tensor) and part.is_floating_point()
            else part
            for part in arguments
        )

    @pytest.mark.compile
    @pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
    def test_opcheck(self, name: str) -> None:
        operator, arguments = self.samples()[name]
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if "backward" not in operator:
            arguments = self.differentiable(arguments)
        packet = getattr(OPERATORS, operator)
        torch.library.opcheck(packet.default, arguments, test_utils=checks)

    @pytest.mark.parametrize("name", FORWARD)
    def test_gradcheck(self, name: str) -> None:
        operator, arguments = self.samples()[name]

        def run(*some: Any) -> Any:
            made = getattr(OPERATORS, operator)(*some)
            return made[1] if operator == "pick" else made

        assert torch.autograd.gradcheck(run, self.differentiable(arguments), fast_mode=True)

    @pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
    def test_strides_do_not_matter(self, name: str, fences: Callable[[], None]) -> None:
        operator, arguments = self.samples()[name]
        function = getattr(OPERATORS, operator)

        def call(*some: Any) -> list[Tensor]:
            made = function(*some)
            return list(made) if isinstance(made, tuple) else [made]

        expected = call(*arguments)
        for at, part in enumerate(arguments):
            if not isinstance(part, Tensor):
                continue
            for layout, laid_out in TestStrides.layouts(part).items():
                changed = (*arguments[:at], laid_out, *arguments[at + 1 :])
                results = call(*changed)
                fences()
                for got, wanted in zip(results, expected, strict=True):
                    assert_near(got, wanted, 1e-12, f"argument {at}, {layout}")

    # torch itself still scripts some of its forward derivatives.
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("impl", ["native", "auto"])
    def test_forward_derivatives_are_right_or_refused(self, impl: Any) -> None:
        # Not silently left out.
        parts = inputs_of(Sizes())
        memory = ChunkedMemory.from_chunks(parts["contents"])
        direction = normal(2, 5, 6)

        def tangent(impl: Any) -> Tensor | None:
            with forward_ad.dual_level():
                route = forward_ad.make_dual(parts["route"], direction)
                value = recall(route, parts["probe"], memory, 3, impl=impl)
                return forward_ad.unpack_dual(value).tangent

        expected = tangent("reference")
        assert expected is not None
        try:
            got = tangent(impl)
        except (ValueError, RuntimeError):
            return
        assert got is not None
        assert_near(got, expected, 1e-12)

    def test_second_derivatives_are_refused(self) -> None:
        # Not silently zero.
        parts = inputs_of(Sizes())
        route, probe = parts["route"].requires_grad_(), parts["probe"].requires_grad_()
        memory = ChunkedMemory.from_chunks(parts["contents"])
        projections = normal(2, 3, 6, 6).requires_grad_()
        for impl in ("native", "projected"):
            if impl == "native":
                value = recall(route, probe, memory, 2, impl=impl)
            else:
                value, _ = attend(route, probe, projections, memory, 2, impl=impl)
            with pytest.raises((RuntimeError, NotImplementedError)):
                (first,) = torch.autograd.grad(value.square().sum(), probe, create_graph=True)
                torch.autograd.grad(first.square().sum(), probe)


WIDTHS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127]
STORED = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def clear_cut(sizes: Sizes, stored: torch.dtype, route: torch.dtype) -> dict[str, Tensor]:
    """Inputs that the dtypes hold exactly, whose kept chunks no rounding changes."""
    parts = inputs_of(sizes)
    # Scores two apart, in a random order.
    b, q, _, m, _, d = sizes
    order = torch.stack([torch.randperm(m) for _ in range(b)]).double()
    parts["route"] = 0.05 * d**-0.5 * parts["route"]
    parts["route"][..., 0] = 1.0 + 0.1 * torch.rand(b, q)
    parts["summaries"][..., 0] = 0.5 * (order - m / 2)
    kept = {"contents": stored, "summaries": stored}
    return {name: part.to(kept.get(name, route)) for name, part in parts.items()}


class TestPrecision:
    @pytest.mark.parametrize("stored", STORED, ids=str)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_tails_of_vectors(
        self, width: int, stored: torch.dtype, fences: Callable[[], None]
    ) -> None:
        number = WIDTHS.index(width)
        exact = torch.promote_types(torch.float32, stored)
        for turn in range(3):
            chunk_size = WIDTHS[(number + 5 * turn) % len(WIDTHS)]
            heads, chunks = (number + 4 * turn) % 9 + 1, (3, 17, 6)[turn]
            sizes = Sizes(2, 3 + turn, heads, chunks, chunk_size, width)
            parts = clear_cut(sizes, stored, exact)
            masked = masks_of(sizes) if turn == 1 else {}
            if turn == 2:
                del parts["positions"]
            parts |= masked
            double = cast(parts, torch.float64)
            cotangent = normal(*parts["probe"].shape).to(torch.bfloat16)
            truth = with_gradients("reference", 2, double, cotangent)
            got = with_gradients("native", 2, parts, cotangent)
            fences()
            if exact == torch.float64:
                assert_all_near(got, truth, 1e-12, str(sizes))
            else:
                plain = with_gradients("reference", 2, parts, cotangent)
                assert_as_accurate(got, plain, truth, str(sizes))

    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    @pytest.mark.parametrize("stored", STORED, ids=str)
    @pytest.mark.parametrize("route", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_dtypes_of_queries_and_memory(
        self, route: torch.dtype, stored: torch.dtype, kind: str
    ) -> None:
        sizes = Sizes(2, 6, 3, 8, 4, 24)
        parts = clear_cut(sizes, stored, route)
        if kind == "steps":
            # Chunks whose means are far apart, too; the oldest lacks a step.
            contents = parts["contents"].double()
            contents[..., 0] = parts["summaries"][..., None, 0].double()
            parts = {name: parts[name] for name in ("route", "probe", "positions")}
            parts["steps"] = contents.flatten(1, 2)[:, 1:].to(stored)
            parts["mask"] = torch.rand(2, 31) < 0.9
        double = cast(parts, torch.float64)
        cotangent = normal(*parts["probe"].shape).to(torch.bfloat16)
        truth = with_gradients("reference", 3, double, cotangent)
        plain = with_gradients("reference", 3, parts, cotangent)
        got = with_gradients("native", 3, parts, cotangent)
        for name, part in got.items():
            assert part.dtype == plain[name].dtype, name
        assert_as_accurate(got, plain, truth)

    @pytest.mark.parametrize("stored", STORED, ids=str)
    def test_summaries_of_another_dtype_than_the_steps(self, stored: torch.dtype) -> None:
        # As the keys of DeepMind's layer may be (`from_haiku`).
        for keys in STORED:
            parts = clear_cut(Sizes(D=24), stored, torch.float32)
            parts["summaries"] = parts["summaries"].to(keys)
            truth = with_gradients("reference", 3, cast(parts, torch.float64))
            plain = with_gradients("reference", 3, parts)
            got = with_gradients("native", 3, parts)
            assert_as_accurate(got, plain, truth, str(keys))

    def test_small_numbers_of_float16_are_not_lost(self) -> None:
        # Not normal in half precision, but in the precision of the sums.
        contents = (4e-6 * torch.randn(2, 5, 4, 9)).half()
        assert contents.abs().max() < torch.finfo(torch.float16).tiny
        route, probe = 1e5 * torch.randn(2, 3, 9), 1e5 * torch.randn(2, 3, 2, 9)
        summaries = torch.randn(2, 5, 9).half()
        memory = memory_of(contents, summaries)
        truth = recall(
            route.double(), probe.double(), memory.to(dtype=torch.float64), 2, impl="reference"
        )
        plain = recall(route, probe, memory, 2, impl="reference")
        allowed = 4 * relative_error(plain, truth)
        assert relative_error(recall(route, probe, memory, 2, impl="native"), truth) <= allowed
        assert allowed < 1e-3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_huge_logits(self, dtype: torch.dtype) -> None:
        parts = inputs_of(Sizes(M=9, C=17, D=19))
        parts |= {"route": 1e4 * parts["route"], "probe": 1e4 * parts["probe"]}
        parts = cast(parts, dtype)
        double = cast(parts, torch.float64)
        truth, plain = (with_gradients("reference", 3, p) for p in (double, parts))
        got = with_gradients("native", 3, parts)
        for name in ("context", "contents"):
            allowed = max(4 * relative_error(plain[name], truth[name]), 1e-9)
            assert relative_error(got[name], truth[name]) <= allowed, name
        for part in got.values():
            assert part.isfinite().all()

    def test_exponentials_over_their_whole_range(self) -> None:
        # Two steps each, logits 0 and -x, values 0 and 1: the context is the second's weight.
        for dtype, tiny in ((torch.float32, 87.0), (torch.float64, 708.0)):
            x = torch.cat([torch.linspace(0, tiny, 1001), torch.tensor([tiny + 50, 1e4, 1e30])])
            x = x.to(dtype)
            contents = torch.zeros(1, len(x), 2, 2, dtype=dtype)
            contents[0, :, 1] = torch.stack([-x, torch.ones_like(x)], -1)
            memory = memory_of(contents)
            # Each query sees a chunk of its own.
            only = torch.eye(len(x), dtype=torch.bool)[None]
            route = torch.zeros(1, len(x), 2, dtype=dtype)
            probe = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, len(x), 1, 2)
            got = recall(route, probe, memory, 1, chunk_mask=only, impl="native")[0, :, 0, 1]
            expected = torch.sigmoid(-x.double())
            error = (got.double() - expected).abs() / expected.clamp(min=torch.finfo(dtype).tiny)
            normal_ones = expected > 2 * torch.finfo(dtype).tiny
            assert error[normal_ones].max() < 8 * torch.finfo(dtype).eps
            assert got[~normal_ones].abs().max() <= 2 * torch.finfo(dtype).tiny


class TestNotANumber:
    NAN, INF = float("nan"), float("inf")

    @pytest.mark.parametrize("width", [1, 6, 33])
    @pytest.mark.parametrize("which", ["route", "probe"])
    def test_in_a_query_is_in_its_context_and_in_no_other(self, which: str, width: int) -> None:
        for dtype in (torch.float32, torch.float64):
            sizes = Sizes(Q=9, C=5, D=width)
            parts = cast(inputs_of(sizes) | masks_of(sizes), dtype)
            parts["valid"][:] = parts["step_mask"][:, :, 0] = True
            parts["chunk_mask"][0, 4, 2] = True
            value = run("native", 3, parts)
            parts[which][0, 4, ..., width // 2] = self.NAN
            dirty = run("native", 3, parts)
            assert dirty[0, 4].isnan().all()
            others = torch.ones(2, 9, dtype=torch.bool)
            others[0, 4] = False
            assert torch.equal(dirty[others], value[others])

    def test_in_one_head_is_not_in_the_others(self) -> None:
        parts = inputs_of(Sizes(H=9))
        value = run("native", 3, parts)
        parts["probe"][0, 2, 5, 3] = self.NAN
        dirty = run("native", 3, parts)
        assert dirty[0, 2, 5].isnan().all()
        dirty[0, 2, 5] = value[0, 2, 5]
        assert torch.equal(dirty, value)

    @pytest.mark.parametrize(
        "scores",
        {
            "inf-once": [1.0, INF, 2.0, 0.0],
            "inf-twice": [INF, 1.0, INF, 0.0],
            "minus-inf-once": [1.0, -INF, 2.0, 0.0],
            "minus-inf-kept": [-INF, -INF, 2.0, -INF],
            "minus-inf-everywhere": [-INF, -INF, -INF, -INF],
            "nan": [0.0, 1.0, NAN, 2.0],
            "nan-and-inf": [INF, 1.0, NAN, 2.0],
            "nan-twice": [NAN, 1.0, 0.0, NAN],
        }.items(),
        ids=lambda item: item[0],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_scores_that_are_no_numbers(
        self, dtype: torch.dtype, scores: tuple[str, list[float]]
    ) -> None:
        summaries = torch.tensor(scores[1], dtype=dtype)[None, :, None]
        contents = torch.randn(1, 4, 3, 1, dtype=dtype)
        route = torch.ones(1, 5, 1, dtype=dtype)
        probe = torch.randn(1, 5, 2, 1, dtype=dtype)
        for k in (1, 2, 3, 4):
            memory = memory_of(contents, summaries)
            got, expected = (
                recall(route, probe, memory, k, impl=impl) for impl in ("native", "reference")
            )
            torch.testing.assert_close(got, expected, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("count", [2, 9, 16, 17])
    def test_logits_that_are_no_numbers(self, count: int, dtype: torch.dtype) -> None:
        # Products beyond the largest number, of contents that are finite.
        big = 1e30 if dtype == torch.float32 else 1e300
        for values in ([big], [-big], [big, big], [-big, -big], [big, -big], [-big] * count):
            for sign in (1.0, -1.0):
                contents = torch.randn(1, 1, count, 1, dtype=dtype)
                contents[0, 0, : len(values), 0] = torch.tensor(values, dtype=dtype)
                memory = memory_of(contents, torch.zeros(1, 1, 1, dtype=dtype))
                route = torch.ones(1, 1, 1, dtype=dtype)
                probe = torch.full((1, 1, 1, 1), sign * big, dtype=dtype)
                got, expected = (
                    recall(route, probe, memory, 1, impl=impl) for impl in ("native", "reference")
                )
                torch.testing.assert_close(got, expected, equal_nan=True)

    @pytest.mark.parametrize("where", ["probe", "cotangent"])
    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    def test_in_a_query_gives_masked_steps_no_gradient(self, kind: str, where: str) -> None:
        parts = inputs_of(Sizes())
        mask = torch.rand(2, 28) < 0.6
        if kind == "steps":
            parts["steps"] = parts.pop("contents").flatten(1, 2)
            parts["mask"] = mask
            del parts["summaries"]
        else:
            parts["step_mask"] = mask.unflatten(1, (7, 4))
        cotangent = normal(2, 5, 3, 6)
        (cotangent if where == "cotangent" else parts["probe"])[0, 1, 2, 3] = self.NAN
        for impl in ("reference", "blocked", "native"):
            gradients = with_gradients(impl, 3, parts, cotangent)
            of_steps = (
                gradients["steps"] if kind == "steps" else gradients["contents"].flatten(1, 2)
            )
            assert of_steps[mask].isnan().any(), impl
            assert torch.equal(of_steps[~mask], torch.zeros_like(of_steps[~mask])), impl


class TestDenormals:
    """The kernel counts them as zero; nobody else shall."""

    TINY = 1e-40

    def halved(self) -> Tensor:
        """Of so many numbers that every thread of torch gets some."""
        return torch.full((2**20,), self.TINY) * 0.5

    @pytest.mark.parametrize("count", [1, 4])
    def test_the_callers_arithmetic_is_as_before(
        self, count: int, threads: Callable[[int], None]
    ) -> None:
        threads(count)
        expected = torch.tensor(self.TINY, dtype=torch.float64).float() * 0.5
        assert expected > 0
        parts = cast(inputs_of(Sizes(Q=70, M=300)), torch.float32)
        memory = memory_of(parts["contents"], parts["summaries"])
        projections = torch.randn(2, 3, 6, 6)
        with_gradients("native", 3, parts)
        attend(parts["route"], parts["probe"], projections, memory, 3, impl="projected")
        assert (self.halved() == expected).all()

    def test_the_callers_own_choice_stays(self, threads: Callable[[int], None]) -> None:
        threads(1)
        parts = cast(inputs_of(Sizes()), torch.float32)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormal numbers")
        try:
            with_gradients("native", 3, parts)
            assert not self.halved().any()
        finally:
            torch.set_flush_denormal(False)
        with_gradients("native", 3, parts)
        assert self.halved().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_inside_they_are_nothing(self, dtype: torch.dtype) -> None:
        tiny = torch.finfo(dtype).tiny
        parts = cast(inputs_of(Sizes()), dtype)
        clean = dict(parts)
        for name in ("contents", "probe", "route"):
            parts[name] = parts[name].clone()
            parts[name][..., 0] = tiny / 4
            clean[name] = parts[name].clone()
            clean[name][..., 0] = 0
        got, expected = with_gradients("native", 3, parts), with_gradients("native", 3, clean)
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


class TestTies:
    """Of equal chunks the older slots are kept, in order."""

    @staticmethod
    def picked(route: Tensor, summaries: Tensor, k: int, chunk_mask: Any = None) -> Tensor:
        return OPERATORS.pick(route, summaries, None, None, chunk_mask, k, 1, 0.0)[0]

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    @pytest.mark.parametrize("k", [1, 4, 100, 300])
    def test_the_lower_index_is_kept(
        self, k: int, count: int, threads: Callable[[int], None]
    ) -> None:
        # Few different scores for many chunks. Threads divide them, into segments of 64 and more.
        threads(count)
        for batch, queries in ((1, 1), (1, 3), (2, 67), (1, 130)):
            route = torch.ones(batch, queries, 1)
            route[:, 1::2] = -1.0
            for values in (1, 3):
                summaries = torch.randint(values, (batch, 300, 1)).float()
                scores = torch.einsum("bqd,bmd->bqm", route, summaries)
                order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
                assert torch.equal(self.picked(route, summaries, k), order)
                # Chunks as means of their steps, here of two equal ones.
                steps = summaries.repeat_interleave(2, 1)
                got, _ = OPERATORS.pick(route, steps, None, None, None, k, 2, 0.0)
                assert torch.equal(got, order)

    def test_among_those_that_may_be_seen(self) -> None:
        seen = torch.rand(2, 9, 300) < 0.3
        got = self.picked(torch.ones(2, 9, 1), torch.zeros(2, 300, 1), 120, seen)
        for row, allowed in zip(got.flatten(0, 1), seen.flatten(0, 1), strict=True):
            expected = allowed.nonzero()[:120, 0]
            assert torch.equal(row[: len(expected)], expected)
            assert (row[len(expected) :] == -1).all()


class TestThreads:
    @pytest.mark.parametrize("kind", ["chunks", "steps", "shared"])
    def test_any_number_gives_the_same_bits(
        self, kind: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Blocks of 3 queries on the way back to the memory.
        monkeypatch.setattr(native, "BLOCK_BYTES", 3 * 2 * 2 * 4 * 4 * 5)
        sizes = Sizes(B=2, Q=67, H=2, M=300, C=4, D=10)
        parts = cast(inputs_of(sizes, shared=kind == "shared"), torch.float32)
        if kind == "steps":
            parts["steps"] = parts.pop("contents").flatten(1, 2)[:, 1:]
            del parts["summaries"]
        # What remains of torch's own sums is not ours to promise.
        del parts["positions"]
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append(with_gradients("native", 5, parts))
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(other[name], value), name

    def test_one_query_over_many_chunks(self, threads: Callable[[int], None]) -> None:
        parts = cast(inputs_of(Sizes(1, 1, 2, 1000, 2, 10)), torch.float32)
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append(OPERATORS.pick(*self.scored(parts), None, None, None, 700, 1, 0.0))
        for picked, weights in results[1:]:
            assert torch.equal(picked, results[0][0])
            assert torch.equal(weights, results[0][1])
        scores = parts["summaries"][0].double() @ parts["route"][0, 0].double()
        assert torch.equal(results[0][0][0, 0, :50], scores.argsort(descending=True)[:50])

    @staticmethod
    def scored(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return parts["route"], parts["summaries"]

    def test_calls_at_once(self) -> None:
        problems = []
        for number in range(4):
            torch.manual_seed(number)
            problems.append(inputs_of(Sizes(B=1 + number, Q=9, M=70 + 60 * number)))
        alone = [with_gradients("native", 3, parts) for parts in problems]
        wrong: list[str] = []

        def work(number: int) -> None:
            for _ in range(10):
                together = with_gradients("native", 3, problems[number])
                wrong.extend(
                    f"{number} {name}"
                    for name, value in alone[number].items()
                    if name != "positions" and not torch.equal(together[name], value)
                )

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong

    def test_backward_in_another_thread(self) -> None:
        parts = inputs_of(Sizes())
        expected = with_gradients("native", 3, parts)
        leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
        context = run("native", 3, leaves)
        cotangent = torch.randn(
            context.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        worker = threading.Thread(target=context.backward, args=(cotangent,))
        worker.start()
        worker.join()
        for name, part in leaves.items():
            assert part.grad is not None
            assert_near(part.grad, expected[name], 1e-14, name)

    def test_inference_mode(self) -> None:
        parts = inputs_of(Sizes()) | masks_of(Sizes())
        expected = run("native", 3, parts)
        with torch.inference_mode():
            assert torch.equal(run("native", 3, parts), expected)
            made_inside = {name: part.clone() for name, part in parts.items()}
            assert torch.equal(run("native", 3, made_inside), expected)


@pytest.mark.parametrize("block", [1, 3 * 2 * 2 * 3 * 4 * 8], ids=["one-query", "three-queries"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_backward_in_blocks(block: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks end inside rows of the batch, and a chunk is picked in several of them.
    sizes = Sizes(B=3, Q=7, H=3, M=5, C=4, D=6)
    parts = inputs_of(sizes, shared)
    parts["chunk_mask"] = torch.rand(3, 7, 5) < 0.6
    parts["chunk_mask"][1, 2] = False
    whole = with_gradients("native", 2, parts)
    monkeypatch.setattr(native, "BLOCK_BYTES", block)
    pieces = with_gradients("native", 2, parts)
    assert_all_near(pieces, whole, 1e-13)
    assert_all_near(pieces, with_gradients("reference", 2, parts), 1e-10)
    over_steps = {name: parts[name] for name in ("route", "probe", "positions", "chunk_mask")}
    over_steps["steps"] = normal(len(parts["contents"]), 18, 6)
    pieces = with_gradients("native", 2, over_steps)
    assert_all_near(pieces, with_gradients("reference", 2, over_steps), 1e-10)


class TestExtraMemory:
    """Beside its results, the kernel holds little, however long the past and however many picks."""

    @staticmethod
    def peak_bytes(kind: str, chunks: int, k: int, backward: bool) -> int:
        torch.manual_seed(0)
        contents = torch.randn(1, chunks, 16, 32)
        if kind == "steps":
            # Ragged and masked: nothing is padded, nothing is blanked.
            mask = torch.rand(1, chunks * 16 - 5) < 0.9
            memory: Any = Steps(contents.flatten(1, 2)[:, 5:], 16, mask, 1e-5)
        else:
            memory = memory_of(contents, step_mask=torch.rand(1, chunks, 16) < 0.9)
        route = torch.randn(1, 64, 32, requires_grad=backward)
        probe = torch.randn(1, 64, 2, 32, requires_grad=backward)

        def call() -> None:
            context = recall(route, probe, memory, k)
            if backward:
                context.sum().backward()

        kernels.scratch_peak(reset=True)
        return peak_allocation(call) + kernels.scratch_peak()

    @pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    def test_is_bounded(self, kind: str, backward: bool) -> None:
        few = self.peak_bytes(kind, 200, 2, backward)
        # Their results alone: context and gradients, 16 KiB each.
        assert few < 256 * 1024
        # Gathered at once, the picks would be 64 * 32 * 16 * 32 * 4 bytes = 4 MiB.
        assert self.peak_bytes(kind, 200, 32, backward) < few + 256 * 1024
        # Scored at once, the chunks would be 64 * 6,400 * 4 bytes = 1.6 MiB, and a copy 13 MiB.
        assert self.peak_bytes(kind, 6_400, 2, backward) < few + 32 * 1024


class TestErrors:
    def test_on_another_device(self) -> None:
        parts = {name: part.to("meta") for name, part in inputs_of(Sizes()).items()}
        with pytest.raises(
            ValueError, match=r"^impl: 'native' expects tensors on the CPU, got meta$"
        ):
            run("native", 3, parts)
        assert run("auto", 3, parts).device.type == "meta"

    def test_a_library_of_another_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Longer(ctypes.Structure):
            _fields_ = [*kernels._Call._fields_, ("more", ctypes.c_int64)]

        monkeypatch.setattr(kernels, "_Call", Longer)
        load = kernels.load.__wrapped__
        with pytest.raises(RuntimeError, match=r"is of another version of this package: install"):
            load()

    def test_scratch_that_is_not_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The kernel says so by a flag in its call; here, a function in its place does.
        function = f"attend_{kernels._NAMES[torch.float64]}_{kernels._NAMES[torch.float64]}"

        class Library:
            def __getattr__(self, name: str) -> Any:
                def fail(call: Any) -> None:
                    call._obj.failed = 1

                return fail if name == function else getattr(library, name)

        library = kernels.load()
        monkeypatch.setattr(kernels, "load", Library)
        with pytest.raises(MemoryError, match=f"^{function}: not enough memory for scratch$"):
            run("native", 3, inputs_of(Sizes()))


def python(code: str, **environment: str) -> str:
    """Run `code` in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HANDFUL = """
import torch
from tests.helpers import assert_near
from tests.ops.test_native import Sizes, cast, inputs_of, kernels, masks_of, with_gradients

torch.manual_seed(0)
print(kernels._PATH.stem)
for sizes in ((), (1, 1, 1, 1, 1, 1), (2, 9, 5, 70, 17, 33), (2, 3, 9, 9, 9, 64)):
    sizes = Sizes(*sizes)
    parts = inputs_of(sizes) | masks_of(sizes)
    got, expected = (with_gradients(impl, 3, parts) for impl in ("native", "reference"))
    for name, value in expected.items():
        assert_near(got[name], value, 1e-10, name)
    low = cast(parts, torch.float32)
    got = with_gradients("native", 3, low)
    plain = with_gradients("reference", 3, low)
    for name, value in expected.items():
        assert_near(got[name], value, 1e-4, name)
"""


def test_the_lower_instruction_level() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    lower = kernels._FOLDER / "recall-x86_64_v3.so"
    if capability != "AVX512" or not lower.exists():
        pytest.skip("no lower level here that has a kernel")
    assert python(HANDFUL, ATEN_CPU_CAPABILITY="avx2") == "recall-x86_64_v3\n"


WITHOUT = """
import torch
from htm_pytorch import ChunkedMemory, HTMAttention, recall
from htm_pytorch.ops import kernels

assert not kernels.IS_AVAILABLE
torch.manual_seed(0)
memory = ChunkedMemory.from_chunks(torch.randn(2, 5, 4, 6))
route, probe = torch.randn(2, 3, 6), torch.randn(2, 3, 2, 6)
auto, plain = (recall(route, probe, memory, 2, impl=impl) for impl in ("auto", "reference"))
torch.testing.assert_close(auto, plain)
queries, memories = torch.randn(2, 3, 6), torch.randn(2, 17, 6)
layer = HTMAttention(6, 2, 2, 4, 3)
auto = layer(queries, memories)
layer.impl = "reference"
torch.testing.assert_close(auto, layer(queries, memories))
for impl in ("native", "projected"):
    layer.impl = impl
    try:
        layer(queries, memories)
    except RuntimeError as error:
        print(error)
"""


def test_where_there_is_no_kernel() -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        pytest.skip("has a kernel for its lowest level")
    lines = python(WITHOUT, ATEN_CPU_CAPABILITY="default").splitlines()
    assert len(lines) == 2
    for impl, line in zip(("native", "projected"), lines, strict=True):
        assert line.startswith(f"impl: '{impl}' has no kernel for this machine (")
        assert line.endswith("; use impl='auto'")
