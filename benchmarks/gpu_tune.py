"""How the Triton kernels are best cut on this GPU: each way is checked against ours, then timed.

    python benchmarks/gpu_tune.py [--only NAME] [--repeats N]   on a machine with a CUDA device
    python benchmarks/gpu_tune.py --dry-run                     tiny, on the CPU: checks, no times

Prints, for each kernel and setting of `gpu.py`, every way that fits, the fastest last. All ways are
compiled first, by as many processes as there are processors, on fewer rows and steps.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu import MULTIPLE, SETTINGS, TINY, Inputs, Setting, replayed
from torch import Tensor

from htm_pytorch.ops import fused_triton, projected

Ways = dict[str, tuple[Any, ...]]
"""Values to try, by the name of a constant of a kernel or of its file, of `num_warps` or
`num_stages`."""


class Knob(NamedTuple):
    """A kernel, and where it is decided how it is cut."""

    name: str
    settings: tuple[str, ...]
    module: str
    """That of `triton_kernels` which calls `decide`."""
    decide: str
    """The function that returns a `Launch`."""
    ways: Ways
    run: Callable[["Call"], tuple[Tensor, ...]]


class Call(NamedTuple):
    """Inputs, and what one step of the way takes from the steps before it."""

    inputs: Inputs
    picked: Tensor
    weights: Tensor
    probe: Tensor
    grad: Tensor

    @classmethod
    def of(cls, setting: Setting, device: str) -> "Call":
        """Draw inputs and pick by the kernels as they are."""
        inputs = Inputs.draw(setting, device)
        picked, weights = _pick(inputs)
        probe = torch.einsum("bqhe,hed->bqhd", inputs.queries, inputs.projections[0])
        return cls(inputs, picked, weights, probe, torch.randn_like(probe))


def _pick(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return fused_triton.pick(inputs.route, inputs.memory, inputs.setting.k, inputs.chunk_mask)


def _attend(call: Call) -> tuple[Tensor, ...]:
    inside = call.inputs.memory, call.inputs.positions, call.picked, call.weights
    return (fused_triton.attend(call.probe, *inside),)


def _attend_backward(to_steps: bool) -> Callable[[Call], tuple[Tensor, ...]]:
    def run(call: Call) -> tuple[Tensor, ...]:
        memory, positions = call.inputs.memory, call.inputs.positions
        probe, weights, steps, _ = torch.ops.htm_pytorch.triton_attend_backward(
            call.grad, call.probe, memory.contents.flatten(1, 2), None, positions,
            call.picked, call.weights, memory.chunk_size, to_steps, False,
        )  # fmt: skip
        return (probe, weights, steps) if to_steps else (probe, weights)

    return run


def _projected(call: Call) -> tuple[Tensor, ...]:
    inputs = call.inputs
    queries = inputs.queries.detach().requires_grad_()
    attended = projected.attend(
        queries, inputs.projections, inputs.memory, inputs.positions,
        call.picked, call.weights, inputs.setting.E**-0.5, fused_triton.PREFIX,
    )  # fmt: skip
    return attended.detach(), *torch.autograd.grad(attended, queries, inputs.cotangent)


WARPS_AND_STAGES: Ways = {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
KNOBS = (
    Knob(
        "pick",
        ("acting", "readme", "training", "long", "64K"),
        "pick",
        "keep_launch",
        {"BLOCK_Q": (16, 32, 64), "BLOCK_M": (64, 128), "BLOCK_D": (64, 128)}
        | {"num_warps": (4, 8), "num_stages": (3, 4)},
        lambda call: _pick(call.inputs),
    ),
    Knob(
        "merge",
        ("readme", "64K"),
        "pick",
        "merge_launch",
        {"BLOCK_Q": (1, 2, 4, 8), "num_warps": (1, 2, 4)},
        lambda call: _pick(call.inputs),
    ),
    Knob(
        "attend",
        ("acting", "readme", "training", "long"),
        "attend",
        "blocks",
        {"GROUPS": (1, 2), "PROGRAMS": (1, 2, 4, 8), "num_warps": (4,), "num_stages": (2, 3, 4, 5)},
        _attend,
    ),
    Knob(
        "attend in float32",
        ("acting fp32", "readme fp32"),
        "attend",
        "blocks",
        {"DEPTH": (64, 128, 256, 512), "WIDTH": (128, 256, 512), "PROGRAMS": (1, 4)}
        | {"num_warps": (4, 8), "num_stages": (2, 3)},
        _attend,
    ),
    Knob(
        "queries backward",
        ("readme", "training"),
        "attend_backward",
        "blocks",
        {"GROUPS": (1, 2), "DEPTH": (64, 128, 256)} | WARPS_AND_STAGES,
        _attend_backward(False),
    ),
    Knob(
        "steps backward",
        ("training",),
        "attend_backward",
        "steps_launch",
        {"BLOCK_R": (16, 32, 64), "WIDTH": (128, 256), "DEPTH": (64, 128)}
        | {"num_warps": (4, 8), "num_stages": (2, 3)},
        _attend_backward(True),
    ),
    Knob(
        "projected",
        ("training", "64K"),
        "projected",
        "launch_of",
        {"BLOCK_R": (32, 64, 128)} | WARPS_AND_STAGES,
        _projected,
    ),
)


@contextlib.contextmanager
def cut(knob: Knob, way: dict[str, Any]) -> Iterator[None]:
    """Cut the kernel this way while the block runs."""
    module = importlib.import_module(f"htm_pytorch.ops.triton_kernels.{knob.module}")
    decide = getattr(module, knob.decide)

    def decided(*args: Any, **keywords: Any) -> Any:
        launch = decide(*args, **keywords)
        fields = {name: value for name, value in way.items() if name in launch._fields}
        constants = {name: value for name, value in way.items() if name in launch.constants}
        return launch._replace(constants=launch.constants | constants, **fields)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, knob.decide, decided))
        for name in way.keys() & vars(module).keys():
            stack.enter_context(mock.patch.object(module, name, way[name]))
        yield


def check(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise a ValueError if a result differs by more than rounding; of picks, their order may."""
    for one, other in zip(got, expected, strict=True):
        if not one.is_floating_point():
            if not (one == other).double().mean() > 0.99:
                raise ValueError("other chunks are picked")
            continue
        error = (one.double() - other.double()).abs().max() / other.double().abs().max()
        if not error <= MULTIPLE * torch.finfo(other.dtype).eps + 1e-4:
            raise ValueError(f"off by {error:.1e} of the largest value")


def ways_of(knob: Knob) -> list[dict[str, Any]]:
    """Return ours, which changes nothing, and all others."""
    values = itertools.product(*knob.ways.values())
    return [{}, *(dict(zip(knob.ways, some, strict=True)) for some in values)]


@functools.lru_cache(16)
def _small(setting: Setting) -> Call:
    """As little as is launched in the same way."""
    some = setting._replace(B=min(setting.B, 8), N=min(setting.N, 2**13))
    return Call.of(some._replace(Q=some.N) if setting.causal else some, "cuda")


def _compile(knob: str, setting: Setting, way: dict[str, Any]) -> None:
    (wanted,) = (other for other in KNOBS if other.name == knob)
    with contextlib.suppress(Exception), cut(wanted, way):
        wanted.run(_small(setting))


def compile_ahead(wanted: list[tuple[Knob, Setting]], jobs: int) -> None:
    """Compile all ways, side by side; they are found again on disk."""
    context = multiprocessing.get_context("spawn")
    tasks = [(knob.name, setting, way) for knob, setting in wanted for way in ways_of(knob)]
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        list(pool.map(_compile, *zip(*tasks, strict=True)))


def tune(knob: Knob, setting: Setting, device: str, repeats: int) -> dict[str, float | str]:
    """Return the milliseconds of each way, or why it cannot be taken."""
    call = Call.of(setting, device)
    expected = knob.run(call)
    found: dict[str, float | str] = {}
    for way in ways_of(knob) if device == "cuda" else ways_of(knob)[:2]:
        name = " ".join(f"{key}={value}" for key, value in way.items()) or "ours"
        try:
            with cut(knob, way):
                check(knob.run(call), expected)
                took = replayed(lambda: knob.run(call), repeats) if device == "cuda" else None
        # Triton's own errors for what does not fit or cannot be compiled share no other base.
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        found[name] = "right, not timed" if took is None else took
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--setting", default="", help="settings whose name has this")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: checks alone")
    options = parser.parse_args()
    device, settings = ("cpu", TINY) if options.dry_run else ("cuda", SETTINGS)
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_tune.py needs a CUDA device, and there is none here")
    wanted = [
        (knob, name)
        for knob in KNOBS
        for name in knob.settings
        if name in settings and options.only in knob.name and options.setting in name
    ]
    if device == "cuda":
        compile_ahead([(knob, settings[name]) for knob, name in wanted], options.jobs)
    for knob, name in wanted:
        found = tune(knob, settings[name], device, options.repeats)
        print(f"== {knob.name}, {name}")
        times = {way: took for way, took in found.items() if isinstance(took, float)}
        for way in found.keys() - times.keys():
            print(f"{way:70} {found[way]}")
        for way in sorted(times, key=lambda way: -times[way]):
            print(f"{way:70} {times[way]:.4f} ms", flush=True)


if __name__ == "__main__":
    main()
