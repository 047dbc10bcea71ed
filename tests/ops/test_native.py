"""What only a compiled kernel can get wrong: strides, threads, blocks, addresses, libraries."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import htm_pytorch
from benchmarks.harness import peak_allocation
from htm_pytorch import ChunkedMemory, kernels
from htm_pytorch.memory import Steps
from htm_pytorch.ops import attend, compiled, recall
from tests.helpers import assert_near, memory_of, normal
from tests.ops.native_cases import (
    OPERATORS,
    Sizes,
    assert_all_near,
    cast,
    inputs_of,
    layouts,
    masks_of,
    run,
    with_gradients,
)

ROOT = Path(htm_pytorch.__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


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
        for layout in layouts(subject):

            def seen_as(name: str, part: Tensor, layout: str = layout) -> Tensor:
                return layouts(part)[layout] if name == which else part

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


class TestThreads:
    @pytest.mark.parametrize("kind", ["chunks", "steps", "shared"])
    def test_any_number_gives_the_same_bits(
        self, kind: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Blocks of 3 queries on the way back to the memory.
        monkeypatch.setattr(compiled, "BLOCK_BYTES", 3 * 2 * 2 * 4 * 4 * 5)
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
            results.append(OPERATORS.pick(*self.scored(parts), *(None,) * 6, 700, 1, 0.0))
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
    monkeypatch.setattr(compiled, "BLOCK_BYTES", block)
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
        # One that does not say how its structs are laid out, as any other library would do.
        monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace())
        load = kernels.load.__wrapped__
        with pytest.raises(RuntimeError, match=r"is of another version of this package: install"):
            load()

    def test_a_name_that_no_struct_has(self) -> None:
        with pytest.raises(AttributeError, match="chunk_sise"):
            kernels.struct("Call", chunk_sise=3)

    def test_scratch_that_is_not_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The kernel says so by a flag in its call; here, a function in its place does.
        function = f"attend_{kernels.NAMES[torch.float64]}_{kernels.NAMES[torch.float64]}"

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
from htm_pytorch import kernels
from tests.ops.native_cases import Sizes, cast, inputs_of, masks_of, with_gradients

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
from htm_pytorch import kernels

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
