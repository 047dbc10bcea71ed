"""What a GPU takes to attend to a memory: ours and its rivals, checked first, then timed.

    python benchmarks/gpu.py [--only NAME] [--repeats N]   on a machine with a CUDA device
    python benchmarks/gpu.py --dry-run                     tiny, on the CPU: checks, no times

Everyone starts from the same route, queries, projections and raw steps. Scoring, choosing, sorting
and projecting count. The published package is a layer, so it meets our layer. Each call is timed as
Python makes it, and replayed as a CUDA graph, which leaves out what Python takes. `dense` is what
torch takes by itself, `flash` FlashAttention-2.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, describe_machine, write
from peers import load_published
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops import Impl, attend, fused_triton, reference

CHECKED = 64
"""Queries that are checked, of the last row."""
MULTIPLE = 16.0
"""Of the error that rounding alone explains: what a result may be off by."""
PATIENCE = 1.0
"""Seconds after which a call is not repeated again, once it was three times."""


class Setting(NamedTuple):
    """Letters of htm_pytorch/shapes.py, and what is measured."""

    B: int
    Q: int
    N: int
    D: int = 512
    H: int = 8
    E: int = 64
    k: int = 8
    C: int = 32
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    backward: bool = False
    rivals: tuple[str, ...] = ("triton", "projected", "blocked", "varlen", "flash", "dense")


SETTINGS = {
    "readme": Setting(1, 128, 20_000),
    "acting": Setting(1024, 1, 1024 * 32, rivals=("triton", "blocked", "varlen")),
    # Not blocked, which would take minutes.
    "64K": Setting(
        1,
        2**16,
        2**16,
        causal=True,
        backward=True,
        rivals=("triton", "projected", "varlen", "flash", "dense"),
    ),
    "training": Setting(
        16,
        2048,
        2048,
        causal=True,
        backward=True,
        rivals=("triton", "projected", "varlen", "flash", "dense"),
    ),
    "long": Setting(1, 128, 2_000_000, rivals=("triton", "blocked", "varlen")),
    "readme fp32": Setting(
        1, 128, 20_000, dtype=torch.float32, rivals=("triton", "blocked", "dense")
    ),
    "acting fp32": Setting(256, 1, 1024 * 32, dtype=torch.float32, rivals=("triton", "blocked")),
}
TINY = {
    "acting": Setting(3, 1, 24, 24, 3, 8, 2, 4, torch.float32),
    "readme": Setting(1, 5, 30, 24, 3, 8, 2, 4, torch.float32),
    "training": Setting(2, 16, 16, 24, 3, 8, 2, 4, torch.float32, True, True),
}


class Inputs(NamedTuple):
    """What everyone gets."""

    setting: Setting
    route: Tensor
    queries: Tensor
    projections: Tensor
    memory: ChunkedMemory
    positions: Tensor
    chunk_mask: Tensor | None
    cotangent: Tensor

    @classmethod
    def draw(cls, setting: Setting, device: str) -> "Inputs":
        """Draw them; the causal ones attend to the chunks that closed before them."""
        torch.manual_seed(0)
        B, Q, N, D, H, E, k, C = setting[:8]

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=setting.dtype).mul_(scale)

        length = N - N % C
        memory = ChunkedMemory.from_chunks(normal(B, length // C, C, D), copy=False)
        mask = None
        if setting.causal:
            last = torch.arange(1, memory.chunks + 1, device=device) * C - 1
            mask = (last < torch.arange(Q, device=device)[:, None]).expand(B, -1, -1)
        # Summaries are means of C steps: with this scale the scores are of order 1.
        return cls(
            setting,
            normal(B, Q, D, scale=2 * (C / D) ** 0.5),
            normal(B, Q, H, E),
            normal(2, H, E, D, scale=D**-0.5),
            memory,
            sinusoid(C, D, setting.dtype, torch.device(device)),
            mask,
            normal(B, Q, H, E),
        )


def ours(impl: Impl) -> Callable[..., Tensor]:
    """Return `attend` by one of our implementations."""

    def run(inputs: Inputs, route: Tensor, queries: Tensor) -> Tensor:
        return attend(
            route,
            queries,
            inputs.projections,
            inputs.memory,
            inputs.setting.k,
            positions=inputs.positions,
            chunk_mask=inputs.chunk_mask,
            impl=impl,
        )[0]

    return run


def varlen(inputs: Inputs, route: Tensor, queries: Tensor) -> Tensor:
    """Pairs of a query and a chunk it keeps, sorted by chunk, in one call of FlashAttention.

    Scored and chosen in plain PyTorch. All chunks are projected once or, where there are fewer
    pairs, those of each pair. Exact: the softmax ends at the border of a chunk, and the mixture is
    a plain sum.
    """
    setting, memory = inputs.setting, inputs.memory
    B, Q, H, E = queries.shape
    k, M, C = min(setting.k, memory.chunks), memory.chunks, setting.C
    scores = _Scores.apply(route, memory.summaries)
    assert isinstance(scores, Tensor)
    if inputs.chunk_mask is not None:
        scores = scores.masked_fill(~inputs.chunk_mask, -torch.inf)
    top, chunks = scores.topk(k)
    kept = top > -torch.inf
    weights = reference.masked_softmax(top, kept).to(queries.dtype)
    row = torch.arange(B, device=route.device)[:, None, None]
    # Pairs that are none go to the last chunk, with weight 0.
    slots = torch.where(kept, row * M + chunks, B * M - 1).flatten()
    if len(slots) < B * M:
        order = torch.arange(len(slots), device=route.device)
        starts = torch.arange(len(slots) + 1, device=route.device, dtype=torch.int32)
        steps = memory.contents.flatten(0, 1)[slots] + inputs.positions
    else:
        order = slots.argsort(stable=True)
        borders = torch.arange(B * M + 1, device=route.device)
        starts = torch.searchsorted(slots[order], borders, out_int32=True)
        steps = memory.contents.flatten(0, 1) + inputs.positions
    keys, values = linear(steps.flatten(0, 1), inputs.projections.flatten(0, 2)).chunk(2, -1)
    # Queries, keys and values of heads side by side: [pairs or steps, H, E].
    pairs = queries.flatten(0, 1)[order // k]
    keys, values = keys.unflatten(-1, (H, E)), values.unflatten(-1, (H, E))
    attended = _varlen_attention(pairs, keys, values, starts, C)
    by_pair = torch.zeros_like(attended).index_copy(0, order, attended)
    return torch.einsum("bqkhe,bqk->bqhe", by_pair.view(B, Q, k, H, E), weights)


class _Scores(torch.autograd.Function):
    """Products of halves, summed and kept in float32; torch has no way back through these."""

    @staticmethod
    def forward(ctx: Any, route: Tensor, summaries: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(summaries)
        exact = {} if route.dtype == torch.float32 else {"out_dtype": torch.float32}
        return torch.bmm(route, summaries.mT, **exact)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (summaries,) = ctx.saved_tensors
        return torch.bmm(grad.to(summaries.dtype), summaries), None


def _varlen_attention(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, chunk_size: int
) -> Tensor:
    """Attend from queries starts[j] to starts[j + 1] to chunk j."""
    if queries.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        step_starts = torch.arange(len(starts), device=starts.device, dtype=torch.int32)
        step_starts = step_starts * chunk_size
        # The longest is not known without waiting; all is a safe bound.
        attended = varlen_attn(queries, keys, values, starts, step_starts, len(queries), chunk_size)
        assert isinstance(attended, Tensor)
        return attended
    parts = []
    for slot, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        steps = slice(slot * chunk_size, (slot + 1) * chunk_size)
        mine = (part.transpose(0, 1) for part in (queries[start:end], keys[steps], values[steps]))
        parts.append(scaled_dot_product_attention(*mine).transpose(0, 1))
    return torch.cat(parts)


def dense(inputs: Inputs, route: Tensor, queries: Tensor) -> Tensor:
    """Attend to every step, keys and values projected: another function, the usual one."""
    del route
    rows = inputs.memory.contents.flatten(1, 2)
    both = linear(rows, inputs.projections.flatten(0, 2))
    keys, values = both.unflatten(-1, (2, *queries.shape[2:])).permute(2, 0, 3, 1, 4).unbind()
    return scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, is_causal=inputs.setting.causal
    ).transpose(1, 2)


def flash(inputs: Inputs, route: Tensor, queries: Tensor) -> Tensor:
    """Do what `dense` does, by FlashAttention-2 on a GPU."""
    if queries.device.type == "cpu":
        return dense(inputs, route, queries)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense(inputs, route, queries)


RIVALS: dict[str, Callable[..., Tensor]] = {
    "triton": ours("triton"),
    "projected": ours("projected"),
    "blocked": ours("blocked"),
    "varlen": varlen,
    "flash": flash,
    "dense": dense,
}


class Truth(NamedTuple):
    """Of some queries of the last row, in float64 from the same inputs."""

    at: Tensor
    attended: Tensor
    grad_queries: Tensor


def sparse_truth(inputs: Inputs) -> Truth:
    """Leave out queries whose last kept chunk is nearly tied with the next: both are right."""
    setting, memory = inputs.setting, inputs.memory
    drawn = torch.randperm(setting.Q, generator=torch.Generator().manual_seed(0))[:CHECKED]
    at = drawn.to(inputs.route.device)
    summaries = memory.summaries[-1]
    scores = torch.cat(
        [inputs.route[-1, at].double() @ part.double().T for part in summaries.split(2**16)], 1
    )
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if inputs.chunk_mask is not None:
        allowed = inputs.chunk_mask[-1, at]
    scores = scores.masked_fill(~allowed, -torch.inf)
    best = scores.topk(min(setting.k + 1, memory.chunks))
    if memory.chunks > setting.k:
        last, following = best.values[:, -2], best.values[:, -1]
        tie = 1e-5 * best.values[:, 0].abs()
        clear = ~(following.isfinite() & (last - following < tie))
        at, best = at[clear], torch.return_types.topk([part[clear] for part in best])
        allowed = allowed[clear]
    if not len(at):
        raise SystemExit("nothing to check: every query is nearly tied")
    chunks = best.indices[:, : setting.k].unique()
    some = ChunkedMemory.from_chunks(
        memory.contents[-1:, chunks].double(), summaries=memory.summaries[-1:, chunks].double()
    )
    # In place of positions in the whole memory, a mask of those chunks that this query keeps.
    mine = torch.zeros(1, len(at), len(chunks), dtype=torch.bool, device=at.device)
    places = torch.searchsorted(chunks, best.indices[:, : setting.k])
    mine.scatter_(2, places[None], allowed.gather(1, best.indices[:, : setting.k])[None])
    queries = inputs.queries[-1:, at].double().requires_grad_()
    attended, _ = attend(
        inputs.route[-1:, at].double(),
        queries,
        inputs.projections.double(),
        some,
        setting.k,
        positions=inputs.positions.double(),
        chunk_mask=mine,
        impl="reference",
    )
    (grad,) = torch.autograd.grad(attended, queries, inputs.cotangent[-1:, at].double())
    return Truth(at, attended.detach()[0], grad[0])


def dense_truth(inputs: Inputs) -> Truth:
    """The plain softmax over all steps."""
    setting = inputs.setting
    at = torch.randperm(setting.Q, generator=torch.Generator().manual_seed(0))[:8]
    at = at.to(inputs.route.device)
    rows = inputs.memory.contents[-1].flatten(0, 1)
    queries = inputs.queries[-1, at].double().requires_grad_()
    heads = []
    for head in range(setting.H):
        keys, values = (rows.double() @ part[head].double().T for part in inputs.projections)
        logits = queries[:, head] @ keys.T * setting.E**-0.5
        if setting.causal:
            later = torch.arange(len(rows), device=at.device) > at[:, None]
            logits = logits.masked_fill(later, -torch.inf)
        heads.append(logits.softmax(-1) @ values)
    attended = torch.stack(heads, 1)
    (grad,) = torch.autograd.grad(attended, queries, inputs.cotangent[-1, at].double())
    return Truth(at, attended.detach(), grad)


def check(name: str, inputs: Inputs, truth: Truth) -> float:
    """Stop unless the rival is right; return its error in units of the dtype's rounding."""
    queries = inputs.queries.detach().requires_grad_()
    attended = RIVALS[name](inputs, inputs.route, queries)
    found = {"attended": attended}
    if inputs.setting.backward:
        (found["grad_queries"],) = torch.autograd.grad(attended, queries, inputs.cotangent)
    unit = torch.finfo(inputs.setting.dtype).eps
    worst = 0.0
    for part, whole in found.items():
        true = getattr(truth, part)
        error = (whole[-1, truth.at].double() - true).abs().max() / true.abs().max()
        # Not `>`, which would let NaN pass. Everyone projects in the dtype of the inputs.
        if not error <= MULTIPLE * unit:
            raise SystemExit(f"{name}: {part} is off by {error:.1e} of the largest value")
        worst = max(worst, float(error) / unit)
    return worst


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call on the device; the first three warm it."""
    times: list[float] = []
    while len(times) < repeats + 3 and (len(times) < 6 or sum(times) < 1e3 * PATIENCE):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def replayed(run: Callable[[], Any], repeats: int) -> float | None:
    """Return the median time of a call as a CUDA graph; None if it cannot be one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print("no CUDA graph:", str(error).partition("\n")[0])
        torch.cuda.synchronize()
        return None
    return milliseconds(graph.replay, repeats)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes held beside what was held before, results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_rates(repeats: int) -> dict[str, float]:
    """Return bytes/s of a copy, read and written, and FLOP/s of a bf16 matrix product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = milliseconds(lambda: a @ b, repeats)
    return {"copy_bandwidth": 2e3 * 2**30 / copy, "gemm_flops": 2e3 * 8192**3 / product}


def measure(name: str, inputs: Inputs, rates: dict[str, float], repeats: int) -> dict[str, Any]:
    """Return times, peak memory and, of ours, what was achieved on the selected rows."""
    setting = inputs.setting
    queries = inputs.queries.detach().requires_grad_()
    route = inputs.route.detach().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return RIVALS[name](inputs, route, queries)

    def both() -> Any:
        attended = RIVALS[name](inputs, route, queries)
        return torch.autograd.grad(attended, (queries, route), inputs.cotangent, allow_unused=True)

    found: dict[str, Any] = {}
    for part, run in {"forward": forward, **({"both": both} if setting.backward else {})}.items():
        found[f"{part}_ms"] = milliseconds(run, repeats)
        found[f"{part}_peak_bytes"] = peak_bytes(run)
        found[f"{part}_graph_ms"] = replayed(run, repeats)
    if name == "triton":
        found |= _inside(inputs, rates, repeats)
    return found


def _inside(inputs: Inputs, rates: dict[str, float], repeats: int) -> dict[str, Any]:
    """Of `pick` and `attend` alone, beside what the device can do."""
    setting, memory = inputs.setting, inputs.memory
    pairs, k = setting.B * setting.Q, min(setting.k, memory.chunks)
    arguments = inputs.route, memory, k, inputs.chunk_mask
    picked, weights = fused_triton.pick(*arguments)
    probe = torch.einsum("bqhe,hed->bqhd", inputs.queries, inputs.projections[0])
    inside = probe, memory, inputs.positions, picked, weights
    pick_ms = replayed(lambda: fused_triton.pick(*arguments), repeats)
    attend_ms = replayed(lambda: fused_triton.attend(*inside), repeats)
    if pick_ms is None or attend_ms is None:
        raise SystemExit("our kernels cannot be captured in a CUDA graph")
    row = setting.D * setting.dtype.itemsize
    rows_bytes = pairs * k * setting.C * row
    flops = 4 * pairs * setting.H * setting.D * k * setting.C
    return {
        "pick_ms": pick_ms,
        "attend_ms": attend_ms,
        # Of the copy's bytes half are reads; rows are only read.
        "pick_bandwidth_share": memory.summaries.nbytes / pick_ms * 1e3 / rates["copy_bandwidth"],
        "attend_bandwidth_share": rows_bytes / attend_ms * 1e3 / rates["copy_bandwidth"],
        "attend_gemm_share": flops / attend_ms * 1e3 / rates["gemm_flops"],
    }


def compare(
    settings: dict[str, Setting], device: str
) -> Iterator[tuple[str, Inputs, dict[str, float]]]:
    """Check every rival in every setting; yield the inputs and errors of each setting."""
    for name, setting in settings.items():
        inputs = Inputs.draw(setting, device)
        errors: dict[str, float] = {}
        sparse = sparse_truth(inputs)
        for rival in setting.rivals:
            if device == "cpu" and rival == "projected":
                # Its way to the GPU needs one; `attend_projected` itself is tested elsewhere.
                continue
            truth = dense_truth(inputs) if rival in ("flash", "dense") else sparse
            errors[rival] = check(rival, inputs, truth)
        yield name, inputs, errors
        del inputs, sparse


class _Moved(nn.Module):
    """The published sinusoid, which is made on the CPU whatever the device."""

    def __init__(self, positions: nn.Module, device: str):
        super().__init__()
        # Not as a child, which would move.
        self.make, self.device = positions.forward, device

    def forward(self, steps: Tensor) -> Tensor:
        return self.make(steps).to(self.device)


def layers(device: str, setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """Return the published layer and ours, with the same weights, in float32."""
    B, Q, N, D, H, E, k, C = setting[:8]
    torch.manual_seed(0)
    layer = HTMAttention(D, H, k, C, E, impl="triton").to(device)
    theirs = load_published().HTMAttention(
        dim=D, heads=H, topk_mems=k, mem_chunk_size=C, dim_head=E
    )
    theirs.load_state_dict(layer.state_dict(), strict=False)
    theirs.pos_emb = _Moved(theirs.pos_emb, device)
    theirs = theirs.to(device)
    queries = torch.randn(B, Q, D, device=device)
    steps = torch.randn(B, N, D, device=device)

    def call(module: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return module(queries, steps)

        return run

    runs = {"published": call(theirs), "ours": call(layer)}
    expected, got = (run() for run in runs.values())
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= 1e-4:
        raise SystemExit(f"layer: differs from the published one by {error:.1e}")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="settings whose name has this")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: checks alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    if options.dry_run:
        for name, _, errors in compare(TINY, "cpu"):
            print(name, *(f"{rival} {error:.1f}" for rival, error in errors.items()))
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and there is none here (see --dry-run)")
    rates = device_rates(options.repeats)
    device = torch.cuda.get_device_name()
    print(device, *(f"{key} {value:.3g}" for key, value in rates.items()))
    result: dict[str, Any] = {
        "machine": describe_machine("torch", "triton") | {"device": device, **rates},
        "settings": {},
    }
    if options.only in "readme":
        runs = layers("cuda", SETTINGS["readme fp32"])
        result["layer"] = {
            rival: {
                "eager_ms": milliseconds(run, options.repeats),
                "graph_ms": replayed(run, options.repeats),
            }
            for rival, run in runs.items()
        }
        print("layer", result["layer"])
        write(options.out, result)
    wanted = {name: s for name, s in SETTINGS.items() if options.only in name}
    for name, inputs, errors in compare(wanted, "cuda"):
        rows = result["settings"][name] = {
            rival: {"error": error, **measure(rival, inputs, rates, options.repeats)}
            for rival, error in errors.items()
        }
        for rival, row in rows.items():
            shown = (f"{key} {value:.4g}" for key, value in row.items() if value is not None)
            print(f"{name:12} {rival:10}", *shown, flush=True)
        # What comes next may fail, or take longer than there is time.
        write(options.out, result)
        # Or the next inputs would be drawn beside these.
        del inputs


if __name__ == "__main__":
    main()
