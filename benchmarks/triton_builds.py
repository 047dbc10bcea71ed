"""Compile the Triton kernels for GPUs that need not be here, and say what they take of one.

    python benchmarks/triton_builds.py [--shape NAME] [--only KERNEL] [--jobs N] [--json FILE]

Each operator is called on tensors without data, in the main shapes; what it would launch is
compiled for sm_80 and sm_90 instead. Exit status 1 if a kernel does not fit: more shared memory
than there is, or more numbers spilled from registers than is forgiven.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHARED_LIMIT = {80: 163 * 2**10, 90: 227 * 2**10}
"""Bytes of shared memory that one program may have, by architecture."""
FORGIVEN = 8
"""Bytes spilled: the assembler may give up two numbers so that two programs fit on a processor."""
FORGIVEN_ELSEWHERE = 512
"""In other shapes, and where positions get a gradient, for which no layer asks: its are fixed."""


class Shape(NamedTuple):
    """A main shape; B, Q and M only decide how many programs there are."""

    name: str
    H: int
    D: int
    C: int
    k: int


MAIN_SHAPES = [
    Shape("readme", 8, 512, 32, 8),
    Shape("agent", 8, 256, 16, 8),
    Shape("small", 8, 64, 32, 8),
    Shape("large", 12, 1024, 64, 8),
]
# The others must fit, and may spill some numbers.
SHAPES = [*MAIN_SHAPES, Shape("long", 4, 256, 200, 8), Shape("heads", 32, 512, 32, 8)]


class Build(NamedTuple):
    """What one kernel takes, in one shape, on one architecture."""

    kernel: str
    flags: str
    shape: str
    dtype: str
    sm: int
    warps: int
    shared: int
    registers: int
    spilled: int

    @property
    def fits(self) -> bool:
        """Whether it can be launched, and keeps everything where it is fast."""
        is_main = self.shape in {shape.name for shape in MAIN_SHAPES}
        forgiven = FORGIVEN if is_main and "TO_POSITIONS" not in self.flags else FORGIVEN_ELSEWHERE
        return self.shared <= SHARED_LIMIT[self.sm] and self.spilled <= forgiven


def launches(shape: Shape, dtype: torch.dtype, sm: int) -> list[Any]:
    """Return kernel, arguments and keywords of every launch in the shape, each once."""
    from triton.runtime.jit import JITFunction

    from htm_pytorch.ops.triton_kernels import tiles

    seen: list[Any] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        seen.append((kernel, arguments, keywords))

    real = JITFunction.run, tiles.capability
    JITFunction.run, tiles.capability = record, lambda tensor: divmod(sm, 10)
    try:
        _call_all(shape, dtype)
    finally:
        JITFunction.run, tiles.capability = real
    unlike = {}
    for launch in seen:
        unlike.setdefault(_title(launch), launch)
    return list(unlike.values())


def _title(launch: Any) -> tuple[str, str]:
    """Return a kernel's name and flags, which tell the launches of one shape and dtype apart."""
    kernel, _, keywords = launch
    flags = [name for name in kernel.arg_names if keywords.get(name) is True]
    size = [f"{name}={keywords[name]}" for name in ("BLOCK_Q",) if name in keywords]
    name = kernel.__name__.removesuffix("_kernel")
    return name, " ".join(sorted(flags) + size)


def _call_all(shape: Shape, dtype: torch.dtype) -> None:
    from htm_pytorch.ops.triton_kernels.attend import attend
    from htm_pytorch.ops.triton_kernels.attend_backward import attend_backward
    from htm_pytorch.ops.triton_kernels.pick import pick
    from htm_pytorch.ops.triton_kernels.pick_backward import pick_backward
    from htm_pytorch.ops.triton_kernels.projected import attend_projected, attend_projected_backward

    _, H, D, C, k = shape
    B, Q, M = 16, 256, 1024

    def new(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=of, device="meta")

    route, probe = new(B, Q, D), new(B, Q, H, D)
    summaries, steps, positions = new(B, M, D), new(B, M * C, D), new(C, D)
    valid, step_mask = new(B, M, of=torch.bool), new(B, M * C, of=torch.bool)
    chunk_mask = new(B, Q, M, of=torch.bool)
    ageless = None, None, None
    decay = new(B, Q, of=torch.float32)
    fading = decay, decay, new(1, 1, M, of=torch.float32)
    for fades in (ageless, fading):
        picked, weights = pick(route, summaries, valid, None, chunk_mask, *fades, k, 1, 0.0)
        pick(route, steps, None, step_mask, None, *fades, k, C, 0.0)
        pick_backward(weights, route, summaries, None, *fades, picked, weights, 1, 0.0, True)
        pick_backward(weights, route, steps, step_mask, *fades, picked, weights, C, 0.0, True)
        few = (None if part is None else part[:, :1] for part in fades)
        pick(route[:, :1], summaries, valid, None, None, *few, k, 1, 0.0)
    for mask, places in itertools.product((step_mask, None), (positions, None)):
        inside = probe, steps, mask, places, picked, weights, C
        attend(*inside)
        attend_backward(probe, *inside, False, False)
        attend_backward(probe, *inside, True, places is not None)
    queries, rows = new(B, Q, H, 64), new(B * M * C, 2, H, 64)
    for mask in (new(B * M * C, of=torch.bool), None):
        call = queries, rows, mask, picked, weights, C, B, 1.0
        attend_projected(*call)
        attend_projected_backward(queries, *call)


def compiled(kernel: Any, arguments: Any, keywords: dict[str, Any], sm: int) -> Any:
    """Compile one launch as Triton itself would, for `sm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    options = {key: value for key, value in keywords.items() if key not in names}
    given |= {key: value for key, value in keywords.items() if key in names}
    signature, constants, attributes = {}, {}, {}
    declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for at, name in enumerate(names):
        value = given[name]
        if name in declared or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(at,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def build(kernel: Any, arguments: Any, keywords: dict[str, Any], sm: int) -> dict[str, Any]:
    """Return what a launch takes, compiled."""
    made = compiled(kernel, arguments, keywords, sm)
    return {"shared": made.metadata.shared, "warps": made.metadata.num_warps, **_ptxas(made, sm)}


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "i1",
    torch.int64: "i64",
    torch.int32: "i32",
}


def _ptxas(made: Any, sm: int) -> dict[str, int]:
    """Assemble again, for what it says about registers."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(made.asm["ptx"])
        target = re.search(r"^\.target (\w+)", made.asm["ptx"], re.MULTILINE)
        assert target is not None
        done = subprocess.run(
            [get_ptxas(sm).path, "-v", f"--gpu-name={target[1]}", source, "-o", os.devnull],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    said = done.stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return {"registers": int(registers[1]), "spilled": spilled}


def _job(job: tuple[Shape, torch.dtype, int, int]) -> Build:
    shape, dtype, number, sm = job
    launch = launches(shape, dtype, sm)[number]
    return Build(*_title(launch), shape.name, _TYPES[dtype], sm, **build(*launch, sm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--shape", default="", help="one of the shapes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jobs = []
    for shape in SHAPES:
        if options.shape not in ("", shape.name):
            continue
        for dtype in (torch.bfloat16, torch.float32):
            for sm in SHARED_LIMIT:
                for number, launch in enumerate(launches(shape, dtype, sm)):
                    if options.only in launch[0].__name__:
                        jobs.append((shape, dtype, number, sm))
    with ProcessPoolExecutor(options.jobs) as pool:
        builds = []
        for made in pool.map(_job, jobs):
            builds.append(made)
            print(*made, "" if made.fits else "DOES NOT FIT", sep="\t", flush=True)
    if options.json:
        found = [made._asdict() | {"fits": made.fits} for made in builds]
        options.json.write_text(json.dumps(found, indent=1))
    sys.exit(not all(made.fits for made in builds))


if __name__ == "__main__":
    main()
