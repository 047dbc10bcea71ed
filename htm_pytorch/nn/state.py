"""`TransformerState`: what an `HTMTransformer` carries from call to call, as a value to hold."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from htm_pytorch.memory import ChunkedMemory, MemoryFileError
from htm_pytorch.memory.fields import check_fields
from htm_pytorch.memory.files import load_tensors, save_tensors
from htm_pytorch.ops import Recall
from htm_pytorch.shapes import (
    check_beside,
    check_device,
    check_floating,
    check_kind,
    check_mask,
    check_rows,
    check_tensor,
    may_look_at,
    to_arguments,
)

KIND = "TransformerState"
NO_MEMORY = "-"
"""What a file says of a layer without a memory."""


class LayerState(NamedTuple):
    """What one layer carries from call to call."""

    memory: ChunkedMemory | None
    """The far past; None where the model has none (`mem_chunks=0`)."""
    keys: Tensor
    """[B, window - 1, H, E], the keys of the newest steps."""
    values: Tensor
    """[B, window - 1, H, E], the values that belong to the keys."""
    filled: Tensor
    """[B] int64, how many of them the episode has filled."""


@dataclass(frozen=True, eq=False, repr=False)
class TransformerState:
    """The states of all layers, as a value: every method returns a new one.

    `state[n]` is that of layer n. A state is a node of torch's pytrees, whose leaves are tensors
    with the rows first. Under `torch.no_grad` a step writes where the state before it lies; that
    state stays what it was, at the cost of a copy if it is used again.
    """

    layers: tuple[LayerState, ...]
    """What each layer carries."""
    _fits: Any = field(default=None)
    """What the model that made it expects of it, so that nothing has to be looked at again."""

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerState]:
        """Iterate over the layers."""
        return iter(self.layers)

    @overload
    def __getitem__(self, number: int) -> LayerState: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[LayerState, ...]: ...

    def __getitem__(self, number: int | slice) -> LayerState | tuple[LayerState, ...]:
        """Return the state of one layer, or of some; rows are taken by `select`."""
        # A tensor of one number would pass for a number.
        if isinstance(number, bool) or not isinstance(number, int | slice):
            raise TypeError(
                f"state[...]: expected the number of a layer, got {type(number).__name__}; "
                "select(rows) takes rows"
            )
        return self.layers[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.layers,)

    def __repr__(self) -> str:
        """Name the sizes, not the numbers."""
        first = self.layers[0]
        return f"TransformerState({len(self)} layers, {first.memory or 'no memory'!r})"

    @property
    def batch(self) -> int:
        """B, how many rows the state has."""
        return self.layers[0].filled.shape[0]

    def select(self, rows: Tensor) -> Self:
        """Return a copy of the rows [R] int64, in the order asked, or of those that [B] marks."""
        rows = check_rows("rows", rows, self.batch, self.layers[0].filled.device)
        return self._map(lambda memory: memory.select_rows(rows), lambda part: part[rows])

    @classmethod
    def cat(cls, states: Sequence["TransformerState"]) -> Self:
        """Return the rows of all the states, which must be of one model, one after another.

        Raises:
            ValueError: there is none, or they are not of one model.
        """
        check_kind("states", states, Sequence, "several TransformerStates")
        if not states:
            raise ValueError("states: expected at least one, got none")
        first = states[0]
        for number, state in enumerate(states):
            check_kind(f"states[{number}]", state, TransformerState, "a TransformerState")
            if len(state) != len(first):
                raise ValueError(
                    f"states[{number}]: expected {len(first)} layers, got {len(state)}"
                )
            for place, (layer, other) in enumerate(zip(state, first, strict=True)):
                name = f"states[{number}][{place}]"
                window = dict(zip("WHE", other.keys.shape[1:], strict=True))
                for part in ("keys", "values"):
                    value = getattr(layer, part)
                    check_tensor(f"{name}.{part}", value, "B W H E", **window)
                    check_floating(f"{name}.{part}", value, other.keys.dtype)
                    check_device(f"{name}.{part}", value, other.keys.device)
        layers: list[LayerState] = []
        for parts in zip(*states, strict=True):
            held = [part.memory for part in parts if part.memory is not None]
            if len(held) not in (0, len(parts)):
                raise ValueError("states: expected all with memories or none, got some")
            memory = ChunkedMemory.cat(held) if held else None
            windows = (torch.cat(tensors) for tensors in zip(*(p[1:] for p in parts), strict=True))
            layers.append(LayerState(memory, *windows))
        return cls(tuple(layers))

    def reset(self, rows: Tensor) -> Self:
        """Return the state with the rows [B] bool as if they had seen nothing; others untouched."""
        check_tensor("rows", rows, "B", B=self.batch)
        check_mask("rows", rows, "B", self.layers[0].filled.device, B=self.batch)

        def clear(part: Tensor) -> Tensor:
            return part.masked_fill(rows.view(-1, *(1,) * (part.ndim - 1)), 0)

        return self._map(lambda memory: memory.reset(rows), clear)

    def donate(self) -> Self:
        """Return the state, given up to the next call of the model.

        Where no gradient flows, the memories are then written where they lie, also by a compiled
        model and in a CUDA graph, which otherwise copy all chunks at each step. The state after
        such a call is donated as well; the one before it cannot be used again (RuntimeError), also
        if the call raised an error. See `ChunkedMemory.donate`.
        """
        given = self._map(ChunkedMemory.donate, lambda part: part)
        return type(self)(given.layers, self._fits)

    def detach(self) -> Self:
        """Return the state cut from the graph; that of an `HTMTransformer` has none."""
        return self._map(ChunkedMemory.detach, torch.Tensor.detach)

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the state on `device`, what is floating point in `dtype`.

        As in torch, a dtype may come alone, and parts that are so already are not copied.
        """
        there, kind = to_arguments(device, dtype)

        def move(part: Tensor) -> Tensor:
            return part.to(there, kind if part.is_floating_point() else None)

        return self._map(lambda memory: memory.to(there, kind), move)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Needs the package `safetensors` (extra `files`).
        """
        tensors: dict[str, Tensor] = {}
        keep = ""
        for number, layer in enumerate(self.layers):
            if layer.memory is not None:
                parts = layer.memory._tensors(layer.memory._ring.read())
                tensors |= {f"{number}.memory.{name}": part for name, part in parts.items()}
            named = zip(LayerState._fields[1:], layer[1:], strict=True)
            tensors |= {f"{number}.{name}": part for name, part in named}
            keep += (
                NO_MEMORY if layer.memory is None else str(int(layer.memory.keep_across_episodes))
            )
        save_tensors(path, KIND, tensors, keep_across_episodes=keep)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            MemoryFileError: a ValueError; truncated, or not a state of this format.
        """
        tensors, metadata = load_tensors(path, KIND)
        keep = metadata.get("keep_across_episodes", "")
        layers: list[LayerState] = []
        for number, kept in enumerate(keep):
            prefix = f"{number}.memory."
            parts = {
                name.removeprefix(prefix): tensors.pop(name)
                for name in list(tensors)
                if name.startswith(prefix)
            }
            is_held = parts or kept != NO_MEMORY
            memory = ChunkedMemory._from_file(path, parts, kept) if is_held else None
            window = [tensors.pop(f"{number}.{name}", None) for name in LayerState._fields[1:]]
            layers.append(LayerState(memory, *window))  # pyright: ignore[reportArgumentType]
        try:
            if not layers or tensors:
                raise ValueError(f"has {len(layers)} layers and besides {sorted(tensors)}")
            for number, layer in enumerate(layers):
                check_window(f"{number}.", layer)
        except ValueError as error:
            raise MemoryFileError(f"path: {str(path)!r} is damaged ({error})") from error
        return cls(tuple(layers)).to(device)

    def _map(
        self,
        of_memory: Callable[[ChunkedMemory], ChunkedMemory],
        of_tensor: Callable[[Tensor], Tensor],
    ) -> Self:
        return type(self)(
            tuple(
                LayerState(
                    None if layer.memory is None else of_memory(layer.memory),
                    *(of_tensor(part) for part in layer[1:]),
                )
                for layer in self.layers
            )
        )


def begun(state: TransformerState, rows: Tensor) -> TransformerState:
    """Return the state of which the rows [B] bool begin an episode with the step that comes next.

    Not of memories that keep earlier episodes.
    """
    layers: list[LayerState] = []
    for layer in state:
        memory = None if layer.memory is None else layer.memory.begin(rows)
        layers.append(layer._replace(memory=memory, filled=layer.filled.masked_fill(rows, 0)))
    return TransformerState(tuple(layers), state._fits)


def check_layer(
    name: str,
    layer: object,
    sizes: dict[str, int],
    window: dict[str, int],
    keep: bool,
    like: Tensor,
) -> None:
    """Raise a ValueError unless the state of a layer fits the sizes of its model.

    Args:
        name: what the state is called.
        layer: the state.
        sizes: of its memory, by axis.
        window: of its keys and values, by axis.
        keep: whether its memory keeps earlier episodes.
        like: a parameter, whose dtype and device are those of the state.
    """
    remembers = sizes["M"] > 0
    if not isinstance(layer, LayerState) or isinstance(layer.memory, ChunkedMemory) != remembers:
        kind = type(layer).__name__
        memory = "a ChunkedMemory" if remembers else "no memory"
        raise ValueError(f"{name}: expected a LayerState with {memory}, got {kind}")
    memory = layer.memory
    if memory is not None:
        check_fields(memory._tensors(memory._ring.read()), f"{name}.memory.", **sizes)
        check_beside(f"{name}.memory.contents", memory.open_steps, like)
    if memory is not None and memory.keep_across_episodes != keep:
        raise ValueError(
            f"{name}.memory.keep_across_episodes: expected {keep}, "
            f"got {memory.keep_across_episodes}"
        )
    check_window(f"{name}.", layer, **(window | {"B": sizes["B"]}))
    check_beside(f"{name}.keys", layer.keys, like)


def check_window(prefix: str, layer: LayerState, **sizes: int) -> None:
    """Raise a ValueError unless the window fits `sizes`, by axis, and the layer's memory."""
    if layer.memory is not None:
        sizes = {"B": layer.memory.batch} | sizes
    check_tensor(f"{prefix}keys", layer.keys, "B W H E", **sizes)
    sizes |= dict(zip("BWHE", layer.keys.shape, strict=True))
    check_tensor(f"{prefix}values", layer.values, "B W H E", **sizes)
    check_tensor(f"{prefix}filled", layer.filled, "B", B=sizes["B"])
    like = layer.keys if layer.memory is None else layer.memory.open_steps
    for name, part in zip(LayerState._fields[1:], layer[1:], strict=True):
        check_device(f"{prefix}{name}", part, like.device)
    for name, part in (("keys", layer.keys), ("values", layer.values)):
        check_floating(f"{prefix}{name}", part, like.dtype)
    if layer.filled.dtype != torch.int64:
        raise ValueError(f"{prefix}filled: expected dtype torch.int64, got {layer.filled.dtype}")
    if may_look_at(layer.filled) and bool(((layer.filled < 0) | (layer.filled > sizes["W"])).any()):
        raise ValueError(f"{prefix}filled: expected numbers from 0 to {sizes['W']}, got others")


def in_place(recall: Recall, place: Tensor | None, exists: Tensor) -> Recall:
    """Return what the steps that exist recalled, each where it was before they were moved."""
    parts: list[Tensor] = []
    for part, nothing in zip(recall, (-1, 0.0, 0.0), strict=True):
        rest = (1,) * (part.ndim - 2)
        if place is not None:
            part = part.gather(1, place.view(*place.shape, *rest).expand(-1, -1, *part.shape[2:]))
        parts.append(part.masked_fill(~exists.view(*exists.shape, *rest), nothing))
    return Recall(*parts)


def _flatten(state: TransformerState) -> tuple[list[tuple[Any, ...]], None]:
    # Torch takes None for a leaf: a layer without a memory is its window alone.
    return [layer[1:] if layer.memory is None else layer for layer in state], None


def _flatten_with_keys(state: TransformerState) -> tuple[list[Any], None]:
    return [
        (pytree.SequenceKey(number), layer) for number, layer in enumerate(_flatten(state)[0])
    ], None


def _unflatten(layers: Iterable[Any], _: None) -> TransformerState:
    return TransformerState(
        tuple(
            layer if isinstance(layer, LayerState) else LayerState(None, *layer) for layer in layers
        )
    )


pytree.register_pytree_node(
    TransformerState,
    _flatten,
    _unflatten,
    serialized_type_name="htm_pytorch.nn.TransformerState",
    flatten_with_keys_fn=_flatten_with_keys,
)
pytree._register_namedtuple(LayerState, serialized_type_name="htm_pytorch.nn.LayerState")
# A state is data: `torch.load` reads it without being told that it may.
torch.serialization.add_safe_globals([TransformerState, LayerState])
