"""Arguments that do not fit: an error that names them, never a read beyond the end of an array."""

from typing import Any

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, kernels
from htm_pytorch.memory import Steps
from htm_pytorch.ops import attend, recall
from tests.helpers import normal
from tests.ops.native_cases import OPERATORS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="the operators need the kernel"),
]


def good() -> dict[str, dict[str, Any]]:
    """Arguments of every operator, by name."""
    picked = torch.tensor([0, 2]).expand(2, 5, 2).clone()
    weights = torch.full((2, 5, 2), 0.5, dtype=torch.float64)
    pick = {
        "route": normal(2, 5, 6),
        "source": normal(2, 11, 6),
        "valid": None,
        "step_mask": torch.ones(2, 11, dtype=torch.bool),
        "chunk_mask": torch.ones(2, 5, 3, dtype=torch.bool),
        "ceiling": normal(2, 5),
        "decay": normal(2, 5),
        "ages": normal(2, 5, 3).abs(),
        "k": 2,
        "chunk_size": 4,
        "eps": 0.0,
    }
    inside = {
        "probe": normal(2, 5, 3, 6),
        "steps": normal(2, 11, 6),
        "step_mask": torch.ones(2, 11, dtype=torch.bool),
        "positions": normal(4, 6),
        "picked": picked,
        "weights": weights,
        "chunk_size": 4,
    }
    together = {
        "queries": normal(2, 5, 3, 6),
        "projected": normal(12, 2, 3, 6),
        "step_mask": torch.ones(12, dtype=torch.bool),
        "picked": picked,
        "weights": weights,
        "chunk_size": 4,
        "owners": 1,
        "scale": 1.0,
    }
    return {
        "pick": pick,
        "pick_backward": {
            "grad": normal(2, 5, 2),
            "route": pick["route"],
            "source": pick["source"],
            "step_mask": pick["step_mask"],
            "ceiling": pick["ceiling"],
            "decay": pick["decay"],
            "ages": pick["ages"],
            "picked": picked,
            "weights": weights,
            "chunk_size": 4,
            "eps": 0.0,
            "to_source": True,
        },
        "attend": inside,
        "attend_backward": {
            "grad": normal(2, 5, 3, 6),
            **inside,
            "to_steps": True,
            "to_positions": True,
        },
        "attend_projected": together,
        "attend_projected_backward": {"grad": normal(2, 5, 3, 6), **together},
    }


def call(operator: str, arguments: dict[str, Any]) -> Any:
    return getattr(OPERATORS, operator)(*arguments.values())


def misfits(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors of other sizes along each axis, of fewer and more axes, of other dtypes."""
    made = {"an-axis-more": tensor[None], "an-axis-less": tensor[0]}
    for axis in range(tensor.ndim):
        made[f"shorter-{axis}"] = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        made[f"longer-{axis}"] = torch.cat([tensor, tensor], axis)
    for dtype in (torch.int32, torch.uint8, torch.float16, torch.complex64, torch.bool):
        if dtype != tensor.dtype:
            made[str(dtype)] = tensor.to(dtype)
    return made


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
@pytest.mark.parametrize("operator", good())
def test_misfits_are_refused_or_harmless(operator: str) -> None:
    arguments = good()[operator]
    call(operator, arguments)
    refused = 0
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        for misfit, other in misfits(tensor).items():
            try:
                call(operator, arguments | {name: other})
            except ValueError as error:
                refused += 1
                assert ":" in str(error), f"{name} {misfit}: {error}"
    # A few are calls in their own right: more chunks, steps stored in half precision.
    assert refused >= 20


@pytest.mark.parametrize("number", [3, 4_000_000, 2**62, -2, -(2**62)])
@pytest.mark.parametrize("operator", [name for name in good() if name != "pick"])
def test_picks_that_are_no_chunks(operator: str, number: int) -> None:
    arguments = good()[operator]
    for place in ((0, 0, 0), (1, 4, 1)):
        picked = arguments["picked"].clone()
        picked[place] = number
        with pytest.raises(
            ValueError, match="^picked: expected numbers of chunks, from 0 to 2, or -1"
        ):
            call(operator, arguments | {"picked": picked})
    picked = arguments["picked"].clone()
    picked[1, 4, 1] = -1
    call(operator, arguments | {"picked": picked})


@pytest.mark.parametrize("operator", good())
@pytest.mark.parametrize("size", [0, -1])
def test_chunks_of_no_size(operator: str, size: int) -> None:
    with pytest.raises(ValueError, match="^chunk_size: expected an integer >= 1"):
        call(operator, good()[operator] | {"chunk_size": size})


def unfit_memories() -> dict[str, tuple[Any, str]]:
    memory = ChunkedMemory.from_chunks(normal(1, 4, 4, 8))
    half = torch.ones(1, 4, 4, dtype=torch.bool)
    return {
        "more-summaries": (
            memory._replace(
                summaries=normal(1, 4000, 8), valid=torch.ones(1, 4000, dtype=torch.bool)
            ),
            "memory.summaries: expected shape",
        ),
        "wider-summaries": (
            memory._replace(summaries=normal(1, 4, 9)),
            "memory.summaries: expected shape",
        ),
        "fewer-valid": (memory._replace(valid=memory.valid[:, :3]), "memory.valid: expected shape"),
        "valid-as-numbers": (
            memory._replace(valid=memory.valid.float()),
            "memory.valid: expected dtype torch.bool",
        ),
        "shorter-mask": (
            memory._replace(step_mask=half[..., :3]),
            "memory.step_mask: expected shape",
        ),
        "contents-as-integers": (
            memory._replace(contents=memory.contents.long()),
            "memory.contents: expected dtype",
        ),
        "float8": (
            memory._replace(contents=memory.contents.to(torch.float8_e4m3fn)),
            "memory.contents: expected dtype",
        ),
        "float8-steps": (
            Steps(normal(1, 16, 8).to(torch.float8_e4m3fn), 4),
            "steps: expected dtype",
        ),
        "contents-elsewhere": (
            memory._replace(summaries=memory.summaries.to("meta")),
            "memory.summaries: expected device",
        ),
    }


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked", "native"])
@pytest.mark.parametrize("name", unfit_memories())
def test_a_memory_whose_parts_do_not_fit(name: str, impl: Any) -> None:
    memory, message = unfit_memories()[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        recall(normal(1, 3, 8), normal(1, 3, 2, 8), memory, 2, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "native", "projected", "blocked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64], ids=str)
def test_projections_of_another_dtype(dtype: torch.dtype, impl: Any) -> None:
    memory = ChunkedMemory.from_chunks(normal(1, 5, 2, 8))
    projections = normal(2, 2, 4, 8).to(dtype)
    with pytest.raises(ValueError, match="^projections: expected dtype torch.float64, got"):
        attend(normal(1, 3, 8), normal(1, 3, 2, 4), projections, memory, 2, impl=impl)
