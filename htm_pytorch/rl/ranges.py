"""What numbers and words the options of a config may be."""

import math
from typing import Any, get_args, get_type_hints

_POSITIVE = math.ulp(0.0)
_LARGEST = 1e12
_COUNT = 2**40
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("discount", "trace", "final_learning_rate", "final_entropy"), (0, 1)),
    **dict.fromkeys(("learning_rate", "clip", "max_grad_norm"), (_POSITIVE, _LARGEST)),
    **dict.fromkeys(("value_weight", "entropy_weight", "reconstruction_weight"), (0, _LARGEST)),
    **dict.fromkeys(("time_limit", "decisions", "bptt", "eval_every"), (0, _COUNT)),
    **dict.fromkeys(("stop_at", "promote_at"), (-math.inf, math.inf)),
    "value_clip": (0, _LARGEST),
    "target_kl": (0, _LARGEST),
    "seed": (0, 2**63 - 1),
}


def check_choices(part: Any) -> None:
    """Refuse a word that is none of those an option of the group `part` may be."""
    for name, hint in get_type_hints(type(part)).items():
        value = getattr(part, name)
        choices = get_args(hint)
        if isinstance(value, str) and hint is not str and choices and value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_range(name: str, value: Any) -> None:
    """Refuse a number outside the range of its option; NaN is outside of all."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most = _RANGES.get(name, (1, _COUNT))
    if not least <= value <= most:
        low = "more than 0" if least == _POSITIVE else f"at least {least}"
        ends = low if most >= _COUNT and value < least else f"{least:g} to {most:g}"
        raise ValueError(f"{name}: expected {ends}, got {value}")
