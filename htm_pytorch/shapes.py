"""The letters of the axes, and the checks that hold arguments to them.

| letter | axis                     | letter | axis                |
|--------|--------------------------|--------|---------------------|
| B      | batch (rows)             | C      | steps in a chunk    |
| T      | time                     | K      | kept chunks         |
| Q      | queries                  | H      | heads               |
| N      | memory steps             | D      | model width         |
| M      | chunks                   | E      | width of a head     |

Axes always come in the order B, T or Q, H, K or M, C, D or E.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

_WITHOUT_DATA = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
"""Of `FakeTensorMode` and `make_fx`."""


def check_tensor(name: str, value: Tensor, axes: str, **sizes: int) -> None:
    """Raise unless `value` has the axes named, e.g. in `check_tensor("x", x, "B T D", D=64)`.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor [{_spell(axes, sizes)}], got {_type(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"one of {value.layout}"
        raise ValueError(f"{name}: expected a dense tensor [{_spell(axes, sizes)}], got {kind}")
    letters = axes.split()
    fits = value.ndim == len(letters) and all(
        size == sizes.get(letter, size) for letter, size in zip(letters, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape [{_spell(axes, sizes)}], got {list(value.shape)}")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise a ValueError unless `value` is of the class or classes `kind`, in words `wanted`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {wanted}, got {_type(value)}")


def check_floating(name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise a ValueError unless `value` is floating point (of `dtype`, where given).

    Floating point of 8 bits is a way to store numbers, in which nothing can be computed.
    """
    if not value.is_floating_point() or (dtype is not None and value.dtype != dtype):
        raise ValueError(f"{name}: expected dtype {dtype or 'floating point'}, got {value.dtype}")
    if value.dtype.itemsize < 2:
        raise ValueError(
            f"{name}: expected dtype floating point of at least 16 bits, got {value.dtype}"
        )


def check_mask(name: str, value: Tensor | None, axes: str, device: torch.device, **sizes: int):
    """Raise a ValueError unless `value` is None or a boolean tensor of these axes on `device`."""
    if value is None:
        return
    check_tensor(name, value, axes, **sizes)
    if value.dtype != torch.bool:
        raise ValueError(f"{name}: expected dtype torch.bool, got {value.dtype}")
    check_device(name, value, device)


def check_made(device: object, dtype: object) -> None:
    """Raise a ValueError unless parameters can be made on `device` and in `dtype`, where given."""
    if dtype is not None:
        check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
        check_floating("dtype", torch.empty(0, dtype=dtype, device="cpu"))  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        torch.device("cpu" if device is None else device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: expected a torch.device or its name, as 'cpu', got {device!r}"
        ) from error


def to_arguments(
    device: torch.device | str | torch.dtype | None, dtype: torch.dtype | None
) -> tuple[torch.device | str | None, torch.dtype | None]:
    """Return the arguments of a `to`; the dtype may come first and alone, as in torch."""
    if isinstance(device, torch.dtype):
        if dtype is not None:
            raise ValueError(f"device: expected a torch.device or its name, got {device}")
        device, dtype = None, device
    check_made(device, dtype)
    return device, dtype


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise a ValueError unless `value` lives on `device`."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_beside(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raise a ValueError unless `value` has the device of `parameter` and its dtype.

    Under autocast, which casts both, any floating point is right but float64, which it leaves.
    """
    check_device(name, value, parameter.device)
    device = value.device.type
    casts = has_autocast(device) and torch.is_autocast_enabled(device)
    casts = casts and torch.float64 not in (value.dtype, parameter.dtype)
    check_floating(name, value, None if casts else parameter.dtype)


AUTOCASTING = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
)


def has_autocast(device_type: str) -> bool:
    """Whether torch can cast by itself there; under a compiler (2.11), which cannot ask, a list."""
    if torch.compiler.is_compiling():
        return device_type in AUTOCASTING
    return torch.amp.is_autocast_available(device_type)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    """Raise a ValueError unless `value` is a finite number of at least 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def check_number(name: str, value: int, count: int) -> None:
    """Raise a ValueError unless `value` is an integer from 0 to below `count`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"{name}: expected an integer from 0 to {count - 1}, got {value!r}")


def check_numbers(name: str, value: Tensor, count: int) -> None:
    """Raise a ValueError unless `value` is [U] with numbers from 0 to below `count`.

    They are looked at wherever they lie, but not when compiled or mapped.
    """
    check_tensor(name, value, "U")
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name}: expected whole numbers, got {value.dtype}")
    if not is_seen():
        return
    numbers = value.tolist()
    if numbers and not 0 <= min(numbers) <= max(numbers) < count:
        raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {numbers}")


def check_rows(name: str, value: Tensor, batch: int, device: torch.device) -> Tensor:
    """Return the numbers of the rows that `value` names: by number [R], or marked [B] bool."""
    check_tensor(name, value, "R")
    if value.dtype == torch.bool:
        check_mask(name, value, "B", device, B=batch)
        return value.nonzero()[:, 0]
    check_numbers(name, value, batch)
    return value.to(device, torch.int64)


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is at work.

    Custom backward passes support neither.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_seen() -> bool:
    """Whether what is computed now is computed once, of data that is there.

    Not where a graph is made of it, nor where it is mapped, nor of tensors without data.
    """
    if torch.compiler.is_compiling() or is_transformed() or torch._C._is_tracing():
        return False
    # Other modes, as those that count operators, see what is done and do not change it.
    mode = torch._C._get_dispatch_mode
    return not torch._C._len_torch_dispatch_stack() or all(
        mode(key) is None for key in _WITHOUT_DATA
    )


def may_look_at(tensor: Tensor) -> bool:
    """Whether looking at data is cheap and allowed: on the CPU, not when compiled or mapped."""
    return tensor.device.type == "cpu" and is_seen()


def _spell(axes: str, sizes: dict[str, int]) -> str:
    return ", ".join(f"{a} = {sizes[a]}" if a in sizes else a for a in axes.split())


def _type(value: object) -> str:
    return type(value).__name__
