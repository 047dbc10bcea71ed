"""`Recorder`: listens to an `HTMTransformer` while it runs, and notes what it recalls."""

import inspect
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from htm_pytorch.memory import ChunkedMemory, Span
from htm_pytorch.nn import HTMTransformer
from htm_pytorch.ops import Recall
from htm_pytorch.report.trace import Moment, Recalled, Seen, Trace, check_labels
from htm_pytorch.shapes import check_at_least, check_kind, check_tensor

TOLERANCE = 1e-2
"""Of the outputs, relative to the largest: how far what is noted may be from what ran."""
HALF_TOLERANCE = 0.5
"""The same in 16 bits or under autocast, where what is rounded on the way changes which chunks of
nearly equal scores are kept; how far it was stands in `difference`."""


class _Noted(NamedTuple):
    """A moment whose chunks are named by their first steps."""

    step: int
    layers: tuple[tuple[Recalled, ...], ...]


class Recorder:
    """Notes what the rows of a transformer recall, while a program runs it as ever.

    What the program gets is untouched: beside each call the same steps are put to
    `HTMTransformer.recall`, with a copy of the state, and both outputs are compared::

        with Recorder(model) as recorder:
            outputs, state = model(steps)
        write_report(recorder.trace("My sequence"), "report.html")

    Args:
        model: the transformer, or a module that holds exactly one.
        rows: which rows of the batch are noted.

    Raises:
        ValueError: there is no such transformer, or it has no memory; at a call: a row that the
            batch does not have, or outputs that are not those of the run.
    """

    def __init__(self, model: nn.Module, rows: Sequence[int] = (0,)):
        self.transformer = transformer_of(model)
        check_kind("rows", rows, Sequence, "numbers of rows, such as (0,)")
        self.rows = tuple(rows)
        for number, row in enumerate(self.rows):
            check_at_least(f"rows[{number}]", row, 0)
        if not self.rows or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows: expected different numbers of rows, got {list(self.rows)}")
        self.difference = 0.0
        """The largest between outputs of the run and what was noted, of the largest output."""
        self._spans: dict[int, dict[int, Span]] = {row: {} for row in self.rows}
        self._noted: dict[int, list[_Noted]] = {row: [] for row in self.rows}
        self._first: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._outputs: Tensor | None = None

    def __enter__(self) -> Self:
        """Begin to listen."""
        before = self.transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.transformer.register_forward_hook(self._after)
        self._hooks = [before, after]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def chunks(self, row: int = 0) -> tuple[Span, ...]:
        """Return the chunks of a row that closed or were recalled, by their first steps."""
        spans = self._of(self._spans, row)
        return tuple(spans[first]._replace(chunk=n) for n, first in enumerate(sorted(spans)))

    def moments(self, row: int = 0) -> tuple[Moment, ...]:
        """Return when a row asked its memory; places are those in `chunks`."""
        noted = self._of(self._noted, row)
        place = {first: n for n, first in enumerate(sorted(self._spans[row]))}
        return tuple(
            Moment(
                step,
                tuple(
                    tuple(one._replace(chunk=place[one.chunk]) for one in layer) for layer in layers
                ),
            )
            for step, layers in noted
        )

    def trace(
        self,
        title: str,
        row: int = 0,
        *,
        labels: Sequence[str] = (),
        frames: Tensor | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> Trace:
        """Return what was noted of a row.

        Args:
            title: of the page.
            row: which.
            labels: of each step since the recorder began to listen, oldest first, as its token.
            frames: [T, H, W, 3] uint8, their pictures.
            facts: what else is said at the top of the page.

        Raises:
            ValueError: nothing was asked of the memory, or frames and labels do not fit.
        """
        check_labels("labels", labels)
        if frames is not None:
            check_tensor("frames", frames, "T H W 3")
        moments = self.moments(row)
        first = self._first.get(row, 0)
        last = max((moment.step for moment in moments if moment.step is not None), default=first)
        count = len(labels) or (last + 1 - first if frames is None else len(frames))
        if count < last + 1 - first:
            raise ValueError(
                f"labels: expected one for each of the {last + 1 - first} steps, got {count}"
            )
        named = tuple(labels) or ("",) * count
        steps = tuple(Seen(label) for label in named)
        return Trace(title, self.chunks(row), moments, steps, first, frames, facts or {})

    def _of(self, by_row: Mapping[int, Any], row: int) -> Any:
        if not isinstance(row, int) or row not in by_row:
            raise ValueError(f"row: expected one of {list(self.rows)} that were noted, got {row}")
        return by_row[row]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _SIGNATURE.bind(module, *args, **kwargs)
        given.apply_defaults()
        x, at = given.arguments["x"], given.arguments["at"]
        if max(self.rows) >= len(x):
            raise ValueError(f"rows: expected rows of a batch of {len(x)}, got {list(self.rows)}")
        self._outputs = None
        rows = torch.tensor(self.rows, device=x.device)
        with torch.no_grad():
            self._note(given.arguments, rows, is_asked=at is None or at.shape[1] > 0)

    def _note(self, given: dict[str, Any], rows: Tensor, *, is_asked: bool) -> None:
        x, is_first, mask, at = (
            None if given[name] is None else given[name][rows]
            for name in ("x", "is_first", "mask", "at")
        )
        assert x is not None
        state = given["state"]
        model = self.transformer
        state = model.initial_state(len(rows)) if state is None else state.select(rows)
        # Every layer has the same steps, so chunks are the same in all of them.
        memory = state[0].memory
        assert memory is not None
        zeros = x.new_zeros(x.shape).to(memory.dtype)
        read, _, after = memory.unroll(zeros, is_first, mask)
        exists = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        numbers = memory.step_count[:, None] + exists.cumsum(1) - 1
        numbers = numbers.masked_fill(~exists, -1)
        recalls: tuple[Recall, ...] = ()
        if is_asked:
            self._outputs, _, recalls = model.recall(x, state, is_first, mask, at=at)
            if at is not None:
                numbers = numbers.gather(1, at)
                recalls = (*(_taken(recall, at) for recall in recalls[:-1]), recalls[-1])
        for place, row in enumerate(self.rows):
            self._first.setdefault(row, int(memory.step_count[place]))
            # One that closed with the last step can be recalled by none of this call.
            self._note_chunks(row, read, place)
            self._note_chunks(row, after, place)
            self._note_row(row, read, place, numbers[place], recalls)

    def _note_chunks(self, row: int, memory: ChunkedMemory, place: int) -> None:
        spans = self._spans[row]
        valid = memory.valid[place].nonzero()[:, 0]
        firsts = memory.first_steps[place, valid].tolist()
        new = [n for n, first in enumerate(firsts) if first not in spans]
        spans |= {span.first_step: span for span in memory.spans(valid[new], place)}

    def _note_row(
        self,
        row: int,
        read: ChunkedMemory,
        place: int,
        numbers: Tensor,
        recalls: tuple[Recall, ...],
    ) -> None:
        if not recalls:
            return
        kept = torch.cat([recall.chunks[place].flatten() for recall in recalls]).unique()
        kept = kept[kept >= 0]
        spans = dict(zip(kept.tolist(), read.spans(kept, place), strict=True))
        layers = [_layer(recall, place, spans) for recall in recalls]
        for query, number in enumerate(numbers.tolist()):
            if number >= 0:
                found = tuple(layer[query] for layer in layers)
                self._noted[row].append(_Noted(number, found))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        noted, self._outputs = self._outputs, None
        if noted is None or not noted.numel():
            return
        ran = output[0].detach()[list(self.rows)].double()
        noted = noted.double()
        if not ran.isnan().equal(noted.isnan()):
            raise ValueError(
                "model: expected recall(...) to give NaN where the run did, got NaN of one of them "
                "alone; see that its steps and weights are finite"
            )
        # What is infinite in both is no difference either.
        apart = (ran - noted).masked_fill(ran == noted, 0.0).nan_to_num(nan=0.0, posinf=math.inf)
        largest = float(ran.nan_to_num(0.0, 0.0, 0.0).abs().max()) or 1.0
        difference = float(apart.abs().max()) / largest
        self.difference = max(self.difference, difference)
        is_half = output[0].dtype.itemsize < 4 or torch.is_autocast_enabled(output[0].device.type)
        allowed = HALF_TOLERANCE if is_half else TOLERANCE
        if not difference <= allowed:
            raise ValueError(
                f"model: expected recall(...) to give the outputs of the run within {allowed}, "
                f"got a difference of {difference:.2g}: chunks of equal scores may have been kept "
                "in another order; impl='reference' computes both alike"
            )


def transformer_of(model: nn.Module) -> HTMTransformer:
    """Return the one transformer with a memory in a module.

    Raises:
        ValueError: there is none, or several.
    """
    check_kind("model", model, nn.Module, "a module that holds an HTMTransformer")
    found = [m for m in model.modules() if isinstance(m, HTMTransformer) and m.mem_chunks]
    if len(found) != 1:
        raise ValueError(
            f"model: expected one HTMTransformer with a memory (mem_chunks > 0), got {len(found)} "
            f"in a {type(model).__name__}; only what recalls chunks can be reported on"
        )
    return found[0]


def _layer(recall: Recall, place: int, spans: Mapping[int, Span]) -> list[tuple[Recalled, ...]]:
    """Return for each query of a row what it recalled; chunks are named by their first steps."""
    chunks = recall.chunks[place].tolist()
    weights = recall.chunk_weights[place].double().tolist()
    inside = recall.step_weights[place].double().mean(1).tolist()
    made: list[tuple[Recalled, ...]] = []
    for kept, of_chunks, of_steps in zip(chunks, weights, inside, strict=True):
        one: list[Recalled] = []
        for chunk, weight, steps in zip(kept, of_chunks, of_steps, strict=True):
            if chunk >= 0:
                span = spans[chunk]
                # A short chunk holds its steps at its newest end.
                one.append(Recalled(span.first_step, weight, tuple(steps[-span.count :])))
        made.append(tuple(one))
    return made


def _taken(recall: Recall, at: Tensor) -> Recall:
    """Return what the steps `at` [B, P] recalled."""
    parts = [
        part.gather(1, at.view(*at.shape, *(1,) * (part.ndim - 2)).expand(-1, -1, *part.shape[2:]))
        for part in recall
    ]
    return Recall(*parts)


_SIGNATURE = inspect.signature(HTMTransformer.forward)
