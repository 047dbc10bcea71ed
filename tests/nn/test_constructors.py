"""Where parameters are made, in which dtype, and what a layer says of itself."""

import inspect

import pytest
import torch
from torch import nn

from htm_pytorch import HTMAttention, HTMBlock, HTMTransformer

SIZES = {"depth": 2, "topk_mems": 2, "mem_chunk_size": 4, "mem_chunks": 3, "window": 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype_of_all_parameters(dtype: torch.dtype) -> None:
    made: list[nn.Module] = [
        HTMAttention(8, inner_bias=True, device="meta", dtype=dtype),
        HTMBlock(8, device="meta", dtype=dtype),
        HTMTransformer(8, **SIZES, device="meta", dtype=dtype),
    ]
    for layer in made:
        kinds = {(parameter.device.type, parameter.dtype) for parameter in layer.parameters()}
        assert kinds == {("meta", dtype)}


def test_a_block_takes_what_its_attention_takes() -> None:
    attention, block = (inspect.signature(kind).parameters for kind in (HTMAttention, HTMBlock))
    assert {name: (p.kind, p.default) for name, p in block.items() if name != "residual"} == {
        name: (p.kind, p.default) for name, p in attention.items()
    }
    given = HTMBlock(
        6, 3, 4, 5, 7, False, 0.5, dim_memory=8, router_bias=False, inner_bias=True,
        detach_memories=False, impl="reference",
    ).attn  # fmt: skip
    assert (given.dim, given.attn.heads, given.topk_mems, given.mem_chunk_size) == (6, 3, 4, 5)
    assert (given.attn.dim_head, given.add_pos_enc, given.eps, given.dim_memory) == (
        7,
        False,
        0.5,
        8,
    )
    assert (given.detach_memories, given.impl) == (False, "reference")
    assert given.to_summary_keys.bias is None
    assert given.attn.to_kv.bias is not None


def test_print_says_the_sizes() -> None:
    text = repr(HTMTransformer(8, **SIZES))
    assert "mem_chunks=3, keep_across_episodes=False" in text
    assert "dim=8, heads=8, topk_mems=2, mem_chunk_size=4, dim_head=64, add_pos_enc=True" in text
    assert "residual='input'" in text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dtype": torch.int64}, "dtype: expected dtype floating point, got torch.int64"),
        ({"dtype": "float32"}, "dtype: expected a torch.dtype, got str"),
        ({"device": "foo"}, "device: expected a torch.device or its name, as 'cpu', got 'foo'"),
        ({"device": 1.5}, "device: expected a torch.device or its name, as 'cpu', got 1.5"),
        ({"detach_memories": None}, "detach_memories: expected a bool, got NoneType"),
        ({"detach_memories": 1}, "detach_memories: expected a bool, got int"),
    ],
)
def test_what_is_wrong_is_told(wrong: dict[str, object], told: str) -> None:
    for make in (
        HTMAttention,
        HTMBlock,
        lambda dim, **given: HTMTransformer(dim, **SIZES, **given),
    ):
        with pytest.raises(ValueError, match=told):
            make(8, **wrong)


def test_whether_episodes_are_kept_is_a_bool() -> None:
    with pytest.raises(ValueError, match="keep_across_episodes: expected a bool, got int"):
        HTMTransformer(8, **SIZES, keep_across_episodes=1)  # pyright: ignore[reportArgumentType]
