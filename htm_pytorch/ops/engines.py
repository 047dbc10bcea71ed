"""Who computes a call: the implementations, in the order in which "auto" asks them.

Another one is a class with the members of `Engine`, in a file of its own, and a line in `ENGINES`.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.ops import blocked, fused_triton, native, projected, reference
from htm_pytorch.ops.call import Call
from htm_pytorch.shapes import is_transformed

RecallImpl = Literal["auto", "reference", "blocked", "native", "triton"]
Impl = Literal["auto", "reference", "blocked", "native", "projected", "triton"]


class Picks(NamedTuple):
    """The chunks that each query keeps."""

    chunks: Tensor
    """[B, Q, K] int64, best first; -1 where there are fewer."""
    weights: Tensor
    """[B, Q, K], the softmax of their scores; it has the gradient."""


class Engine(Protocol):
    """An implementation of `recall`."""

    @property
    def name(self) -> str:
        """What it is asked for by."""
        ...

    @property
    def projects(self) -> bool:
        """Whether it is a `Projecting` one."""
        ...

    @property
    def transforms(self) -> bool:
        """Whether it works under `torch.func` and in forward mode."""
        ...

    def refuses(self, call: Call) -> Exception | None:
        """Return why it cannot compute a call, in a sentence; None if it can."""
        ...

    def recall(
        self, call: Call, probe: Tensor, picks: Picks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the context [B, Q, H, D] of the probes, in their dtype, and the kept chunks.

        `picks` are its own, where it has picked already.
        """
        ...


class Projecting(Engine, Protocol):
    """An implementation in two steps, of which the second can be taken in two ways."""

    def pick(self, call: Call) -> Picks:
        """Return what each query keeps."""
        ...

    def attend_projected(
        self, call: Call, queries: Tensor, projections: Tensor, picks: Picks, scale: float
    ) -> Tensor:
        """Return the attended values [B, Q, H, E], with the picked chunks projected once."""
        ...


class _InTwoSteps(ABC):
    """Operators that pick chunks and attend inside them, or to their projections."""

    projects = True
    transforms = False
    prefix = ""

    @abstractmethod
    def pick(self, call: Call) -> Picks: ...

    @abstractmethod
    def attend(self, call: Call, probe: Tensor, picks: Picks) -> Tensor: ...

    def attend_projected(
        self, call: Call, queries: Tensor, projections: Tensor, picks: Picks, scale: float
    ) -> Tensor:
        chunks, weights = picks
        return projected.attend(
            queries, projections, call.memory, call.positions, chunks, weights, scale, self.prefix
        )

    def recall(
        self, call: Call, probe: Tensor, picks: Picks | None = None
    ) -> tuple[Tensor, Tensor]:
        picks = self.pick(call) if picks is None else picks
        return self.attend(call, probe, picks), picks.chunks


class Native(_InTwoSteps):
    """The compiled kernel, on the CPU."""

    name = "native"

    def refuses(self, call: Call) -> Exception | None:
        """Where the kernel is not."""
        return kernels.refusal(call.route.device)

    def pick(self, call: Call) -> Picks:
        """By the kernel, in the dtype of sums."""
        route = call.route.to(call.dtype)
        return Picks(*native.pick(route, call.memory, call.k, call.chunk_mask, call.fading))

    def attend(self, call: Call, probe: Tensor, picks: Picks) -> Tensor:
        """By the kernel, in the dtype of sums."""
        context = native.attend(probe.to(call.dtype), call.memory, call.places, *picks)
        return context.to(probe.dtype)


class Triton(_InTwoSteps):
    """Kernels on a GPU; where they are not asked for, on one that they were tested on."""

    name = "triton"
    prefix = fused_triton.PREFIX

    def refuses(self, call: Call) -> Exception | None:
        """Where Triton or the device is not, or they cannot take so much."""
        if not (call.is_named or fused_triton.is_proven(call.route.device)):
            return ValueError(f"was not tested on {call.route.device}")
        memory = call.memory
        is_chunked = isinstance(memory, ChunkedMemory)
        stored = (memory.contents, memory.summaries) if is_chunked else (memory.steps,)
        kept, steps = min(call.k, memory.chunks), memory.chunks * memory.chunk_size
        tensors = call.route, call.positions, *stored
        return fused_triton.refusal(call.route.device, kept, steps, *tensors)

    def pick(self, call: Call) -> Picks:
        """By a kernel that takes its sums in float32."""
        arguments = call.route, call.memory, call.k, call.chunk_mask, call.fading
        return Picks(*fused_triton.pick(*arguments))

    def attend(self, call: Call, probe: Tensor, picks: Picks) -> Tensor:
        """By a kernel that takes its sums in float32."""
        return fused_triton.attend(probe, call.memory, call.positions, *picks)


class _AtOnce(ABC):
    """Functions of what a `ChunkedMemory` holds, that pick and attend in one."""

    projects = False

    def refuses(self, call: Call) -> Exception | None:
        return None

    @abstractmethod
    def run(self, *arguments: Any) -> tuple[Any, ...]: ...

    def recall(
        self, call: Call, probe: Tensor, picks: Picks | None = None
    ) -> tuple[Tensor, Tensor]:
        exact = call.route.to(call.dtype), probe.to(call.dtype)
        arguments = *exact, call.chunked, call.k, call.places, call.chunk_mask, call.fading
        context, picked, *_ = self.run(*arguments)
        return context.to(probe.dtype), picked.chunks.masked_fill(~picked.kept, -1)


class Blocked(_AtOnce):
    """Plain PyTorch, a few queries at a time."""

    name = "blocked"
    transforms = False

    def run(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the context, the selection, and what else there is."""
        return blocked.recall(*arguments)


class Reference(_AtOnce):
    """Plain PyTorch that can be read."""

    name = "reference"
    transforms = True

    def run(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the context, the selection, and what else there is."""
        return reference.recall(*arguments)


NATIVE, TRITON = Native(), Triton()
ENGINES: tuple[Engine, ...] = (NATIVE, TRITON, Blocked(), Reference())
"""In the order of "auto"."""


def check_impl(impl: str, known: Any = Impl) -> None:
    """Raise a ValueError unless `impl` names an implementation."""
    if impl not in get_args(known):
        raise ValueError(f"impl: expected one of {get_args(known)}, got {impl!r}")


def choose(impl: str, call: Call) -> Engine:
    """Return who computes a call: whom it names, or the first that can.

    Raises:
        ValueError, RuntimeError: the one that is named cannot, and why.
    """
    if impl == "auto":
        for engine in ENGINES:
            if (engine.transforms or not is_transformed()) and engine.refuses(call) is None:
                return engine
    by_name: dict[str, Engine] = {engine.name: engine for engine in ENGINES}
    by_name["projected"] = TRITON if call.route.device.type == "cuda" else NATIVE
    engine = by_name[impl]
    if is_transformed() and not engine.transforms:
        raise ValueError(
            f"impl: expected 'auto' or 'reference' under a torch.func transform, got {impl!r}"
        )
    if (error := engine.refuses(call)) is not None:
        raise type(error)(f"impl: {impl!r} {error}")
    return engine
