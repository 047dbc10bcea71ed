"""The peers that the CPU benchmark compares with, each as a `Peer`: two calls, inputs bound.

Torch layers, ours among them, go through `bind`: the published package htm-pytorch 0.0.4 comes from
`load_published`, dense attention is at the end. `original` is DeepMind's module in JAX, which is
needed only there.
"""

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.nn import from_haiku
from htm_pytorch.nn.positions import sinusoid

PEERS = Path(__file__).parent / ".peers"
RECORDINGS = Path(__file__).parents[1] / "tests" / "nn" / "data" / "original"


class Peer(NamedTuple):
    """A function with its inputs bound: to be compared, then timed."""

    forward: Callable[[], Tensor]
    """Return the output, without gradients."""
    forward_backward: Callable[[], tuple[Tensor, dict[str, Tensor]]]
    """Return the output, and gradients by name: "queries" and each parameter."""
    peak_bytes: int | None = None
    """What `forward` holds beside its inputs; None where torch's allocator can tell."""


def bind(
    run: Callable[..., Tensor], queries: Tensor, *others: Any, cotangent: Tensor | None = None
) -> Peer:
    """Return `run(queries, *others)` as a peer.

    Args:
        run: a module, whose parameters get gradients, or a function.
        queries: the input that gets a gradient.
        *others: inputs that get none.
        cotangent: the gradient of the output; default ones.
    """
    queries = queries.detach().requires_grad_()
    wanted = {"queries": queries}
    if isinstance(run, nn.Module):
        wanted |= dict(run.named_parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return run(queries, *others)

    def forward_backward() -> tuple[Tensor, dict[str, Tensor]]:
        output = run(queries, *others)
        given = torch.ones_like(output) if cotangent is None else cotangent
        # `backward` would add to the gradients of the last call.
        gradients = torch.autograd.grad(output, list(wanted.values()), given)
        return output.detach(), dict(zip(wanted, gradients, strict=True))

    return Peer(forward, forward_backward)


def load_published() -> ModuleType:
    """Return the published package's one module; needs `einops` and, the first time, a network."""
    source = PEERS / "published.py"
    if not source.exists():
        PEERS.mkdir(exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(PEERS)]
        subprocess.run([*fetch, "htm-pytorch==0.0.4"], check=True)
        with zipfile.ZipFile(next(PEERS.glob("*.whl"))) as wheel:
            source.write_bytes(wheel.read("htm_pytorch/htm_pytorch.py"))
    # The package has our name, so its one file is loaded under another.
    spec = importlib.util.spec_from_file_location("published", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original(
    layer: HTMAttention,
    queries: Tensor,
    memory: ChunkedMemory,
    chunk_mask: Tensor | None = None,
    *,
    cotangent: Tensor | None = None,
) -> Peer:
    """Return DeepMind's HierarchicalMemoryAttention with the weights of `layer`, compiled by JAX.

    Equal to `layer(queries, memory, None, chunk_mask)`, except that a query which sees no chunk
    gets the mean over chunks that it may not see. Each projection has a bias if that of `layer`
    has; DeepMind's have none in the router and one everywhere else.

    Args:
        layer: weights and sizes.
        queries: [B, Q, D].
        memory: of batch B; its summaries and contents are the original's keys and contents.
        chunk_mask: [B, Q, M] bool, the chunks that each query may see.
        cotangent: the gradient of the output; default ones.

    Raises:
        ValueError: steps of the memory are masked, for which the original has no means.
    """
    import jax
    import jax.numpy as jnp

    if memory.step_mask is not None:
        raise ValueError("memory: expected step_mask None, got a mask")
    if not memory.valid.all():
        valid = memory.valid[:, None].expand(-1, queries.shape[1], -1)
        chunk_mask = valid if chunk_mask is None else valid & chunk_mask
    positions = None
    if layer.add_pos_enc:
        like = memory.contents
        positions = sinusoid(memory.chunk_size, memory.dim, like.dtype, like.device)
    if cotangent is None:
        cotangent = queries.new_ones(*queries.shape[:2], layer.dim_features)

    def to_jax(tensor: Tensor | None) -> jax.Array | None:
        # Without a copy, of a memory above all.
        return None if tensor is None else jnp.from_dlpack(tensor.detach())

    attend = _original_function(layer.attn.heads, min(layer.topk_mems, memory.chunks))

    def pull_back(cotangent: Any, weights: Any, queries: Any, *memories: Any) -> Any:
        output, gradients = jax.vjp(lambda *x: attend(*x, *memories), weights, queries)
        return output, *gradients(cotangent)

    weights = {name: to_jax(parameter) for name, parameter in layer.named_parameters()}
    memories = memory.summaries, memory.contents, chunk_mask, positions
    inputs = weights, to_jax(queries), *map(to_jax, memories)
    given = to_jax(cotangent)
    # Compiled here, so that nobody times it by accident.
    compiled = jax.jit(attend).lower(*inputs).compile()
    compiled_both = jax.jit(pull_back).lower(given, *inputs).compile()

    def forward() -> Tensor:
        return torch.from_dlpack(compiled(*inputs).block_until_ready())

    def forward_backward() -> tuple[Tensor, dict[str, Tensor]]:
        results = jax.block_until_ready(compiled_both(given, *inputs))
        output, parameters, queries = jax.tree.map(torch.from_dlpack, results)
        return output, {"queries": queries, **parameters}

    usage = compiled.memory_analysis()
    return Peer(forward, forward_backward, usage.temp_size_in_bytes + usage.output_size_in_bytes)


def _original_function(heads: int, k: int) -> Callable[..., Any]:
    """Return f(weights by our names, queries, keys, contents, mask or None, positions or None).

    Organised like DeepMind's: gather the contents of each query's k chunks, then one attention,
    which projects the steps it is given, mapped over picks and queries.
    """
    import jax
    import jax.numpy as jnp

    def linear(weights: Any, name: str, x: Any) -> Any:
        y = x @ weights[f"{name}.weight"].T
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def split_keys_values(weights: Any) -> Any:
        split = dict(weights)
        for part in "weight", "bias":
            if f"attn.to_kv.{part}" in split:
                both = jnp.split(split.pop(f"attn.to_kv.{part}"), 2)
                split[f"attn.to_k.{part}"], split[f"attn.to_v.{part}"] = both
        return split

    def inside(weights: Any, query: Any, steps: Any) -> Any:
        """Attend with all heads of one query [D] in one chunk [C, D]."""
        query = linear(weights, "attn.to_q", query).reshape(heads, -1)
        keys = linear(weights, "attn.to_k", steps).reshape(len(steps), heads, -1)
        values = linear(weights, "attn.to_v", steps).reshape(len(steps), heads, -1)
        logits = jnp.einsum("he,che->hc", query, keys) / query.shape[-1] ** 0.5
        attended = jnp.einsum("hc,che->he", jax.nn.softmax(logits), values)
        return linear(weights, "attn.to_out", attended.reshape(-1))

    inside_all = jax.vmap(jax.vmap(inside, (None, None, 0)), (None, 0, 0))

    def row(weights: Any, queries: Any, keys: Any, contents: Any, mask: Any, positions: Any) -> Any:
        keys = linear(weights, "to_summary_keys", jax.lax.stop_gradient(keys))
        scores = linear(weights, "to_summary_queries", queries) @ keys.T / keys.shape[-1] ** 0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -1e6)
        scores, chunks = jax.lax.top_k(scores, k)
        picked = contents[chunks] if positions is None else contents[chunks] + positions
        recalled = inside_all(weights, queries, jax.lax.stop_gradient(picked))
        return jnp.einsum("qk,qkd->qd", jax.nn.softmax(scores), recalled)

    def attend(
        weights: Any, queries: Any, keys: Any, contents: Any, mask: Any, positions: Any
    ) -> Any:
        axes = None, 0, 0, 0, None if mask is None else 0, None
        weights = split_keys_values(weights)
        return jax.vmap(row, axes)(weights, queries, keys, contents, mask, positions)

    return attend


def verify_original(tolerance: float = 1e-5) -> dict[str, float]:
    """Stop unless `original` gives what DeepMind's module was recorded to give.

    Returns:
        The largest error of each output and gradient, relative to its largest value.
    """
    errors: dict[str, float] = {}
    for path in sorted(RECORDINGS.glob("*.npz")):
        recorded, meta = _read_recording(path)
        layer = _recorded_layer(recorded, meta, "param/")
        memory = ChunkedMemory.from_chunks(recorded["in/contents"], summaries=recorded["in/keys"])
        queries, mask = recorded["in/queries"], recorded.get("in/mask")
        peer = original(layer, queries, memory, mask, cotangent=recorded["in/cotangent"])
        output, results = peer.forward_backward()
        results |= {"forward": peer.forward(), "forward of both": output}
        # The recorded gradients have the form of parameters, so they can be translated alike.
        expected = dict(_recorded_layer(recorded, meta, "grad/").named_parameters())
        expected |= {"queries": recorded["grad_queries"]}
        expected |= dict.fromkeys(["forward", "forward of both"], recorded["out"])
        for name, value in expected.items():
            error = ((results[name] - value).abs().max() / value.abs().max()).item()
            errors[f"{path.stem}: {name}"] = error
            if not error <= tolerance:
                raise SystemExit(f"{path.stem}: {name} is off by {error:.1e} of the largest value")
    if not errors:
        raise SystemExit(f"no recordings in {RECORDINGS}")
    return errors


def _read_recording(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import numpy as np

    with np.load(path) as arrays:
        names = [name for name in arrays.files if name != "meta"]
        recorded = {name: torch.from_numpy(arrays[name]) for name in names}
        return recorded, json.loads(str(arrays["meta"]))


def _recorded_layer(recorded: dict[str, Tensor], meta: dict[str, Any], kind: str) -> HTMAttention:
    haiku = {n.removeprefix(kind): part for n, part in recorded.items() if n.startswith(kind)}
    return from_haiku(haiku, heads=meta["H"], topk_mems=meta["k"], add_pos_enc=meta["pos"])


def dense_cached(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from [B, H, Q, E] to all [B, H, N, E], which somebody projected before and keeps."""
    return scaled_dot_product_attention(queries, keys, values)


class DenseProjected(nn.Module):
    """Attention from [B, H, Q, E] to all steps [B, N, D], which it projects each time."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head)

    def forward(self, queries: Tensor, steps: Tensor) -> Tensor:
        """Return [B, H, Q, E]."""
        keys, values = _split_heads(self.to_kv(steps), 2, self.heads)
        return scaled_dot_product_attention(queries, keys, values)


class CausalSelfAttention(nn.Module):
    """Attention of each step to itself and all earlier ones, with its projections."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, steps: Tensor) -> Tensor:
        """Return [B, N, D]."""
        queries, keys, values = _split_heads(self.to_qkv(steps), 3, self.heads)
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.to_out(attended.transpose(1, 2).flatten(2))


def _split_heads(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Return views [B, H, N, E] of [B, N, parts * H * E]."""
    return projected.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
