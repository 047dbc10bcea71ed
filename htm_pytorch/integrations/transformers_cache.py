"""`HTMCache`: the cache of a language model of transformers, with the memories of its layers."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from htm_pytorch.memory import ChunkedMemory


class HTMCache(DynamicCache):
    """The keys and values of a model, and beside them the memories of its layers.

    It is used as any other cache of transformers is. An empty `DynamicCache`, such as `generate`
    makes by itself, is turned into one by the first call of a model that has a memory.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.memories: dict[int, ChunkedMemory] = {}
        """By the number of the layer; each memory holds what the layer's block was given."""
        self._length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` [B], as beam search does."""
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [R] alone, in this order."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        for number, memory in self.memories.items():
            rows = torch.arange(memory.batch, device=memory.device).repeat_interleave(repeats)
            self.memories[number] = memory.select_rows(rows)

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.memories.clear()
        self._length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back, as assisted generation does: chunks may have closed."""
        if tokens_to_remove and self.memories:
            raise ValueError(
                f"tokens_to_remove: expected 0, since a memory does not take steps back, got "
                f"{tokens_to_remove}; generate without an assistant, or keep a copy.deepcopy of "
                "the cache"
            )
        super().crop(tokens_to_remove)

    def _select(self, rows: Tensor) -> None:
        for number, memory in self.memories.items():
            self.memories[number] = memory.select_rows(rows.to(memory.device))


def remember(cache: Any, inputs: Tensor, sizes: dict[int, dict[str, int]]) -> None:
    """Turn an empty `DynamicCache` into an `HTMCache`, the same object, which others hold.

    Args:
        cache: what a call of a model is given.
        inputs: of the call, [B, T, ...], which the cache is about to take in.
        sizes: of the memories of the model, by name, of each layer.

    Raises:
        ValueError: it is another cache, or it holds tokens that such memories have not seen.
    """
    if not isinstance(cache, HTMCache):
        _turn(cache)
    held = cache.get_seq_length()
    is_used = held or cache.memories
    if is_used and (held != cache._length or cache.memories.keys() != sizes.keys()):
        raise _missing(cache)
    for number, memory in cache.memories.items():
        for name, expected in {"batch": len(inputs), **sizes[number]}.items():
            if (got := getattr(memory, name)) != expected:
                raise ValueError(
                    f"cache: expected the memory of layer {number} to have {name} {expected}, as "
                    f"the model and its inputs have, got {got}; pass a cache that this model made"
                )
    cache._length = held + inputs.shape[1]


def _turn(cache: Any) -> None:
    if type(cache) is not DynamicCache:
        raise ValueError(
            f"cache: expected an HTMCache, which carries the memories, got "
            f"{type(cache).__name__}; pass HTMCache(config=model.config)"
        )
    if cache.get_seq_length():
        raise _missing(cache)
    cache.__class__ = HTMCache
    turned = cast(HTMCache, cache)
    turned.memories, turned._length = {}, 0


def _missing(cache: DynamicCache) -> ValueError:
    return ValueError(
        f"cache: expected an empty cache, or an HTMCache that models with the same memories alone "
        f"read, got one of {cache.get_seq_length()} tokens ({type(cache).__name__}), whose "
        "memories are missing; read its text again with HTMCache(config=model.config)"
    )
