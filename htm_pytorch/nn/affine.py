"""A projection as an affine map, for whoever applies it on the side of the queries."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from htm_pytorch.shapes import may_look_at

UNIT = 16.0
"""How long the vectors are that show the weight: far from what a bias hides, in 16 bits, too."""
ROUNDED = 2.0**-7
"""What inputs in 8 bits may miss, of the largest of them."""


class Affine(NamedTuple):
    """The map that takes x to weight x + bias."""

    weight: Tensor
    """[F, D], the linear part."""
    bias: Tensor | None
    """[F], what is added; None where nothing is."""


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the weight [F, D] of a Linear or what took its place; None if it is not at hand.

    It may be packed, in the bits of another dtype, or in parts on many devices.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    is_usual = type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight)
    return weight if is_usual else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what one of `kind` does, and nobody listens."""
    is_hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    own = type(module)
    is_own = "forward" in module.__dict__ or own.forward is not kind.forward
    is_own = is_own or own.__call__ is not nn.Module.__call__
    return not (is_hooked or is_own)


def check_unhooked(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise a ValueError if hooks, or another `forward`, take part in what a module returns."""
    if not is_plain(module, kind):
        raise ValueError(
            f"recall: expected a {kind.__name__} with the forward of its own and without hooks, "
            "which only a call of the module runs; remove them, or call the module"
        )


def check_width(name: str, module: nn.Module, made: Tensor, features: int) -> Tensor:
    """Return what a module made of queries, if that is so many numbers of each.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(made, Tensor) or made.shape[-1] != features:
        got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(
            f"{name}: expected a module that makes [B, Q, {features}] of queries, got "
            f"{type(module).__name__}, which made {got}"
        )
    return made


def affine_of(name: str, module: nn.Module, sizes: tuple[int, int], like: Tensor) -> Affine:
    """Return the map from D to F numbers that `module` is.

    A Linear has it as its parameters, parametrized or not. Whatever else stands in the place of
    one (an adapter, a quantised Linear), and a Linear that hooks change (pruning, FSDP), is called,
    as it would be with steps: an affine map is known by where it takes zero and the unit vectors.
    Whether it is one is told by where it takes others; a compiler's graph cannot look at that. It
    may miss by the square root of what rounds a number: far above what roundings add up to, and
    far below what anything else would make of so many sizes and signs.

    Args:
        name: of the module, for errors.
        module: what projects.
        sizes: D and F.
        like: of the dtype and on the device of the steps.

    Raises:
        ValueError: it is no such map.
    """
    width, features = sizes
    if is_plain(module, nn.Linear) and (held := weight_of(module)) is not None:
        if held.shape != (features, width):
            raise ValueError(
                f"{name}: expected a weight [{features}, D = {width}], got {list(held.shape)}"
            )
        bias = module.bias
        return Affine(held, bias if isinstance(bias, Tensor) else None)
    units = UNIT * torch.eye(width, dtype=like.dtype, device=like.device)
    others = _others(width).to(like)
    points = torch.cat([like.new_zeros(1, width), units, others])
    reached = module(points)
    if not isinstance(reached, Tensor) or reached.shape != (len(points), features):
        got = list(reached.shape) if isinstance(reached, Tensor) else type(reached).__name__
        raise ValueError(
            f"{name}: expected a module that takes [B, D = {width}] to [B, {features}], got "
            f"{type(module).__name__}, which made {got} of {list(points.shape)}"
        )
    bias = reached[0]
    weight = ((reached[1 : 1 + width] - bias) / UNIT).mT
    if may_look_at(reached):
        sums = torch.promote_types(reached.dtype, torch.float32)
        got, linear, shift = (part.detach().to(sums) for part in (reached, weight, bias))
        got, others = got[1 + width :], others.to(sums)
        wanted = shift + others @ linear.mT
        size = torch.maximum(got.abs(), wanted.abs()).amax(1, keepdim=True) + shift.abs().max()
        slack = torch.finfo(reached.dtype).eps ** 0.5 * size
        if _may_round_inputs(module):
            slack = slack + ROUNDED * others.abs().amax(1, True) * linear.abs().sum(1)
        # Also where it is no number.
        if not ((got - wanted).abs() <= slack).all():
            raise ValueError(
                f"{name}: expected a module that is linear but for a bias, since it is applied on "
                f"the side of the queries, got {type(module).__name__}, in which something else is "
                "at work, as an activation or dropout would be: leave that out, or merge the "
                "module into an nn.Linear"
            )
    return Affine(weight, bias)


def _others(width: int) -> Tensor:
    """Return points [9, D] of many sizes and both signs, on which activations are not affine.

    They are whole numbers of 7 bits from end to end, which most of what rounds inputs keeps.
    """
    some = torch.arange(width, dtype=torch.float32, device="cpu").mul(37).add(5).remainder(128) - 64
    some[0], some[-1] = -64, 63
    shifted = [(some + 64 + 29 * number).remainder(128) - 64 for number in range(4)]
    return torch.stack([torch.ones_like(some), *shifted, *(-1 - one for one in shifted)])


def _may_round_inputs(module: nn.Module) -> bool:
    """Whether a module has no parameters of the usual kind alone, as quantised ones have not."""
    parameters = list(module.parameters())
    usual = [type(one) is nn.Parameter and one.is_floating_point() for one in parameters]
    return not usual or not all(usual)
