"""One step of a `Layer` by one call of the compiled kernel, where no gradient flows.

An agent that acts takes its steps one by one: small products, whose calls take torch longer than
their work. What is computed is `Layer.forward`, which says how.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from htm_pytorch import kernels
from htm_pytorch.memory import ChunkedMemory
from htm_pytorch.memory.fading import log_ages
from htm_pytorch.nn.affine import is_plain, weight_of
from htm_pytorch.nn.attention import HTMAttention, StepProjections
from htm_pytorch.nn.block import HTMBlock
from htm_pytorch.nn.local import LocalAttention
from htm_pytorch.nn.positions import positions_of
from htm_pytorch.nn.state import LayerState
from htm_pytorch.shapes import may_look_at

MOST_PRODUCTS = 2**23
"""Multiplications of B rows by a weight [D, D]; torch takes larger products in less time."""
_UP = 21
"""Where the weight of the MLP's first layer is among those of a layer: behind ten pairs."""
_Weights = tuple[Tensor | None, ...]
_prepared: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Any]]
_prepared = weakref.WeakKeyDictionary()


def step(layer: Any, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState] | None:
    """Return the outputs [B, 1, D] of a layer with a memory and its state after one step.

    None where the kernel does not do what the layer would: another device or dtype, weights that
    are not what a Linear has, a module that somebody listens to or has replaced.

    Args:
        layer: a `Layer` in whose memory no step begins an episode.
        x: [B, 1, D].
        state: of the layer, held to its sizes.
    """
    if not _may_run(x, state) or (weights := _weights(layer)) is None:
        return None
    memory = state.memory
    assert memory is not None
    if not _fits(layer, x, state, memory):
        return None
    x, keys, values = x.contiguous(), state.keys.contiguous(), state.values.contiguous()
    filled = state.filled.contiguous()
    steps, y = torch.empty_like(x), torch.empty_like(x)
    reached = memory.reach(steps)
    slots, valid = reached.reach.slots, reached.read.valid
    htm = layer.htm.attn
    places = positions_of(htm.dim_memory, memory.chunk_size, x) if htm.add_pos_enc else None
    window = LayerState(None, torch.empty_like(keys), torch.empty_like(values), filled)
    call = _struct(layer, weights)
    recall = call.recall
    recall.threads = torch.get_num_threads()
    recall.batch = recall.memory_batch = x.shape[0]
    recall.chunks = valid.shape[1]
    recall.chunk_size, recall.k = memory.chunk_size, min(htm.topk_mems, valid.shape[1])
    recall.rows, recall.rows_by_batch = slots.contents.data_ptr(), slots.contents.stride(0)
    recall.rows_by_step = slots.contents.stride(2)
    if slots.step_mask is not None:
        recall.step_mask = slots.step_mask.data_ptr()
        recall.step_mask_by_batch = slots.step_mask.stride(0)
    recall.summaries, recall.summaries_by_batch = (
        slots.summaries.data_ptr(),
        slots.summaries.stride(0),
    )
    recall.summaries_by_chunk = slots.summaries.stride(1)
    if (codes := reached.read._ring.codes(recall.k, 1)) is not None:
        recall.codes = codes.struct()
    recall.valid, recall.valid_by_batch = valid.data_ptr(), valid.stride(0)
    recall.positions = None if places is None else places.data_ptr()
    logs = _log_ages(memory.chunks) if htm.recency else None
    if logs is not None:
        call.fading, call.next_slot, call.slots = (
            logs.data_ptr(),
            memory.next_slot.data_ptr(),
            memory.chunks,
        )
    call.keys, call.values, call.filled = keys.data_ptr(), values.data_ptr(), filled.data_ptr()
    call.new_keys, call.new_values = window.keys.data_ptr(), window.values.data_ptr()
    call.x, call.steps, call.y = x.data_ptr(), steps.data_ptr(), y.data_ptr()
    kernels.call("step_f32", call, recall)
    count = (filled + 1).clamp_(max=layer.local.window - 1)
    return y, window._replace(memory=reached.after(), filled=count)


@functools.cache
def _log_ages(chunks: int) -> Tensor:
    """Return log(1 + age) of a ring's chunks, newest first."""
    with torch.inference_mode(False):
        return log_ages(torch.arange(chunks, device="cpu"), torch.float32)


def _may_run(x: Tensor, state: LayerState) -> bool:
    memory = state.memory
    if memory is None or torch.is_grad_enabled() or not kernels.IS_AVAILABLE:
        return False
    if not may_look_at(x) or not 0 < x.numel() * x.shape[2] <= MOST_PRODUCTS:
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
        return False
    return not (torch._C._len_torch_function_stack() or _has_any_global_hook())


def _fits(layer: Any, x: Tensor, state: LayerState, memory: ChunkedMemory) -> bool:
    """Whether what is read and written by address has the sizes that the layer has."""
    batch, _, dim = x.shape
    local, slots, valid = layer.local, memory._ring.read(), memory.valid
    window = batch, local.window - 1, local.heads, local.dim_head
    chunks = batch, valid.shape[1]
    sizes = (
        (x, (batch, 1, layer.htm.attn.dim), torch.float32),
        (state.keys, window, torch.float32),
        (state.values, window, torch.float32),
        (state.filled, (batch,), torch.int64),
        (slots.contents, (*chunks, slots.contents.shape[2], dim), torch.float32),
        (slots.summaries, (*chunks, dim), torch.float32),
        (slots.step_mask, (*chunks, slots.contents.shape[2]), torch.bool),
        (valid, chunks, torch.bool),
        (memory.next_slot, (batch,), torch.int64),
        (memory.open_steps, (batch, slots.contents.shape[2], dim), torch.float32),
    )
    for part, shape, dtype in sizes:
        if part is not None and not (
            _is_usual(part) and part.shape == shape and part.dtype is dtype
        ):
            return False
    return memory.next_slot.is_contiguous() and all(
        part is None or part[:1].is_contiguous()
        for part in (slots.contents, slots.summaries, slots.step_mask, valid)
    )


def _is_usual(part: Tensor) -> bool:
    """Whether a tensor has its numbers in memory, as they are, and nobody else has a say."""
    return (
        type(part) in (Tensor, nn.Parameter)
        and part.layout is torch.strided
        and part.device.type == "cpu"
        and not part.is_neg()
        and (part.data_ptr() != 0 or not part.numel())
    )


def _weights(layer: Any) -> _Weights | None:
    """Return the weights of a layer in the order of `_struct`; None if it is no usual layer."""
    block, local, mlp = layer.htm, layer.local, layer.mlp
    if type(block) is not HTMBlock or type(local) is not LocalAttention:
        return None
    htm = block.attn
    if type(htm) is not HTMAttention or htm.impl not in ("auto", "native"):
        return None
    inner = htm.attn
    if type(mlp) is not nn.Sequential or len(mlp) != 4 or type(inner) is not StepProjections:
        return None
    norms = (local.norm, block.norm, mlp[0])
    linears = (
        local.to_qkv,
        local.to_out,
        htm.to_summary_queries,
        htm.to_summary_keys,
        inner.to_q,
        inner.to_kv,
        inner.to_out,
        mlp[1],
        mlp[3],
        *([htm.to_recency] if htm.recency else []),
    )
    whole = (layer, block, local, mlp, htm, inner)
    known = (
        all(is_plain(module, type(module)) for module in whole)
        and all(is_plain(norm, nn.LayerNorm) for norm in norms)
        and all(is_plain(linear, nn.Linear) for linear in linears)
        and is_plain(mlp[2], nn.GELU)
        and mlp[2].approximate == "none"
    )
    if not known:
        return None
    dim, width = htm.dim, inner.heads * inner.dim_head
    up = weight_of(mlp[1])
    features, hidden = htm.dim_features, 0 if up is None else len(up)
    # What is read by address must have these sizes, whoever put it there.
    shapes = ((dim,), (dim,), (dim,), (3 * width, dim), (dim, width), (features, dim))
    shapes += ((features, dim), (width, dim), (2 * width, dim), (dim, width))
    shapes += ((hidden, dim), (dim, hidden), *([(2, dim)] if htm.recency else []))
    alike = (local.heads, local.dim_head) == (inner.heads, inner.dim_head)
    if (
        not alike
        or htm.dim_memory != dim
        or local.distance_bias.shape != (local.heads, local.window)
    ):
        return None
    weights: list[Tensor | None] = [local.distance_bias]
    for module, shape in zip((*norms, *linears), shapes, strict=True):
        weight, bias = weight_of(module), getattr(module, "bias", None)
        if weight is None or weight.shape != shape:
            return None
        if bias is not None and (not isinstance(bias, Tensor) or bias.shape != shape[:1]):
            return None
        weights += [weight, bias]
    if any(module.bias is None for module in norms):
        return None
    usual = all(weight is None or _is_readable(weight) for weight in weights)
    return tuple(weights) if usual and local.distance_bias.is_contiguous() else None


def _is_readable(weight: Tensor) -> bool:
    """Whether the kernel can read a weight where it lies."""
    if not _is_usual(weight) or weight.dtype is not torch.float32:
        return False
    return weight.stride(-1) == 1 and (weight.ndim == 2 or weight.is_contiguous())


def _struct(layer: Any, weights: _Weights) -> Any:
    """Return a struct of the kernel's own with all that is the same from step to step."""
    local, block = layer.local, layer.htm
    key: list[Any] = [block.residual, local.norm.eps, block.norm.eps, layer.mlp[0].eps]
    key += [local.heads, local.dim_head, local.window, block.attn.dim, block.attn.dim_features]
    for weight in weights:
        key += [0] if weight is None else [weight.data_ptr(), weight.shape, weight.stride()]
    held = _prepared.get(layer)
    if held is None or held[0] != key:
        held = _prepared[layer] = key, _prepare(layer, weights)
    return type(held[1]).from_buffer_copy(held[1])


def _prepare(layer: Any, weights: _Weights) -> Any:
    local, block = layer.local, layer.htm
    htm, up = block.attn, weights[_UP]
    assert up is not None
    pairs = list(zip(weights[1::2], weights[2::2], strict=True))
    norms = [
        kernels.struct("Norm", weight=weight, bias=bias, eps=norm.eps)
        for norm, (weight, bias) in zip((local.norm, block.norm, layer.mlp[0]), pairs, strict=False)
    ]
    affine = [
        kernels.struct("Affine", weight=weight, bias=bias, apart=weight.stride(0))
        for weight, bias in pairs[3:]
        if weight is not None
    ]
    names = "to_qkv to_local summary_queries summary_keys queries keys_values to_out up down"
    recall = kernels.struct(
        "Call",
        **kernels.threads(),
        queries=1,
        heads=htm.attn.heads,
        width=htm.dim,
        dim=htm.dim,
    )
    return kernels.struct(
        "Step",
        recall=recall,
        dim=htm.dim,
        heads=htm.attn.heads,
        width=htm.attn.dim_head,
        window=local.window,
        features=htm.dim_features,
        hidden=up.shape[0],
        distance_bias=weights[0],
        adds_normed=int(block.residual == "normed"),
        **dict(zip(("local_norm", "norm", "mlp_norm"), norms, strict=True)),
        **dict(zip((*names.split(), "recency"), affine, strict=False)),
    )
