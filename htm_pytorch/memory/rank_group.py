"""`RankGroup`: the ranks that share a memory; collectives that end in time, or in an error."""

import math
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch import distributed as dist

HEADER = 32
"""Numbers (int64) in the header that ranks compare before they exchange data."""
_OPERATIONS = ("ShardedMemory", "load", "recall", "recall_with_weights", "fetch", "spans")
# What stands in a header for what is no number, counted down from -1.
_MEMORY = "memory (by the order in which they were made)"
_WORDS = (None, torch.float32, torch.float64, torch.bfloat16, torch.float16, *_OPERATIONS)


class ShardError(RuntimeError):
    """A collective did not end: a rank is gone, or did not come within the timeout."""


class _Group:
    """What all memories of a process group have in common."""

    def __init__(self):
        self.memories = 0
        self.lost = ""


_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, _Group]" = weakref.WeakKeyDictionary()


class Fingerprint(NamedTuple):
    """A few numbers that tell tensors apart, whatever the last bits of their entries are."""

    numbers: tuple[float, ...]
    least: float
    """A difference of two such numbers that says that the tensors are others."""

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Return that of a tensor of floats [..., D]."""
        rows = tensor.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)
        down, across = (
            torch.arange(1, size + 1, device=rows.device, dtype=rows.dtype) for size in rows.shape
        )
        shifts = torch.arange(_FINGERPRINTS, device=rows.device, dtype=rows.dtype)
        sums = down.sin() @ (rows @ (across[:, None] * (shifts + 1)).cos())
        norm = float(torch.linalg.vector_norm(rows))
        wide = torch.finfo(tensor.dtype).eps > 1e-4
        return cls((*sums.tolist(), norm), norm * (0.05 if wide else 1e-3))

    def is_other(self, that: Self) -> bool:
        """Whether the tensors cannot be the same but for rounding."""
        pairs = zip(self.numbers, that.numbers, strict=True)
        return any(abs(a - b) > max(self.least, that.least) for a, b in pairs)


_FINGERPRINTS = 4


class RankGroup:
    """The ranks of a process group; each collective is waited for at most `timeout` seconds.

    After a `ShardError`, or an error of one rank in the middle of an exchange, the group is of no
    further use, and each later call says so: ranks may be at different places.

    Args:
        group: a process group that this process belongs to; None: the default one.
        timeout: how many seconds a collective may take.

    Raises:
        ValueError: `group` or `timeout` is not what is expected.
    """

    def __init__(self, group: "dist.ProcessGroup | None", timeout: float):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "group: expected torch.distributed to be initialised; call init_process_group first"
            )
        if group is None:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"group: expected one that this process belongs to, got {group!r}")
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not is_number or not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected seconds > 0, got {timeout!r}")
        # Weakly: a process may abort at its end where its group outlives `destroy_process_group`.
        self._group = weakref.ref(group)
        self._shared = _groups.setdefault(group, _Group())
        # Of the memory, among all that were made over this group; told by `number_memory`.
        self._number = 0
        self.timeout = timeout
        self.rank = group.rank()
        self.size = group.size()

    @property
    def group(self) -> "dist.ProcessGroup":
        """The process group.

        Raises:
            ShardError: it was destroyed.
        """
        group = self._group()
        if group is None:
            raise ShardError("the process group of this memory was destroyed")
        return group

    def all_gather(self, what: str, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, [R, ...]; `what` is for the error.

        Raises:
            ShardError: not all ranks came in time.
        """
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if tensor.numel():
            parts, own = list(gathered.unbind(0)), tensor.contiguous()
            self._finish(f"all_gather of {what}", self.group.allgather, parts, own)
        return gathered

    def gather_texts(
        self, what: str, own: bytes, lengths: Sequence[int], device: torch.device
    ) -> list[bytes]:
        """Return the texts of all ranks, by rank; `lengths` are those that they have, by rank.

        Raises:
            ShardError: not all ranks came in time.
        """
        message = bytearray(own.ljust(max(lengths)))
        gathered = self.all_gather(what, torch.frombuffer(message, dtype=torch.uint8).to(device))
        pairs = zip(gathered.tolist(), lengths, strict=True)
        return [bytes(text)[:length] for text, length in pairs]

    def all_reduce(self, what: str, tensor: Tensor) -> None:
        """Add the contiguous tensors of all ranks, in place; `what` is for the error.

        Raises:
            ShardError: not all ranks came in time.
        """
        if tensor.numel():
            self._finish(f"all_reduce of {what}", self.group.allreduce, tensor)

    def unite(self, what: str, *tensors: Tensor) -> None:
        """Put into contiguous tensors, in place, what one rank has where all others have zeros.

        Raises:
            ShardError: not all ranks came in time.
        """
        # Bytes that are 0 on all ranks but one: their sum is the same bits in every dtype.
        parts = [tensor.view(-1).view(torch.uint8) for tensor in tensors]
        message = torch.cat(parts)
        self.all_reduce(what, message)
        for to, of_all in zip(parts, message.split([len(x) for x in parts]), strict=True):
            to.copy_(of_all)

    def agree(
        self,
        operation: str,
        same: Mapping[str, int | torch.dtype | None],
        own: Sequence[int],
        device: torch.device,
        fingerprints: Mapping[str, Fingerprint] | None = None,
    ) -> list[list[int]]:
        """Compare the arguments of all ranks before any data is exchanged.

        Args:
            operation: what this rank is about to do.
            same: by argument, what must be the same on all ranks.
            own: numbers that may differ, which every rank shall know.
            device: where the tensors lie that this group exchanges.
            fingerprints: by argument, those of tensors that must be the same but for rounding.

        Returns:
            `own` of every rank, by rank.

        Raises:
            ValueError: on all ranks; names the argument, or the ranks that refused theirs.
            ShardError: not all ranks came in time.
        """
        compared = {"operation": operation, _MEMORY: self._number, **same}
        fingerprints = fingerprints or {}
        bits = [
            bit for one in fingerprints.values() for bit in map(_bits, (*one.numbers, one.least))
        ]
        headers = self._headers([0, *map(_encode, compared.values()), *own, *bits], device)
        refused = [rank for rank, header in enumerate(headers) if header[0]]
        if refused:
            raise ValueError(f"arguments: refused on rank {refused}, where the error says why")
        for column, name in enumerate(compared, 1):
            numbers = [header[column] for header in headers]
            for rank, number in enumerate(numbers):
                if number != numbers[0]:
                    raise ValueError(
                        f"{name}: expected the same on all ranks, got {_decode(numbers[0])} "
                        f"on rank 0 and {_decode(number)} on rank {rank}"
                    )
        first = 1 + len(compared)
        at = first + len(own)
        for name in fingerprints:
            every = []
            for header in headers:
                *numbers, least = map(_float, header[at : at + _FINGERPRINTS + 2])
                every.append(Fingerprint(tuple(numbers), least))
            at += _FINGERPRINTS + 2
            for rank, one in enumerate(every):
                if one.is_other(every[0]):
                    raise ValueError(
                        f"{name}: expected the same values on all ranks, got others on rank {rank} "
                        "than on rank 0"
                    )
        return [header[first : first + len(own)] for header in headers]

    def number_memory(self, own: Sequence[int]) -> None:
        """Take the next number for a memory, of those that ranks have told in `agree`."""
        self._number = max(own)
        self._shared.memories = self._number + 1

    @property
    def next_number(self) -> int:
        """The number of the next memory over this group, as far as this rank knows."""
        return self._shared.memories

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Note that ranks are at different places, where an error comes between two exchanges."""
        try:
            yield
        except BaseException as error:
            self._shared.lost = self._shared.lost or repr(error)
            raise

    @contextmanager
    def refusing(self, device: torch.device) -> Iterator[None]:
        """Tell the other ranks of an error inside, so that they raise a ValueError and do not wait.

        They hear of it in `agree`, which must be their next exchange.
        """
        try:
            yield
        except Exception:
            with suppress(ShardError):
                self._headers([1], device)
            raise

    def _headers(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        padded = numbers + [0] * (HEADER - len(numbers))
        header = torch.tensor(padded, dtype=torch.int64, device=device)
        return self.all_gather("the header", header).tolist()

    def _finish(self, what: str, start: Callable[..., Any], *tensors: Any) -> None:
        if self._shared.lost:
            raise ShardError(
                f"{what}: ranks may be at different places since an earlier error "
                f"({self._shared.lost}); make new process groups and load the memory again"
            )
        limit = timedelta(seconds=self.timeout)
        try:
            # The limit twice: a backend may heed it where work begins or where it is awaited.
            start(*tensors, timeout=limit).wait(limit)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            self._shared.lost = repr(error)
            raise ShardError(
                f"{what}: rank {self.rank} of {self.size} did not hear from all others within "
                f"{self.timeout:g} s, or one of them is gone ({reason[0] if reason else error!r})"
            ) from error


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _encode(value: object) -> int:
    return value if isinstance(value, int) else -1 - _WORDS.index(value)


def _decode(number: int) -> object:
    return number if number >= 0 else _WORDS[-1 - number]
