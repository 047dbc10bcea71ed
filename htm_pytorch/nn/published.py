"""Weights of DeepMind's module, for the layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.nn.attention import HTMAttention
from htm_pytorch.shapes import check_at_least, check_floating, check_tensor

_HAIKU = "hierarchical_memory_attention/"
_HAIKU_NAMES = {
    "to_summary_queries": ["query"],
    "to_summary_keys": ["key"],
    "attn.to_q": ["within_mem_attn/query"],
    "attn.to_kv": ["within_mem_attn/key", "within_mem_attn/value"],
    "attn.to_out": ["within_mem_attn/linear"],
}


def from_haiku(
    params: Mapping[str, Any], *, heads: int, topk_mems: int, add_pos_enc: bool = True
) -> HTMAttention:
    """Return the layer that DeepMind's `HierarchicalMemoryAttention` with `params` is.

    Args:
        params: Haiku's two-level mapping {module: {"w": array, "b": array}}, or flat with keys
            "module:w"; weights are [in, out].
        heads: heads of the attention inside chunks.
        topk_mems: chunks each query keeps.
        add_pos_enc: whether positions are added to the steps.

    The original's keys and contents are `ChunkedMemory.from_chunks(contents, summaries=keys)`, of
    any chunk size.

    Raises:
        ValueError: names the parameter that is missing, unknown or of a wrong shape.
    """
    flat: dict[str, Tensor] = {}
    for module, value in params.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, array in parts:
            key = f"{module}:{name}" if name else module
            flat[key] = torch.as_tensor(array, device="cpu").detach().clone()
    weights = {old for olds in _HAIKU_NAMES.values() for old in olds}
    missing = {f"{_HAIKU}{old}:w" for old in weights} - set(flat)
    unknown = set(flat) - {f"{_HAIKU}{old}:{part}" for old in weights for part in "wb"}
    if missing or unknown:
        raise ValueError(
            f"params: expected those of one hierarchical_memory_attention; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    for key, array in flat.items():
        check_tensor(f"params[{key!r}]", array, "in out" if key.endswith(":w") else "out")
        check_floating(f"params[{key!r}]", array)
    state: dict[str, Tensor] = {}
    for name, olds in _HAIKU_NAMES.items():
        arrays = [flat[f"{_HAIKU}{old}:w"] for old in olds]
        if len({array.shape for array in arrays}) > 1:
            shapes = [list(array.shape) for array in arrays]
            raise ValueError(f"params: expected {olds} of one shape, got {shapes}")
        biases = [flat.get(f"{_HAIKU}{old}:b") for old in olds]
        state[f"{name}.weight"] = torch.cat([array.T for array in arrays])
        if any(bias is not None for bias in biases) or name == "attn.to_out":
            pairs = zip(biases, arrays, strict=True)
            filled = [w.new_zeros(w.shape[1]) if b is None else b for b, w in pairs]
            state[f"{name}.bias"] = torch.cat(filled)
    dim_features, dim = state["to_summary_queries.weight"].shape
    inner = state["attn.to_q.weight"].shape[0]
    check_at_least("heads", heads, 1)
    if inner % heads:
        raise ValueError(f"heads: expected a divisor of the inner width {inner}, got {heads}")
    router, inside = ("to_summary_queries", "to_summary_keys"), ("attn.to_q", "attn.to_kv")
    has_biases = {pair: any(f"{name}.bias" in state for name in pair) for pair in (router, inside)}
    for name in (name for pair, has in has_biases.items() if has for name in pair):
        weight = state[f"{name}.weight"]
        state.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[0]))
    layer = HTMAttention(
        dim,
        heads,
        topk_mems,
        dim_head=inner // heads,
        add_pos_enc=add_pos_enc,
        dim_memory=state["to_summary_keys.weight"].shape[1],
        dim_features=dim_features,
        router_bias=has_biases[router],
        inner_bias=has_biases[inside],
    ).to(state["attn.to_q.weight"].dtype)
    try:
        layer.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"params: shapes that do not fit each other ({error})") from error
    return layer
