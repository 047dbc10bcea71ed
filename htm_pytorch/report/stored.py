"""From a layer, queries and a memory, wherever it lies, to a `Trace`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from htm_pytorch.memory import ChunkedMemory, Home
from htm_pytorch.memory.home import is_home
from htm_pytorch.nn import HTMAttention, HTMBlock
from htm_pytorch.report.trace import Moment, Recalled, Seen, Trace, check_labels
from htm_pytorch.shapes import check_kind, check_number, check_tensor


@torch.no_grad()
def trace_memory(
    layer: HTMAttention | HTMBlock,
    queries: Tensor,
    memory: ChunkedMemory | Home,
    title: str,
    *,
    row: int = 0,
    labels: Sequence[str] = (),
    steps: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Trace:
    """Return what queries recall from a memory: in RAM, on disk, in an object store.

    Args:
        layer: which asks.
        queries: [B, Q, D].
        memory: which is asked, of B rows, or 1.
        title: of the page.
        row: which of the B rows is shown.
        labels: of each of the Q queries, in a few words.
        steps: of each step of the past from number 0 on, where there are few enough to be shown;
            otherwise only the chunks that were recalled are.
        facts: what else is said at the top of the page.

    Raises:
        ValueError: as for `layer.recall`; or labels do not fit.
    """
    check_kind("layer", layer, (HTMAttention, HTMBlock), "an HTMAttention or an HTMBlock")
    if not (isinstance(memory, ChunkedMemory) or is_home(memory)):
        raise ValueError(
            f"memory: expected a memory, as ChunkedMemory.from_steps makes one of a tensor, got "
            f"{type(memory).__name__}"
        )
    check_tensor("queries", queries, "B Q D")
    check_labels("labels", labels)
    check_labels("steps", steps)
    check_number("row", row, len(queries))
    count = queries.shape[1]
    if labels and len(labels) != count:
        raise ValueError(f"labels: expected {count}, one a query, got {len(labels)}")
    _, recall = layer.recall(queries, memory)
    chunks, weights, inside = (part[row].cpu() for part in recall)
    kept = chunks[chunks >= 0].unique()
    of_memory = row if memory.batch > 1 else 0
    spans = memory.spans(kept, of_memory)
    # What is fetched of many memories has one row, with the chunks of all.
    fetched = memory.fetch(kept) if len(kept) else None
    step_mask = None if fetched is None else fetched.step_mask
    at = 0 if fetched is None or fetched.batch == 1 else row
    columns: list[list[int]] = []
    for place in range(len(kept)):
        exists = torch.ones(memory.chunk_size, dtype=torch.bool, device="cpu")
        columns.append(
            (exists if step_mask is None else step_mask[at, place].cpu()).nonzero()[:, 0].tolist()
        )
    order = sorted(range(len(spans)), key=lambda place: spans[place].first_step)
    place_of = {spans[place].chunk: (new, columns[place]) for new, place in enumerate(order)}
    means = inside.double().mean(1)
    moments: list[Moment] = []
    for query in range(count):
        found: list[Recalled] = []
        for rank, chunk in enumerate(chunks[query].tolist()):
            if chunk >= 0:
                place, some = place_of[chunk]
                of_steps = tuple(means[query, rank, some].tolist())
                found.append(Recalled(place, float(weights[query, rank]), of_steps))
        label = labels[query] if labels else f"query {query}"
        moments.append(Moment(None, (tuple(found),), label=label))
    shown = tuple(spans[place] for place in order)
    trace = Trace(title, shown, tuple(moments), facts=facts or {})
    return replace(trace, steps=tuple(Seen(step) for step in steps)) if steps else trace
