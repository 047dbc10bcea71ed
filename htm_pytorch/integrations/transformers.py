"""An `HTMBlock` after decoder layers of a causal language model of Hugging Face transformers."""

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from htm_pytorch.memory import ChunkedMemory, Home
from htm_pytorch.memory.home import is_home
from htm_pytorch.nn import HTMBlock
from htm_pytorch.ops import Impl
from htm_pytorch.shapes import check_at_least, check_kind, check_number, may_look_at

try:
    from safetensors import safe_open
    from transformers import PreTrainedModel

    from htm_pytorch.integrations.transformers_cache import HTMCache, remember
    from htm_pytorch.integrations.transformers_layers import check_attends, decoder_layers
except ImportError as error:
    raise ImportError(
        "htm_pytorch.integrations.transformers needs transformers: "
        "pip install 'htm-pytorch[transformers]'"
    ) from error

__all__ = ["HTMCache", "add_memory", "add_stored_memory", "load_memory"]

PAST, STORED = "htm", "htm_stored"
"""The names of the blocks in a decoder layer: for its own past, and for a stored memory."""


def add_memory(
    model: PreTrainedModel,
    layers: Iterable[int],
    *,
    topk_mems: int = 4,
    mem_chunk_size: int = 32,
    mem_chunks: int = 1024,
    heads: int = 8,
    dim_head: int = 64,
    detach_memories: bool = True,
    impl: Impl = "auto",
) -> None:
    """Give some decoder layers of a causal language model a memory of their own past.

    What a layer returns goes through an `HTMBlock`, the child `htm` of that layer, which recalls
    from what it was given before: steps can be recalled once their chunk is full, and are numbered
    in their order, padding left out. Where `position_ids` fall back inside a row, another text
    begins, which recalls nothing of those before it. The block adds zero at first, so the model
    computes exactly what it did before. The model's parameters keep their names.

    The memories travel in an `HTMCache`, beside keys and values: feeding a text in pieces equals
    feeding it whole, and no gradient goes from piece to piece through a memory. Without a cache,
    as in training, a call remembers within itself.

    Args:
        model: a decoder, such as Llama, Qwen, Mistral or GPT-2; it is changed in place.
        layers: the numbers of the layers, from 0.
        topk_mems: how many chunks a step recalls.
        mem_chunk_size: how many steps a chunk holds.
        mem_chunks: how many chunks a layer remembers before it forgets the oldest; a cache takes
            the room for all of them at once.
        heads: how many heads attend inside each chunk.
        dim_head: how many numbers a query has in each head.
        detach_memories: whether gradients stop at the memories, as in the paper; otherwise they
            flow through the steps of the current call.
        impl: which implementation of `recall` computes it.

    Raises:
        ValueError: there is no such layer, it has a memory already, or the model has no decoder
            layers that can be found, none whose attention is causal, or no attention at all.
    """
    check_attends(model)
    check_at_least("mem_chunks", mem_chunks, 1)

    def make(dim: int, **made: Any) -> HTMBlock:
        return HTMBlock(
            dim,
            heads,
            topk_mems,
            mem_chunk_size,
            dim_head,
            detach_memories=detach_memories,
            impl=impl,
            **made,
        )

    def hook(number: int, dim: int) -> Callable[..., Any]:
        call = _call_of(model)
        call.sizes[number] = {"chunks": mem_chunks, "chunk_size": mem_chunk_size, "dim": dim}
        return _Past(number, call).after

    _add(model, layers, PAST, make, hook)


def add_stored_memory(
    model: PreTrainedModel,
    layers: Iterable[int],
    memory: Home | ChunkedMemory,
    *,
    topk_mems: int = 4,
    heads: int = 8,
    dim_head: int = 64,
    impl: Impl = "auto",
) -> None:
    """Let some decoder layers read a memory that is given, and is not written by them.

    It is one that `htm_pytorch.memory.open` returns, or a `ChunkedMemory`; of one row, which all
    texts share, or of a row for each text. Its steps may be of any width. The block, the child
    `htm_stored` of the layer, adds zero at first.

    Args:
        model: as for `add_memory`, which may be called for the same layers.
        layers: the numbers of the layers, from 0.
        memory: what is read.
        topk_mems: how many chunks a step recalls.
        heads: how many heads attend inside each chunk.
        dim_head: how many numbers a query has in each head.
        impl: which implementation of `recall` computes it.

    Raises:
        ValueError: as for `add_memory`; or `memory` is none.
    """
    if not (isinstance(memory, ChunkedMemory) or is_home(memory)):
        raise ValueError(f"memory: expected a memory, got {type(memory).__name__}")

    def make(dim: int, **made: Any) -> HTMBlock:
        sizes = heads, topk_mems, memory.chunk_size, dim_head
        return HTMBlock(dim, *sizes, dim_memory=memory.dim, impl=impl, **made)

    _add(model, layers, STORED, make, lambda *_: _Reader(memory).after)


def load_memory(model: PreTrainedModel, folder: str | Path) -> None:
    """Load the weights of a model's memory blocks from what `model.save_pretrained` wrote.

    `from_pretrained` makes the model without them; add them as before, then load.

    Raises:
        FileNotFoundError: there is no safetensors file in the folder.
        ValueError: a weight is missing or has another shape, or the model has no memory.
    """
    check_kind("model", model, nn.Module, "a model with a memory")
    parts = f".{PAST}.", f".{STORED}."
    wanted = {name: p for name, p in model.state_dict().items() if any(x in name for x in parts)}
    if not wanted:
        raise ValueError("model: expected one with a memory, got none; call add_memory before")
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder: {str(folder)!r} holds no safetensors file")
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = wanted.keys() & tensors.keys()
            found |= {name: tensors.get_tensor(name) for name in names}
    if not found:
        raise ValueError(
            f"folder: expected a saved model with a memory, got {str(folder)!r} without one; "
            "save the model after add_memory"
        )
    added, saved = _described(model), _saved(Path(folder))
    if saved is not None and saved != added:
        raise ValueError(
            f"folder: expected the memories that the model has, {added}, got {saved}; add the "
            "memory with the arguments that the saved model had"
        )
    for name, parameter in wanted.items():
        got = list(found[name].shape) if name in found else "nothing"
        if got != list(parameter.shape):
            raise ValueError(
                f"folder: expected {name} of shape {list(parameter.shape)}, got {got}; add the "
                "memory with the arguments that the saved model had"
            )
    model.load_state_dict(found, strict=False)


def _described(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Return the sizes of a model's memory blocks, by their names."""
    return {
        name: {
            "heads": block.attn.attn.heads,
            "dim_head": block.attn.attn.dim_head,
            "topk_mems": block.attn.topk_mems,
            "mem_chunk_size": block.attn.mem_chunk_size,
        }
        for name, block in model.named_modules()
        if isinstance(block, HTMBlock)
    }


def _saved(folder: Path) -> dict[str, dict[str, int]] | None:
    """Return what `_described` said of a model that was saved; None if nothing is known."""
    path = folder / "config.json"
    return json.loads(path.read_text()).get("htm_memory") if path.exists() else None


@dataclass(eq=False)
class _Call:
    """What the layers must know of the call of the model that they are in."""

    sizes: dict[int, dict[str, int]] = field(default_factory=dict[int, dict[str, int]])
    """Of the memory of each layer that has one, by name."""
    mask: Tensor | None = None
    """[B, T] bool, False for padding."""
    is_first: Tensor | None = None
    """[B, T] bool, True where another text begins inside a row."""

    def before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Look at the mask and the cache of a call; a pre-hook of the decoder."""
        signature = inspect.signature(decoder.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
        given = given.get("kwargs", {}) | given
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if not isinstance(inputs, Tensor):
            return args, kwargs  # The model says what is missing.
        self.mask = _padding(given.get("attention_mask"), inputs.shape[1])
        self.is_first = _beginnings(given.get("position_ids"), inputs, self.mask)
        name = "cache" if "cache" in signature.parameters else "past_key_values"
        cache = given.get("cache", given.get("past_key_values"))
        config = cast(Any, decoder).config
        if cache is None and _keeps(decoder, given.get("use_cache"), config):
            cache = HTMCache(config=config)
            kwargs = kwargs | {name: cache}
        if cache is not None:
            remember(cache, inputs, self.sizes)
        return args, kwargs


@dataclass(eq=False)
class _Past:
    """What a layer returns goes through its block, and into its memory."""

    number: int
    call: _Call

    def after(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output with what was recalled added; a hook of the layer."""
        x, rest = _split(output)
        block = cast(HTMBlock, layer.htm)
        # As in transformers, nothing is cached where layers are computed again on the way back.
        again = _recomputes(layer)
        caches = (value for value in (*args, *kwargs.values()) if isinstance(value, HTMCache))
        cache = None if again else next(caches, None)
        memory = None if cache is None else cache.memories.get(self.number)
        if memory is None:
            sizes: dict[str, Any] = dict(self.call.sizes[self.number])
            if cache is None:
                # Nothing comes after this call, and no more can close in it.
                closing = max(1, x.shape[1] // sizes["chunk_size"])
                sizes["chunks"] = min(sizes["chunks"], closing)
            memory = ChunkedMemory.empty(x.shape[0], **sizes, dtype=x.dtype, device=x.device)
        steps = (x.detach() if block.attn.detach_memories else x).to(memory.dtype)
        is_first = None if self.call.is_first is None else self.call.is_first.to(x.device)
        if self.call.mask is None:
            reached = memory.reach(steps, is_first)
            visible = None
            if reached.reach.times is not None:
                time = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
                visible = reached.reach.visible(time)
            y = _run(block, again, x, reached.read, visible)
            # Not before: what was read may lie where the new chunks are written.
            memory = memory if cache is None else reached.after()
        else:
            read, visible, memory = memory.unroll(steps, is_first, self.call.mask.to(x.device))
            y = _run(block, again, x, read, visible)
        if cache is not None:
            cache.memories[self.number] = memory.detach()
        return (y, *rest) if isinstance(output, tuple) else y


@dataclass(eq=False)
class _Reader:
    """What a layer returns goes through a block that reads a memory."""

    memory: Home | ChunkedMemory

    def after(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the output with what was recalled added; a hook of the layer."""
        x, rest = _split(output)
        y = _run(cast(HTMBlock, layer.htm_stored), _recomputes(layer), x, self.memory, None)
        return (y, *rest) if isinstance(output, tuple) else y

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Reader":
        # A copy of the model reads the same memory.
        return _Reader(self.memory)


def _split(output: Any) -> tuple[Tensor, tuple[Any, ...]]:
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, ())


def _run(block: HTMBlock, again: bool, x: Tensor, memory: Any, visible: Tensor | None) -> Tensor:
    if again:
        y = checkpoint(block, x, memory, None, visible, use_reentrant=False)
        return cast(Tensor, y)
    return block(x, memory, chunk_attn_mask=visible)


def _recomputes(layer: nn.Module) -> bool:
    asked = getattr(layer, "gradient_checkpointing", False)
    return bool(asked) and layer.training and torch.is_grad_enabled()


def _keeps(decoder: nn.Module, use_cache: bool | None, config: Any) -> bool:
    """Return whether a call without a cache is given one.

    Not in training, where nobody goes on and the room for all chunks would be taken in vain.
    """
    if decoder.training and torch.is_grad_enabled():
        return False
    return bool(getattr(config, "use_cache", False) if use_cache is None else use_cache)


def _padding(mask: Any, length: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected [B, T] that marks padding, as a memory needs, got {got}"
        )
    mask = mask[:, -length:].bool()
    return None if may_look_at(mask) and mask.all() else mask


def _beginnings(positions: Any, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return where positions do not rise from a token that exists to the next one, [B, T] bool.

    Positions with several numbers a token, as of pictures, do not say.
    """
    if not isinstance(positions, Tensor) or positions.ndim != 2 or inputs.shape[1] < 2:
        return None
    positions = positions.expand(inputs.shape[:2])
    time = torch.arange(inputs.shape[1], device=positions.device).expand(positions.shape)
    exists = torch.ones_like(time, dtype=torch.bool) if mask is None else mask.to(time.device)
    last = torch.where(exists, time, -1).cummax(1).values[:, :-1]
    falls = (positions[:, 1:] <= positions.gather(1, last.clamp(min=0))) & (last >= 0)
    is_first = nn.functional.pad(falls & exists[:, 1:], (1, 0))
    return None if may_look_at(is_first) and not is_first.any() else is_first


def _call_of(model: PreTrainedModel) -> _Call:
    """Return what watches the calls of the model; there is one."""
    decoder, _ = decoder_layers(model)
    for hook in decoder._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _Call):
            return owner
    call = _Call()
    decoder.register_forward_pre_hook(call.before, with_kwargs=True)
    return call


def _add(
    model: PreTrainedModel,
    layers: Iterable[int],
    name: str,
    make: Callable[..., HTMBlock],
    hook: Callable[[int, int], Callable[..., Any]],
) -> None:
    _, modules = decoder_layers(model)
    config = cast(Any, model.config.get_text_config(decoder=True))
    check_kind("layers", layers, Iterable, "numbers of layers, such as [2]")
    numbers = list(layers)
    for number in numbers:
        check_number("layers", number, len(modules))
        if hasattr(modules[number], name) or numbers.count(number) > 1:
            raise ValueError(f"layers: expected one memory a layer, got {number} twice")
    for number in numbers:
        layer = modules[number]
        like = next(p for p in layer.parameters() if p.is_floating_point())
        block = make(config.hidden_size, dtype=like.dtype, device=like.device)
        output = block.attn.attn.to_out
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        layer.add_module(name, block.train(layer.training))
        layer.register_forward_hook(hook(number, config.hidden_size), with_kwargs=True)
    # So that what is saved says what it needs.
    model.config.htm_memory = _described(model)
