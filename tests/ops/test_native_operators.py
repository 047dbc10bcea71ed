"""The operators that call the compiled kernel, as parts of torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from htm_pytorch import ChunkedMemory
from htm_pytorch.ops import attend, recall
from tests.helpers import assert_near, normal
from tests.ops.native_cases import (
    OPERATORS,
    Sizes,
    inputs_of,
    layouts,
)

pytestmark = pytest.mark.usefixtures("one_thread")


NOTHING = (None, None, None)
"""What nothing fades by: ceiling, decay and ages."""


class TestOperators:
    """The operators themselves, as a compiler or a hook may call them."""

    FORWARD = [
        *("pick-steps", "pick-steps-whole", "pick-summaries"),
        *("pick-steps-fading", "pick-summaries-fading"),
        *("attend", "attend-plain", "attend_projected", "attend_projected-apart"),
    ]
    BACKWARD = [
        *("pick_backward-steps", "pick_backward-summaries", "pick_backward-fading"),
        *("attend_backward", "attend_backward-plain", "attend_projected_backward"),
    ]

    @staticmethod
    def samples() -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Arguments of every operator, by a name for each sample."""
        torch.manual_seed(0)
        route, probe = 0.4 * normal(2, 5, 6), 0.4 * normal(2, 5, 3, 6)
        steps, summaries, positions = normal(2, 11, 6), normal(2, 3, 6), normal(4, 6)
        mask, valid = torch.rand(2, 11) < 0.8, torch.rand(2, 3) < 0.8
        chunk_mask = torch.rand(2, 5, 3) < 0.8
        chunk_mask[0, 1] = False
        picked, weights = OPERATORS.pick(route, steps, None, mask, chunk_mask, *NOTHING, 2, 4, 0.1)
        assert (picked < 0).any()
        grad, grad_picks = normal(2, 5, 3, 6), normal(2, 5, 2)
        inside = (probe, steps, mask, positions, picked, weights, 4)
        some = (part[:, :1].clone() for part in (probe, picked, weights))
        few, few_picked, few_weights = some
        plain = (few, steps[:1], None, None, few_picked, few_weights, 4)
        queries, projected = 0.4 * normal(2, 5, 3, 5), normal(12, 2, 3, 5)
        exists = torch.rand(12) < 0.8
        together = (queries, projected, exists, picked, weights, 4, 1, 0.5)
        ceiling, decay = normal(2, 5), normal(2, 5)
        fading = ceiling, decay, normal(2, 5, 3).abs()
        shared = ceiling, decay, normal(1, 1, 3).abs()
        # Two rows that share no chunk.
        own = torch.stack([torch.randperm(2) for _ in range(10)]).view(2, 5, 2)
        own = own + torch.tensor([0, 2])[:, None, None]
        own[0, 1, 1] = -1
        apart = (queries, projected, None, own, weights, 3, 2, 0.5)
        return {
            "pick-steps": (
                "pick",
                (route, steps, None, mask, chunk_mask, *NOTHING, 2, 4, 0.1),
            ),
            "pick-steps-whole": (
                "pick",
                (route, steps[:1], None, None, None, *NOTHING, 3, 4, 0.0),
            ),
            "pick-summaries": (
                "pick",
                (route, summaries, valid, None, chunk_mask, *NOTHING, 2, 1, 0.0),
            ),
            "pick-steps-fading": (
                "pick",
                (route, steps, None, mask, chunk_mask, *fading, 2, 4, 0.1),
            ),
            "pick-summaries-fading": (
                "pick",
                (route, summaries, valid, None, chunk_mask, *shared, 2, 1, 0.0),
            ),
            "attend": ("attend", inside),
            "attend-plain": ("attend", plain),
            "attend_projected": ("attend_projected", together),
            "attend_projected-apart": ("attend_projected", apart),
            "pick_backward-steps": (
                "pick_backward",
                (grad_picks, route, steps, mask, *NOTHING, picked, weights, 4, 0.1, True),
            ),
            "pick_backward-fading": (
                "pick_backward",
                (grad_picks, route, steps, mask, *fading, picked, weights, 4, 0.1, True),
            ),
            "pick_backward-summaries": (
                "pick_backward",
                (grad_picks, route, summaries, None, *NOTHING, picked, weights, 1, 0.0, False),
            ),
            "attend_backward": ("attend_backward", (grad, *inside, True, True)),
            "attend_backward-plain": (
                "attend_backward",
                (grad[:, :1].clone(), *plain, False, False),
            ),
            "attend_projected_backward": (
                "attend_projected_backward",
                (normal(2, 5, 3, 5), *together),
            ),
        }

    @staticmethod
    def differentiable(operator: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        ages = arguments[7] if operator == "pick" else None
        return tuple(
            part.clone().requires_grad_()
            if isinstance(part, Tensor) and part.is_floating_point() and part is not ages
            else part
            for part in arguments
        )

    @pytest.mark.compile
    @pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
    def test_opcheck(self, name: str) -> None:
        operator, arguments = self.samples()[name]
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if "backward" not in operator:
            arguments = self.differentiable(operator, arguments)
        packet = getattr(OPERATORS, operator)
        torch.library.opcheck(packet.default, arguments, test_utils=checks)

    @pytest.mark.parametrize("name", FORWARD)
    def test_gradcheck(self, name: str) -> None:
        operator, arguments = self.samples()[name]

        def run(*some: Any) -> Any:
            made = getattr(OPERATORS, operator)(*some)
            return made[1] if operator == "pick" else made

        assert torch.autograd.gradcheck(
            run, self.differentiable(operator, arguments), fast_mode=True
        )

    @pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
    def test_strides_do_not_matter(self, name: str, fences: Callable[[], None]) -> None:
        operator, arguments = self.samples()[name]
        function = getattr(OPERATORS, operator)

        def call(*some: Any) -> list[Tensor]:
            made = function(*some)
            return list(made) if isinstance(made, tuple) else [made]

        expected = call(*arguments)
        for at, part in enumerate(arguments):
            if not isinstance(part, Tensor):
                continue
            for layout, laid_out in layouts(part).items():
                changed = (*arguments[:at], laid_out, *arguments[at + 1 :])
                results = call(*changed)
                fences()
                for got, wanted in zip(results, expected, strict=True):
                    assert_near(got, wanted, 1e-12, f"argument {at}, {layout}")

    # torch itself still scripts some of its forward derivatives.
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("impl", ["native", "auto"])
    def test_forward_derivatives_are_right_or_refused(self, impl: Any) -> None:
        # Not silently left out.
        parts = inputs_of(Sizes())
        memory = ChunkedMemory.from_chunks(parts["contents"])
        direction = normal(2, 5, 6)

        def tangent(impl: Any) -> Tensor | None:
            with forward_ad.dual_level():
                route = forward_ad.make_dual(parts["route"], direction)
                value = recall(route, parts["probe"], memory, 3, impl=impl)
                return forward_ad.unpack_dual(value).tangent

        expected = tangent("reference")
        assert expected is not None
        try:
            got = tangent(impl)
        except (ValueError, RuntimeError):
            return
        assert got is not None
        assert_near(got, expected, 1e-12)

    def test_second_derivatives_are_refused(self) -> None:
        # Not silently zero.
        parts = inputs_of(Sizes())
        route, probe = parts["route"].requires_grad_(), parts["probe"].requires_grad_()
        memory = ChunkedMemory.from_chunks(parts["contents"])
        projections = normal(2, 3, 6, 6).requires_grad_()
        for impl in ("native", "projected"):
            if impl == "native":
                value = recall(route, probe, memory, 2, impl=impl)
            else:
                value, _ = attend(route, probe, projections, memory, 2, impl=impl)
            with pytest.raises((RuntimeError, NotImplementedError)):
                (first,) = torch.autograd.grad(value.square().sum(), probe, create_graph=True)
                torch.autograd.grad(first.square().sum(), probe)
