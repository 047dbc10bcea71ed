"""`HTMModule`: an `HTMTransformer` as a recurrent module of TorchRL."""

import secrets
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.nn import HTMTransformer, TransformerState
from htm_pytorch.shapes import check_at_least, check_kind, is_transformed

try:
    from tensordict import TensorDictBase, unravel_key
    from tensordict.nn import TensorDictModuleBase
    from torchrl.data import Unbounded
    from torchrl.envs import TensorDictPrimer
    from torchrl.modules.tensordict_module.rnn import recurrent_mode
except ImportError as error:
    raise ImportError(
        "htm_pytorch.integrations.torchrl needs TorchRL: pip install 'htm-pytorch[torchrl]'"
    ) from error

Key = str | tuple[str, ...]

STRIDE = 2**24
"""From a step's number to that of the next step of its row; no memory has so many rows."""


class HTMModule(TensorDictModuleBase):
    """An `HTMTransformer` between two entries of a tensordict.

    Outside recurrent mode each element of the tensordict is one step of one environment. The
    module holds the memories, one row an environment, and a row whose `is_init` is True begins
    with nothing. In recurrent mode, which `torchrl.modules.set_recurrent_mode` switches on, the
    last dimension of the tensordict is time: all steps are computed at once, with gradients. Both
    give the same outputs.

    The tensordict carries no memory, since a copy at every step would be too large. It carries
    the number of each step, negative where an episode begins. By that the module refuses to go on
    with the memory of another rollout, and finds the memory that a window begins with. A window
    may begin with an episode; or where acting went on after a window was read, as the batches of
    on-policy training do; or after `begin_window`. Any other beginning is a ValueError, also where
    a sampler marked it as `is_init`, and so is a gap inside a window. The memory that a window
    begins with was made by the weights that acted, and carries no gradient.

    Environments need `InitTracker()` and the primer of `make_tensordict_primer`.

    Args:
        htm: the transformer, as wide as the entry that it reads.
        in_key: the entry that is read, [..., D].
        out_key: the entry that is written, [..., D].
        is_init_key: the entry that marks the first step of an episode, [..., 1] bool.
        step_key: the entry that numbers the steps, [..., 1] int64, 0 until the module has acted at
            the first step of an episode; each module needs its own.
        windows: of how many windows, the newest, the memories they begin with are kept.
        default_recurrent_mode: what holds where `set_recurrent_mode` says nothing.
    """

    def __init__(
        self,
        htm: HTMTransformer,
        *,
        in_key: Key,
        out_key: Key,
        is_init_key: Key = "is_init",
        step_key: Key = "htm_step",
        windows: int = 1,
        default_recurrent_mode: bool = False,
    ):
        super().__init__()
        check_kind("htm", htm, HTMTransformer, "an HTMTransformer")
        check_at_least("windows", windows, 1)
        check_kind("default_recurrent_mode", default_recurrent_mode, bool, "a bool")
        self.htm = htm
        self.windows = windows
        given = {"in_key": in_key, "is_init_key": is_init_key, "step_key": step_key}
        read: dict[str, Any] = {name: _key(name, key) for name, key in given.items()}
        written: dict[str, Any] = {"next step_key": unravel_key(("next", read["step_key"]))}
        written["out_key"] = _key("out_key", out_key)
        _check_apart(read | written)
        self.in_keys = list(read.values())
        self.out_keys = [written["out_key"], read["step_key"], written["next step_key"]]
        self._default_recurrent_mode = default_recurrent_mode
        self._state: TransformerState | None = None
        self._expected: Tensor | None = None
        self._next_number = _first_number()
        self._is_beginning = False
        self._beginnings: dict[int, TransformerState] = {}

    @property
    def recurrent_mode(self) -> bool:
        """Whether the last dimension of a tensordict is time."""
        mode = recurrent_mode()
        return self._default_recurrent_mode if mode is None else bool(mode)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform by which environments carry the numbers of steps."""
        spec = Unbounded(shape=torch.Size([1]), dtype=torch.int64)
        return TensorDictPrimer({self.in_keys[2]: spec}, default_value=0, expand_specs=True)

    def begin_window(self) -> None:
        """Keep the memories as they are: a window may begin with the next step."""
        self._is_beginning = True

    def reset(self) -> None:
        """Forget all memories; the next step must be the first of an episode in every row."""
        self._state = self._expected = None
        self._beginnings.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memories: what acts in another process begins with nothing."""
        nothing: dict[str, Any] = {"_state": None, "_expected": None, "_beginnings": {}}
        return dict(super().__getstate__()) | nothing | {"_next_number": _first_number()}

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the outputs of one step of each environment, or of whole windows.

        Raises:
            ValueError: an entry is missing or of another shape; a row goes on whose memory the
                module does not hold; steps of a window do not follow each other; or it begins
                inside an episode at a step whose memory was not kept.
        """
        if is_transformed():
            raise ValueError(
                "tensordict: expected a call outside torch.vmap, since rows have memories of "
                "their own; pass deactivate_vmap=True to the value estimator"
            )
        wanted = "a tensordict, of which each element is one step of one environment"
        check_kind("tensordict", tensordict, TensorDictBase, wanted)
        shape = tensordict.shape
        if self.recurrent_mode and not shape:
            raise ValueError("tensordict: expected time as its last dimension, got shape []")
        if not shape.numel():
            raise ValueError(f"tensordict: expected at least one step, got shape {list(shape)}")
        x, first, numbers = (self._entry(tensordict, key) for key in self.in_keys)
        if x.shape != (wanted := (*shape, self.htm.dim)):
            raise ValueError(
                f"tensordict: expected in_key={self.in_keys[0]!r} as {list(wanted)}, got "
                f"{list(x.shape)}"
            )
        self._check(self.in_keys[1], first, (*shape, 1), torch.bool)
        self._check(self.in_keys[2], numbers, (*shape, 1), torch.int64)
        if self.recurrent_mode:
            rows = shape[:-1].numel(), shape[-1]
            y = self._read(x.reshape(*rows, -1), first.reshape(rows), numbers.reshape(rows))
        else:
            rows = shape.numel()
            inputs = x.reshape(rows, 1, -1), first.reshape(rows), numbers.reshape(rows)
            y, acted = self._act(*inputs, dims=len(shape))
            tensordict.set(self.out_keys[1], acted.reshape(*shape, 1))
            tensordict.set(self.out_keys[2], (acted.abs() + STRIDE).reshape(*shape, 1))
        tensordict.set(self.out_keys[0], y.reshape(*shape, y.shape[-1]))
        return tensordict

    def _entry(self, tensordict: TensorDictBase, key: Any) -> Tensor:
        value = tensordict.get(key, None)
        if isinstance(value, Tensor):
            return value
        ways = {
            self.in_keys[1]: "; append InitTracker() to the environment",
            self.in_keys[2]: "; append make_tensordict_primer() to the environment",
        }
        found = sorted(map(str, tensordict.keys(True, True)))
        raise ValueError(f"tensordict: expected an entry {key!r}, got {found}{ways.get(key, '')}")

    def _check(self, key: Any, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tuple(value.shape) not in (shape, shape[:-1]) or value.dtype != dtype:
            raise ValueError(
                f"tensordict: expected {key!r} as {list(shape)} of {dtype}, got "
                f"{list(value.shape)} of {value.dtype}"
            )

    @torch.no_grad()
    def _act(self, x: Tensor, first: Tensor, numbers: Tensor, dims: int) -> tuple[Tensor, Tensor]:
        """Return the outputs of one step of each row, and the numbers of these steps."""
        rows = len(x)
        state, expected = self._state, self._expected
        if expected is None or state is None or len(expected) != rows:
            # No step has the number -1.
            expected, state = torch.full_like(numbers, -1), self.htm.initial_state(rows)
        wrong = numbers != torch.where(first, 0, expected)
        if wrong.any():
            raise ValueError(self._told(first, wrong, dims))
        if self._is_beginning:
            # By number, so that rows are found in whatever order they are read.
            self._beginnings[self._next_number] = state
            while len(self._beginnings) > self.windows:
                del self._beginnings[min(self._beginnings)]
            self._is_beginning = False
        y, self._state = self.htm(x, state, first[:, None])
        acted = torch.arange(rows, device=numbers.device) + self._next_number
        self._next_number += STRIDE
        self._expected = acted + STRIDE
        return y, torch.where(first, -acted, acted)

    def _told(self, first: Tensor, wrong: Tensor, dims: int) -> str:
        """Return what is said of rows that are not acted at."""
        others = wrong.nonzero()[:, 0].tolist()
        if dims > 1:
            return (
                f"tensordict: expected one step of each environment, as recurrent mode is off, got "
                f"{len(first)} elements of which {len(others)} go on where the module is not; "
                "windows [..., T] are read with torchrl.modules.set_recurrent_mode(True)"
            )
        if (first & wrong).any():
            return (
                f"tensordict: expected 0 as {self.in_keys[2]!r} of the first step of an episode, "
                "got others; append make_tensordict_primer() to the environment, act once a step, "
                "and give each module a step_key of its own"
            )
        return (
            f"tensordict: expected rows that begin an episode or go on where the module is, got "
            f"others in rows {others}; act in other environments, as for an evaluation, with a "
            "copy (copy.deepcopy), and give each module a step_key of its own"
        )

    def _read(self, x: Tensor, first: Tensor, numbers: Tensor) -> Tensor:
        # Samplers set the marks, too, where they cut.
        first = numbers < 0
        self._check_follow(first, numbers)
        state = None if first[:, 0].all() else self._beginning(first[:, 0], numbers[:, 0])
        self._is_beginning = True
        return self.htm(x, state, first)[0]

    def _check_follow(self, first: Tensor, numbers: Tensor) -> None:
        """Raise unless the steps of windows [B, T] follow each other, or begin an episode."""
        gaps = ~first[:, 1:] & (numbers[:, 1:] != numbers[:, :-1].abs() + STRIDE)
        if gaps.any():
            places = [(row, step + 1) for row, step in gaps.nonzero()[:4].tolist()]
            raise ValueError(
                f"tensordict: expected windows of steps that follow each other, got others at "
                f"[row, step] {places}; reshape sampled slices to [..., T], and give steps that "
                "the module did not act at to htm itself"
            )

    def _beginning(self, first: Tensor, numbers: Tensor) -> TransformerState:
        """Return the memories that the rows of a window begin with, by the numbers of steps."""
        left = ~first
        parts = [self.htm.initial_state(int(first.sum()))]
        places = [first.nonzero()[:, 0]]
        for number, state in self._beginnings.items():
            held = left & (numbers >= number) & (numbers < number + state.batch)
            parts.append(state.select(numbers[held] - number))
            places.append(held.nonzero()[:, 0])
            left = left & ~held
        if left.any():
            raise ValueError(
                f"tensordict: expected windows that begin with an episode or where a batch did, "
                f"got others in rows {left.nonzero()[:, 0].tolist()}; call begin_window() where "
                f"windows are to begin, keep more of them (windows={self.windows}), pass "
                "shifted=True to the value estimator, and of a replay buffer sample windows from "
                "the beginnings of episodes, with init_key=None in a SliceSampler"
            )
        return TransformerState.cat(parts).select(torch.cat(places).argsort())


def _key(name: str, key: Key) -> Any:
    """Return the name of one entry."""
    parts = key if isinstance(key, tuple) else (key,)
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"{name}: expected the name of one entry, a str or a tuple of str, got {key!r}; "
            "in_key, is_init_key and step_key are read, each of them one"
        )
    return unravel_key(key)


def _check_apart(keys: dict[str, Any]) -> None:
    """Raise a ValueError where an entry is another one, or lies inside of it."""
    for (name, key), (other, second) in combinations(keys.items(), 2):
        # What is read may be written over, as in an embedding that is made again.
        if (name, other) == ("in_key", "out_key") and key == second:
            continue
        one, two = (part if isinstance(part, tuple) else (part,) for part in (key, second))
        length = min(len(one), len(two))
        if one[:length] == two[:length]:
            raise ValueError(
                f"{other}: expected an entry apart from that of {name}, {key!r}, got {second!r}"
            )


def _first_number() -> int:
    """Return where a module begins to count, above 0 and so that no two have the same numbers."""
    return STRIDE + secrets.randbits(60)
