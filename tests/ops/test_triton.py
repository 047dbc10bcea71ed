"""The Triton kernels against the plain recall: interpreted on the CPU, or on a GPU.

`make test-triton` runs the first, `make test-gpu` the second, and neither in the environment of
`make test`, which has no Triton.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

# Before Triton is loaded: it looks once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="needs Triton: pip install htm-pytorch[triton]")
pytest.importorskip("numpy", reason="Triton's interpreter needs numpy")

from htm_pytorch import ChunkedMemory  # noqa: E402
from htm_pytorch.memory import Steps  # noqa: E402
from htm_pytorch.ops import attend, fused_triton, projected, recall  # noqa: E402
from htm_pytorch.ops.triton_kernels import attend as attend_kernels  # noqa: E402
from htm_pytorch.ops.triton_kernels import projected as projected_kernels  # noqa: E402
from htm_pytorch.ops.triton_kernels import sources, tiles  # noqa: E402
from tests.helpers import in_a_cuda_graph, memory_of, normal, value_and_gradients  # noqa: E402
from tests.ops import test_recall, triton_launches  # noqa: E402
from tests.ops.native_cases import (  # noqa: E402
    Sizes,
    assert_as_accurate,
    cast,
    clear_cut,
    inputs_of,
    masks_of,
    with_gradients,
)

OPERATORS = torch.ops.htm_pytorch
INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # numpy, interpreting, speaks of numbers that a mask is about to discard.
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def sooner() -> Iterator[None]:
    """The interpreter sets up its language again in every call of a function by a kernel.

    Once is enough, and leaves a quarter of the time.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    interpreter._patch_lang(triton.language.zeros.fn)
    slow = interpreter.InterpretedFunction.__call__
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **keywords: self.rewrite()(
        *args, **keywords
    )
    yield
    interpreter.InterpretedFunction.__call__ = slow


@pytest.fixture(scope="module", autouse=True)
def compiled(sooner: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was interpreted in this module also compiles for a GPU."""
    if not INTERPRETED:
        yield
        return
    seen: dict[triton_launches.Launch, str] = {}
    with triton_launches.noted(seen):
        yield
    if seen:
        problems = triton_launches.compile_all(seen, tmp_path_factory.mktemp("launches"))
        assert not problems, problems


@pytest.fixture(
    params=[
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
    ids=["interpreted", "cuda"],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fused_triton, "IS_INTERPRETED", INTERPRETED)
    yield request.param


def on(device: str, k: int, parts: dict[str, Tensor], cotangent: Any = None) -> dict[str, Tensor]:
    """The context and the gradients by the kernels on `device`, from tensors on the CPU."""
    got = with_gradients("triton", k, parts, cotangent, lambda name, part: part.to(device))
    return {name: part.cpu() for name, part in got.items()}


def check(device: str, k: int, parts: dict[str, Tensor], note: str = "") -> dict[str, Tensor]:
    """As accurate as the reference in the same dtypes, by a float64 run of it."""
    cotangent = normal(*parts["probe"].shape).to(torch.bfloat16)
    truth = with_gradients("reference", k, cast(parts, torch.float64), cotangent)
    plain = with_gradients("reference", k, parts, cotangent)
    got = on(device, k, parts, cotangent)
    for name, part in got.items():
        assert part.dtype == plain[name].dtype, name
    assert_as_accurate(got, plain, truth, note)
    return got


def as_steps(parts: dict[str, Tensor], missing: int, masked: bool) -> dict[str, Tensor]:
    """The same chunks, of 4 steps, as a past given whole, without its first steps."""
    steps = parts["contents"].flatten(1, 2)[:, missing:]
    over = {name: parts[name] for name in ("route", "probe", "positions") if name in parts}
    over["steps"] = steps
    if masked:
        over["mask"] = torch.rand(steps.shape[:2]) < 0.8
    return over


class TestAgainstTheReference:
    @pytest.mark.parametrize(
        "sizes",
        test_recall.CASES.values(),
        ids=[name.split(":")[0] for name in test_recall.CASES],
    )
    def test_of_chunks(self, device: str, sizes: test_recall.Sizes) -> None:
        problem = test_recall.Problem(sizes)
        d = sizes.D
        names = ("route", "probe", "positions", "contents", "summaries")
        parts = dict(zip(names, problem.inputs, strict=True))
        # Softmaxes that are not saturated.
        parts["route"], parts["probe"] = d**-0.5 * parts["route"], d**-0.5 * parts["probe"]
        parts = cast(parts, torch.float32)
        if not sizes.positions:
            del parts["positions"]
        for name in ("valid", "step_mask", "chunk_mask"):
            if getattr(problem, name) is not None:
                parts[name] = getattr(problem, name)
        if (recency := problem.recency(parts["route"])) is not None:
            # Apart from the route, so that each has a gradient of its own.
            fades = {name: part for name, part in recency._asdict().items() if part is not None}
            parts |= {name: part.detach() for name, part in fades.items()}
        check(device, sizes.k, parts)

    @pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
    @pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
    @pytest.mark.parametrize("missing", [0, 3])
    def test_of_steps(self, device: str, missing: int, masked: bool, shared: bool) -> None:
        parts = as_steps(inputs_of(Sizes(D=24), shared), missing, masked)
        parts["chunk_mask"] = torch.rand(2, 5, 7) < 0.8
        check(device, 3, cast(parts, torch.float32))

    @pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 5)], ids=str)
    @pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
    def test_ages(self, device: str, shape: tuple[int, int], shared: bool) -> None:
        """The gradients of ceilings and decays are those of the reference, too."""
        for kind in ("chunks", "steps"):
            parts = inputs_of(Sizes(M=40, D=24), shared)
            parts["route"] = 3 * parts["route"]
            fades = {"ceiling": normal(2, 5), "decay": normal(2, 5)}
            ages = torch.stack([torch.randperm(40) for _ in range(10)]).view(2, 5, 40)
            fades["ages"] = ages[: shape[0], : shape[1]]
            if kind == "steps":
                parts = as_steps(parts, 0, masked=True)
            parts |= fades | {"chunk_mask": torch.rand(2, 5, 40) < 0.8}
            check(device, 3, cast(parts, torch.float32), kind)

    @pytest.mark.parametrize(
        "sizes",
        {
            "long-chunks": Sizes(1, 3, 3, 3, 70, 24),
            "wide": Sizes(1, 2, 2, 3, 3, 300),
            "many-heads": Sizes(1, 2, 19, 3, 4, 24),
            "odd-chunks": Sizes(1, 3, 2, 4, 33, 24),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_of_awkward_sizes(self, device: str, sizes: tuple[str, Sizes]) -> None:
        for masks in ({}, masks_of(sizes[1])):
            check(device, 2, cast(inputs_of(sizes[1]), torch.float32) | masks)

    def test_blocks_of_heads_and_tiles_of_chunks(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As for widths and chunks too large for the interpreter.
        monkeypatch.setattr(tiles, "SUMS", 1)
        for dtype, rows in ((torch.float32, 64), (torch.bfloat16, 32)):
            monkeypatch.setattr(tiles, "ROWS", rows)
            for widest in (0, 512):
                monkeypatch.setattr(tiles, "WIDEST", widest)
                for masked in (False, True):
                    sizes = Sizes(1, 2, 19, 3, 37, 24)
                    parts = clear_cut(sizes, dtype, dtype) | (masks_of(sizes) if masked else {})
                    check(device, 2, parts, f"{dtype}, {widest=}, {masked=}")

    @pytest.mark.parametrize("chunk_size", [4, 20, 64])
    def test_groups_of_chunks(
        self, device: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Several chunks, one, and more of them than the query has picked, in one tile.
        for widest in (0, 512):
            monkeypatch.setattr(tiles, "WIDEST", widest)
            for k in (1, 3, 5):
                sizes = Sizes(1, 2, 3, 6, chunk_size, 24)
                parts = clear_cut(sizes, torch.bfloat16, torch.bfloat16) | masks_of(sizes)
                check(device, k, parts, f"{widest=}, {k=}")

    @pytest.mark.parametrize("chunk_size", [4, 20, 64])
    def test_programs_that_share_the_picks_of_a_query(
        self, device: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Each takes one group of chunks, the last fewer, or one chunk of several tiles.
        monkeypatch.setattr(attend_kernels, "PROGRAMS", 100)
        for dtype in (torch.float32, torch.bfloat16):
            sizes = Sizes(2, 3, 3, 7, chunk_size, 24)
            parts = clear_cut(sizes, dtype, dtype) | masks_of(sizes)
            for k in (1, 5):
                check(device, k, parts, f"{dtype}, {k=}")

    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    @pytest.mark.parametrize("stored", DTYPES, ids=str)
    @pytest.mark.parametrize("route", DTYPES, ids=str)
    def test_dtypes(self, device: str, route: torch.dtype, stored: torch.dtype, kind: str) -> None:
        sizes = Sizes(2, 6, 3, 8, 4, 24)
        parts = clear_cut(sizes, stored, route)
        if kind == "steps":
            contents = parts["contents"].double()
            contents[..., 0] = parts["summaries"][..., None, 0].double()
            parts["contents"] = contents.to(stored)
            parts = as_steps(parts, 1, masked=True)
        check(device, 3, parts)

    def test_positions_of_another_dtype(self, device: str) -> None:
        parts = clear_cut(Sizes(D=24), torch.bfloat16, torch.bfloat16)
        parts["positions"] = normal(4, 24).float()
        check(device, 3, parts)

    def test_strides(self, device: str) -> None:
        parts = cast(inputs_of(Sizes(D=24)) | masks_of(Sizes(D=24)), torch.float32)
        expected = with_gradients("reference", 3, parts)

        def turned(name: str, part: Tensor) -> Tensor:
            turned = part.transpose(0, -1).contiguous().transpose(0, -1)
            return turned.to(device)

        got = with_gradients("triton", 3, parts, None, turned)
        for name, value in expected.items():
            torch.testing.assert_close(got[name].cpu(), value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("count", [1, 3])
    def test_attend(self, device: str, count: int) -> None:
        parts = cast(inputs_of(Sizes(B=count, D=24)), torch.float32)
        memory = ChunkedMemory.from_chunks(parts["contents"])
        queries, projections = torch.randn(count, 5, 3, 8), torch.randn(2, 3, 8, 24)
        arguments = (parts["route"], queries, projections)
        expected, seen = attend(*arguments, memory, 2, impl="reference")
        moved = (part.to(device) for part in arguments)
        got, saw = attend(*moved, memory.to(device=device), 2, impl="triton")
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(saw.cpu(), seen)


class TestPick:
    @staticmethod
    def picked(device: str, route: Tensor, source: Tensor, k: int, **given: Any) -> Tensor:
        arguments = {"valid": None, "step_mask": None, "chunk_mask": None, "size": 1} | given
        masks = (arguments[name] for name in ("valid", "step_mask", "chunk_mask"))
        masks = (None if mask is None else mask.to(device) for mask in masks)
        tensors = route.to(device), source.to(device), *masks
        return OPERATORS.triton_pick(*tensors, None, None, None, k, arguments["size"], 0.0)[0].cpu()

    @pytest.mark.parametrize("k", [1, 4, 30, 150])
    def test_of_equals_the_older_is_kept(self, device: str, k: int) -> None:
        for batch, queries in ((1, 3), (2, 18)):
            route = torch.ones(batch, queries, 1)
            route[:, 1::2] = -1.0
            summaries = torch.randint(3, (batch, 150, 1)).float()
            # Zero is zero, whatever its sign.
            summaries[summaries == 0] *= torch.randn((summaries == 0).sum()).sign()
            scores = torch.einsum("bqd,bmd->bqm", route, summaries)
            order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
            assert torch.equal(self.picked(device, route, summaries, k), order)
            steps = summaries.repeat_interleave(2, 1)
            assert torch.equal(self.picked(device, route, steps, k, size=2), order)

    def test_in_pieces(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        route, steps = torch.randn(2, 3, 6), torch.randn(2, 300, 6)
        mask = torch.rand(2, 300) < 0.7
        seen = torch.rand(2, 3, 150) < 0.7
        given = {"step_mask": mask, "chunk_mask": seen, "size": 2}
        whole = self.picked(device, route, steps, 5, **given)
        monkeypatch.setattr(sources, "MEANS_BYTES", 2 * 6 * 4 * 40)
        assert torch.equal(self.picked(device, route, steps, 5, **given), whole)
        # In chunks of 4.
        parts = {"route": route, "probe": torch.randn(2, 3, 2, 6), "steps": steps[:, :198]}
        parts["mask"] = mask[:, :198]
        check(device, 3, parts)
        fades = {"ceiling": torch.randn(2, 3), "decay": torch.randn(2, 3)}
        check(device, 3, parts | fades | {"ages": torch.randperm(50)[None, None]})

    def test_many_splits(self, device: str) -> None:
        route, summaries = torch.randn(1, 1, 8), torch.randn(1, 2100, 8)
        scores = summaries[0].double() @ route[0, 0].double()
        expected = scores.argsort(descending=True)[:20]
        assert torch.equal(self.picked(device, route, summaries, 20)[0, 0], expected)

    @pytest.mark.parametrize(
        "scores",
        {
            "inf-once": [1.0, float("inf"), 2.0, 0.0],
            "inf-twice": [float("inf"), 1.0, float("inf"), 0.0],
            "minus-inf-once": [1.0, float("-inf"), 2.0, 0.0],
            "minus-inf-kept": [float("-inf"), float("-inf"), 2.0, float("-inf")],
            "minus-inf-everywhere": [float("-inf")] * 4,
            "nan": [0.0, 1.0, float("nan"), 2.0],
            "minus-nan": [0.0, 1.0, -float("nan"), 2.0],
            "nan-and-inf": [float("inf"), 1.0, float("nan"), 2.0],
            "nan-twice": [float("nan"), 1.0, 0.0, float("nan")],
        }.items(),
        ids=lambda item: item[0],
    )
    def test_scores_that_are_no_numbers(self, device: str, scores: tuple[str, list[float]]) -> None:
        parts = {
            "summaries": torch.tensor(scores[1])[None, :, None],
            "contents": torch.randn(1, 4, 3, 1),
            "route": torch.ones(1, 5, 1),
            "probe": torch.randn(1, 5, 2, 1),
        }
        for k in (1, 2, 3, 4):
            memory = memory_of(parts["contents"], parts["summaries"])
            moved = memory.to(device=device)
            inputs = parts["route"], parts["probe"]
            expected = recall(*inputs, memory, k, impl="reference")
            got = recall(*(part.to(device) for part in inputs), moved, k, impl="triton")
            torch.testing.assert_close(got.cpu(), expected, equal_nan=True)


class TestProjected:
    """`attend` with the kept chunks projected once."""

    @staticmethod
    def compare(device: str, sizes: Sizes, k: int, kind: str, masked: bool, note: str = "") -> None:
        parts = inputs_of(sizes)
        masks = masks_of(sizes) if masked else {}
        parts["queries"] = normal(*sizes[:3], 8)
        parts["projections"] = sizes.D**-0.5 * normal(2, sizes.H, 8, sizes.D)
        names = ["route", "queries", "projections", "contents", "positions"]

        def memory_from(contents: Tensor) -> Any:
            if kind == "chunks":
                valid, step_mask = masks.get("valid"), masks.get("step_mask")
                moved = (None if m is None else m.to(contents.device) for m in (valid, step_mask))
                return memory_of(contents, None, *moved)
            mask = masks["step_mask"].flatten(1)[:, 1:].to(contents.device) if masked else None
            return Steps(contents.flatten(1, 2)[:, 1:], sizes.C, mask)

        def plain(*tensors: Tensor) -> Tensor:
            route, queries, projections, contents, positions = tensors
            memory = memory_from(contents)
            given = {"positions": positions, "chunk_mask": masks.get("chunk_mask")}
            return attend(route, queries, projections, memory, k, **given, impl="reference")[0]

        def ours(*tensors: Tensor) -> Tensor:
            route, queries, projections, contents, positions = (p.to(device) for p in tensors)
            memory, mask = memory_from(contents), masks.get("chunk_mask")
            mask = None if mask is None else mask.to(device)
            picked, weights = fused_triton.pick(route, memory, k, mask)
            arguments = queries, projections, memory, positions, picked, weights
            return projected.attend(*arguments, 8**-0.5, fused_triton.PREFIX).cpu()

        def found(function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
            inputs = [parts[name].to(dtype) for name in names]
            value, gradients = value_and_gradients(function, inputs)
            return {"attended": value, **dict(zip(names, gradients, strict=True))}

        truth, low = found(plain, torch.float64), found(plain, torch.float32)
        assert_as_accurate(found(ours, torch.float32), low, truth, note)

    @pytest.mark.parametrize("kind", ["chunks", "steps"])
    @pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
    def test_against_the_reference(
        self, device: str, masked: bool, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for may_look in (True, False):
            monkeypatch.setattr(projected, "may_look_at", lambda tensor, may=may_look: may)
            self.compare(device, Sizes(D=24), 3, kind, masked, f"may look: {may_look}")

    @pytest.mark.parametrize(
        "sizes",
        {
            "one": Sizes(1, 1, 1, 1, 1, 1),
            "long-chunks": Sizes(1, 3, 2, 4, 70, 6),
            "several-tiles-of-queries": Sizes(1, 75, 1, 3, 3, 6),
            "more-k-than-chunks": Sizes(2, 3, 2, 2, 5, 6),
        }.items(),
        ids=lambda item: item[0],
    )
    def test_awkward_sizes(self, device: str, sizes: tuple[str, Sizes]) -> None:
        self.compare(device, sizes[1], 3, "chunks", masked=False)

    def test_some_heads_at_a_time(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(projected_kernels, "PART_BYTES", 2 * 2 * 5 * 3 * 8 * 4)
        self.compare(device, Sizes(D=24), 3, "chunks", masked=True)

    @pytest.mark.gpu
    def test_named(self) -> None:
        parts = cast(inputs_of(Sizes(D=24)), torch.float32)
        memory = ChunkedMemory.from_chunks(parts["contents"])
        arguments = parts["route"], torch.randn(2, 5, 3, 8), torch.randn(2, 3, 8, 24)
        expected, _ = attend(*arguments, memory, 2, impl="reference")
        moved = (part.cuda() for part in arguments)
        got, _ = attend(*moved, memory.to(device="cuda"), 2, impl="projected")
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


class TestGarbage:
    """What nobody may see must not matter, whatever it is."""

    @pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
    @pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
    def test_behind_masks(self, device: str, garbage: float, shared: bool) -> None:
        sizes = Sizes(M=9, D=24)
        parts = cast(inputs_of(sizes, shared), torch.float32) | masks_of(sizes)
        rows = len(parts["contents"])
        parts["valid"], parts["step_mask"] = parts["valid"][:rows], parts["step_mask"][:rows]
        parts["chunk_mask"][:, :, 2] = False
        clean = on(device, 3, parts)
        hidden = ~parts["valid"]
        hidden[:, 2] = True
        dirty = {name: part.clone() for name, part in parts.items()}
        dirty["summaries"][hidden] = garbage
        dirty["contents"][hidden | ~parts["step_mask"].any(-1)] = garbage
        dirty["contents"][~parts["step_mask"]] = garbage
        for name, part in on(device, 3, dirty).items():
            assert torch.equal(part, clean[name]), name

    def test_in_a_query_is_in_its_context_and_in_no_other(self, device: str) -> None:
        for which in ("route", "probe"):
            parts = cast(inputs_of(Sizes(Q=5, H=2, C=5, D=24)), torch.float32)
            value = on(device, 3, parts)["context"]
            parts[which][0, 4, ..., 7] = float("nan")
            dirty = on(device, 3, parts)["context"]
            assert dirty[0, 4].isnan().all()
            others = torch.ones(2, 5, dtype=torch.bool)
            others[0, 4] = False
            assert torch.equal(dirty[others], value[others])

    def test_in_a_query_gives_masked_steps_no_gradient(self, device: str) -> None:
        for kind in ("chunks", "steps"):
            parts = cast(inputs_of(Sizes(D=24)), torch.float32)
            mask = torch.rand(2, 28) < 0.6
            if kind == "steps":
                parts = as_steps(parts, 0, masked=False) | {"mask": mask}
            else:
                parts["step_mask"] = mask.unflatten(1, (7, 4))
            parts["probe"][0, 1, 2, 3] = float("nan")
            found = on(device, 3, parts)
            found = found["steps"] if kind == "steps" else found["contents"].flatten(1, 2)
            assert found[mask].isnan().any()
            assert not found[~mask].any()


def test_the_same_inputs_give_the_same_bits(device: str) -> None:
    parts = cast(inputs_of(Sizes(2, 7, 3, 5, 4, 24), shared=True), torch.float32)
    first, second = (on(device, 3, parts) for _ in range(2))
    for name, part in first.items():
        assert torch.equal(part, second[name]), name


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they run side by side: none may read or overwrite what another writes."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(fused_triton, "IS_INTERPRETED", True)
    # Of several programs for each query: splits of chunks, blocks of heads, slices of the width.
    monkeypatch.setattr(tiles, "SUMS", 1)
    sizes = Sizes(1, 2, 19, 70, 4, 24)
    wide = Sizes(1, 2, 2, 4, 4, 300)
    problems = [cast(inputs_of(some) | masks_of(some), torch.float32) for some in (sizes, wide)]
    problems.append(as_steps(problems[1], 3, masked=True))
    arguments = torch.randn(2, 70, 2, 8), torch.randn(20, 2, 2, 8)
    picked = torch.rand(2, 70, 5).argsort(-1)[..., :3]
    weights, grad = torch.rand(2, 70, 3), torch.randn(2, 70, 2, 8)

    def results() -> list[Tensor]:
        found = [part for parts in problems for part in on("cpu", 3, parts).values()]
        call = *arguments, None, picked, weights, 4, 2, 0.3
        found.append(OPERATORS.triton_attend_projected(*call))
        return [*found, *OPERATORS.triton_attend_projected_backward(grad, *call)]

    forward, seen = results(), []
    set_index = InterpreterBuilder.set_grid_idx

    def from_the_end(self: Any, *at: int) -> None:
        seen.append(at)
        last = (size - 1 for size in self.grid_dim)
        set_index(self, *(end - i for end, i in zip(last, at, strict=True)))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", from_the_end)
    for one, other in zip(forward, results(), strict=True):
        assert torch.equal(one, other)
    assert max(seen) > (0, 0, 0)


def test_extra_memory_is_bounded(device: str) -> None:
    from benchmarks.harness import peak_allocation

    def peak(chunks: int, k: int) -> int:
        contents = torch.randn(1, chunks, 32, 32, device=device)
        memory: Any = memory_of(contents)
        route = torch.randn(1, 4, 32, requires_grad=True, device=device)
        probe = torch.randn(1, 4, 2, 32, requires_grad=True, device=device)

        def call() -> None:
            recall(route, probe, memory, k, impl="triton").sum().backward()

        if device == "cpu":
            return peak_allocation(call)
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    few = peak(100, 2)
    # Gathered at once, the picks would be 4 * 16 * 32 * 32 * 4 bytes = 256 KiB. On a GPU a program
    # takes one pick of a query, and the parts are 4 * 16 * 2 * 32 * 4 bytes = 16 KiB.
    assert peak(100, 16) < few + 32 * 1024
    # Scored at once, the chunks would be 4 * 3,200 * 4 bytes = 50 KiB, and a copy 12.5 MiB.
    assert peak(3_200, 2) < few + 16 * 1024


@pytest.mark.compile
def test_operators(device: str) -> None:
    route, probe, contents = torch.randn(2, 3, 6), torch.randn(2, 3, 2, 6), torch.randn(2, 20, 6)
    mask, positions = torch.rand(2, 20) < 0.8, torch.randn(4, 6)
    moved = (part.to(device) for part in (route, probe, contents, mask, positions))
    route, probe, steps, mask, positions = moved
    picked, weights = OPERATORS.triton_pick(route, steps, None, mask, *(None,) * 4, 2, 4, 0.1)
    grad, grad_picks = torch.randn_like(probe), torch.randn_like(weights)

    def leaf(part: Tensor) -> Tensor:
        return part.clone().requires_grad_()

    inside = (leaf(probe), leaf(steps), mask, leaf(positions), picked, leaf(weights), 4)
    plain = tuple(p.detach() if isinstance(p, Tensor) else p for p in inside)
    limits = leaf(torch.randn(2, 3)), leaf(torch.randn(2, 3))
    fading = tuple(part.to(device) for part in (*limits, torch.rand(1, 1, 5)))
    samples = [("attend", inside), ("attend_backward", (grad, *plain, True, True))]
    for fades in ((None,) * 3, fading):
        kept = tuple(None if part is None else part.detach() for part in fades)
        samples += [
            ("pick", (leaf(route), leaf(steps), None, mask, None, *fades, 2, 4, 0.1)),
            (
                "pick_backward",
                (grad_picks, route, steps, mask, *kept, picked, weights, 4, 0.1, True),
            ),
        ]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for name, arguments in samples:
        packet = getattr(OPERATORS, f"triton_{name}")
        torch.library.opcheck(packet.default, arguments, test_utils=checks)


@pytest.mark.compile
def test_compiles_whole(device: str) -> None:
    contents = torch.randn(2, 5, 4, 6, device=device)
    route = torch.randn(2, 3, 6, device=device, requires_grad=True)
    probe = torch.randn(2, 3, 2, 6, device=device, requires_grad=True)
    memory = ChunkedMemory.from_chunks(contents)

    def function(route: Tensor, probe: Tensor) -> Tensor:
        return recall(route, probe, memory, 2, impl="triton").square()

    expected = function(route, probe)
    wanted = torch.autograd.grad(expected.sum(), (route, probe))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value = compiled(route, probe)
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad(value.sum(), (route, probe))
    torch.testing.assert_close(found, wanted)


def test_autocast_changes_nothing_inside(device: str) -> None:
    parts = cast(inputs_of(Sizes(D=24)), torch.float32)
    expected = on(device, 3, parts)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = on(device, 3, parts)
    for name, part in got.items():
        assert torch.equal(part, expected[name]), name


@pytest.mark.gpu
@pytest.mark.compile
def test_cuda_graph() -> None:
    memory = ChunkedMemory.from_chunks(torch.randn(2, 50, 8, 64, device="cuda"))
    route = torch.randn(2, 3, 64, device="cuda", requires_grad=True)
    probe = torch.randn(2, 3, 4, 64, device="cuda", requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        context = recall(route, probe, memory, 4, impl="triton")
        return context, *torch.autograd.grad(context.square().sum(), (route, probe))

    graph, expected, got = in_a_cuda_graph(call)
    graph.replay()
    for ours, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


class TestRefusals:
    def test_float64(self, device: str) -> None:
        parts = {name: part.to(device) for name, part in inputs_of(Sizes()).items()}
        memory = memory_of(parts["contents"], parts["summaries"])
        with pytest.raises(ValueError, match=r"^impl: 'triton' expects one of .*float64$"):
            recall(parts["route"], parts["probe"], memory, 2, impl="triton")

    def test_more_chunks_than_fit_on_chip(self, device: str) -> None:
        memory = ChunkedMemory.from_chunks(torch.zeros(1, 1030, 1, 2, device=device))
        query = torch.zeros(1, 1, 2, device=device)
        with pytest.raises(ValueError, match=r"^impl: 'triton' expects k <= 1024, got 1030$"):
            recall(query, query[:, :, None], memory, 5_000, impl="triton")

    def test_more_steps_than_are_numbered(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fused_triton, "MOST_STEPS", 12)
        query = torch.zeros(1, 1, 2, device=device)
        chunks = torch.zeros(1, 3, 4, 2, device=device)
        fewer = ChunkedMemory.from_chunks(chunks[:, :2])
        recall(query, query[:, :, None], fewer, 1, impl="triton")
        memory = ChunkedMemory.from_chunks(chunks)
        with pytest.raises(ValueError, match=r"^impl: 'triton' expects fewer than 12 "):
            recall(query, query[:, :, None], memory, 1, impl="triton")

    def test_transforms(self, device: str) -> None:
        parts = {name: part.to(device) for name, part in inputs_of(Sizes()).items()}
        memory = memory_of(parts["contents"], parts["summaries"])

        def function(route: Tensor) -> Tensor:
            return recall(route, parts["probe"], memory, 2, impl="triton").sum()

        with pytest.raises(ValueError, match=r"^impl: expected 'auto' or 'reference' under"):
            torch.func.grad(function)(parts["route"])
