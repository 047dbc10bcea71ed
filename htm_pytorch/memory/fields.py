"""The parts of a `ChunkedMemory`: their axes, and whether they fit each other."""

import torch
from torch import Tensor

from htm_pytorch.memory.summaries import count_steps
from htm_pytorch.shapes import check_device, check_floating, check_tensor, may_look_at

AXES = {
    "contents": "B M C D",
    "summaries": "B M D",
    "valid": "B M",
    "step_mask": "B M C",
    "open_steps": "B C D",
    "open_count": "B",
    "next_slot": "B",
    "first_steps": "B M",
    "episodes": "B M",
    "step_count": "B",
    "episode": "B",
}
NUMBERS = ("first_steps", "episodes", "step_count", "episode")
"""The parts that older files lack: the numbers of steps and episodes."""
FLOATING = ("contents", "summaries", "open_steps")
BOOLEAN = ("valid", "step_mask")


def check_fields(parts: dict[str, Tensor], prefix: str = "", **sizes: int) -> None:
    """Raise a ValueError unless the parts fit each other and `sizes`, by axis.

    What they say is looked at on the CPU alone.
    """
    contents = parts["contents"]
    check_tensor(f"{prefix}contents", contents, AXES["contents"], **sizes)
    sizes = dict(zip("BMCD", contents.shape, strict=True))
    for name, part in parts.items():
        axes = AXES[name]
        expected = {axis: sizes[axis] for axis in axes.split()}
        is_whole = name == "open_steps" and isinstance(part, Tensor) and part.shape[1:2] == (0,)
        check_tensor(
            f"{prefix}{name}", part, axes, **(expected | {"C": 0} if is_whole else expected)
        )
        check_device(f"{prefix}{name}", part, contents.device)
        if name in FLOATING:
            check_floating(f"{prefix}{name}", part)
        else:
            _check_dtype(f"{prefix}{name}", part, torch.bool if name in BOOLEAN else torch.int64)
    check_floating(f"{prefix}open_steps", parts["open_steps"], contents.dtype)
    if set(NUMBERS) <= set(parts) and may_look_at(contents):
        _check_ranges(parts, prefix)


def check_alike(parts: dict[str, Tensor], others: dict[str, Tensor], prefix: str) -> None:
    """Raise a ValueError unless the parts have the dtypes and the device of the others."""
    for name, other in others.items():
        check_device(f"{prefix}{name}", parts[name], other.device)
        _check_dtype(f"{prefix}{name}", parts[name], other.dtype)
    room = others["open_steps"].shape[1]
    check_tensor(f"{prefix}open_steps", parts["open_steps"], AXES["open_steps"], C=room)


def complete(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parts of a file, with numbers where it is of before steps had numbers.

    Raises:
        ValueError: a part lacks, or does not fit the others.
    """
    needed = set(AXES) - {"step_mask"}
    if needed - set(parts) == set(NUMBERS):
        needed -= set(NUMBERS)
    if set(parts) - {"step_mask"} != needed:
        raise ValueError(f"lacks a part: expected {sorted(needed)}, got {sorted(parts)}")
    check_fields(parts)
    if "first_steps" not in parts:
        parts = parts | _numbers(parts)
        check_fields(parts)
    return parts


def said_to_keep(keep: str | None) -> bool:
    """Return what a file says of `keep_across_episodes`."""
    if keep not in ("0", "1"):
        raise ValueError(f"lacks a part: expected keep_across_episodes to be 0 or 1, got {keep}")
    return keep == "1"


def _numbers(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number the steps of parts that do not say, from the oldest chunk on."""
    valid, next_slot = parts["valid"], parts["next_slot"]
    counts = count_steps(valid, parts.get("step_mask"), parts["contents"].shape[2])
    chunks = valid.shape[1]
    oldest_first = (next_slot[:, None] + torch.arange(chunks, device=valid.device)) % max(chunks, 1)
    ordered = counts.gather(1, oldest_first)
    first_steps = torch.zeros_like(counts).scatter(1, oldest_first, ordered.cumsum(1) - ordered)
    step_count = counts.sum(1) + parts["open_count"]
    return {
        "first_steps": first_steps,
        "episodes": torch.zeros_like(first_steps),
        "step_count": step_count,
        "episode": step_count.clamp(max=1) - 1,
    }


def _check_ranges(parts: dict[str, Tensor], prefix: str) -> None:
    """Raise unless places and numbers are those that some steps could have led to."""
    valid, first_steps, episodes = parts["valid"], parts["first_steps"], parts["episodes"]
    chunks, chunk_size = parts["contents"].shape[1:3]
    room = parts["open_steps"].shape[1]
    closed = parts["step_count"] - parts["open_count"]
    counts = count_steps(valid, parts.get("step_mask"), chunk_size)
    ranges = {
        "open_count": (parts["open_count"], 0, max(room - 1, 0)),
        "next_slot": (parts["next_slot"], 0, max(chunks - 1, 0)),
        "step_count": (parts["step_count"], parts["open_count"], None),
        "episode": (parts["episode"], -1, None),
        "step_mask": (torch.where(valid, counts, 1), 1, chunk_size),
        "first_steps": (
            torch.where(valid, first_steps, 0),
            0,
            torch.where(valid, closed[:, None] - counts, 0),
        ),
        "episodes": (
            torch.where(valid, episodes, 0),
            0,
            torch.where(valid, parts["episode"][:, None], 0),
        ),
    }
    for name, (value, least, most) in ranges.items():
        if bool((value < least).any()) or (most is not None and bool((value > most).any())):
            raise ValueError(f"{prefix}{name}: {_EXPECTED[name]}")


_EXPECTED = {
    "open_count": "expected numbers from 0 to below the size of a chunk, got others",
    "next_slot": "expected slots that there are, got others",
    "step_count": "expected at least the steps of the open chunk, got fewer",
    "episode": "expected numbers of at least -1, got others",
    "step_mask": "expected a step in each valid chunk, got none",
    "first_steps": "expected steps that the row was given before its open chunk, got others",
    "episodes": "expected episodes that the row has begun, got others",
}


def _check_dtype(name: str, part: Tensor, dtype: torch.dtype) -> None:
    if part.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {part.dtype}")
