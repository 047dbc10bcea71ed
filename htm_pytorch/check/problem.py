"""`Problem`: inputs of one setting, and what layer and reference make of them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from htm_pytorch.check.config import CheckConfig
from htm_pytorch.memory import ChunkedMemory, Steps
from htm_pytorch.nn.attention import HTMAttention
from htm_pytorch.nn.positions import sinusoid
from htm_pytorch.ops.call import Call
from htm_pytorch.ops.engines import choose
from htm_pytorch.ops.reference import htm_attention

COMPARED = 16
"""Queries that are compared: the reference in float64 is slow."""
CLEAR = 8.0
"""How many errors of a score must lie between the last chunk kept and the next."""
CANDIDATES = 32
"""Draws of a compared query, until the chunks it keeps are clear."""
NOISE = 1e-10
"""A true gradient this much smaller than the largest one is what rounding left of zero."""


class Problem:
    """Inputs of one setting, drawn on the CPU so that they are the same for every device."""

    def __init__(self, config: CheckConfig):
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        # In what the reference's own error is measured, and what that is in the dtype asked for.
        self.measured = torch.float32 if self.dtype == torch.float64 else self.dtype
        self.shrink = torch.finfo(self.dtype).eps / torch.finfo(self.measured).eps
        self.layer = _layer(config)
        generator = torch.Generator().manual_seed(config.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            # Exact in float32 too, where the reference is measured for float64.
            drawn = torch.randn(*shape, generator=generator, device="cpu") * scale
            return drawn.to(self.measured).to(self.dtype)

        def mask(*shape: int) -> Tensor | None:
            if not config.masked:
                return None
            return torch.rand(*shape, generator=generator, device="cpu") < 0.8

        batch, queries, steps, dim = config.batch, config.queries, config.steps, config.dim
        self.inputs = {
            "queries": normal(batch, queries, dim),
            "memories": normal(batch, steps, dim),
        }
        for name, parameter in self.layer.named_parameters():
            self.inputs[name] = normal(*parameter.shape, scale=parameter.shape[-1] ** -0.5)
        self.mask = mask(batch, steps)
        self.chunk_mask = mask(batch, queries, -(-steps // config.mem_chunk_size))
        # The compared pairs of row and query, [P] each, from the first to the last.
        total = batch * queries
        pairs = torch.linspace(0, total - 1, min(COMPARED, total), device="cpu").round().long()
        self.row, self.query = pairs // queries, pairs % queries
        if self.mask is not None:
            self.inputs["memories"][~self.mask] = torch.nan
        if self.chunk_mask is not None and len(pairs) > 1:
            # One that sees nothing: zeros, and no gradient.
            self.chunk_mask[self.row[1], self.query[1]] = False
        self.clear, chunks, kept = self._choose(normal(len(pairs), CANDIDATES, dim))
        self.at, self.exists = self._places(chunks, kept)
        self.cotangent = normal(len(pairs), dim) * self.clear[:, None]

    def _choose(self, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take as queries the first of the candidates [P, X, D] whose kept chunks are clear.

        Returns:
            [P] bool, whether there was one; [P, K] the chunks it keeps; [P, K] bool, False where
            it sees fewer.
        """
        k, found = self.config.topk_mems, []
        for row in self.row.unique():
            here = self.row == row
            scores, allowed = self._scores(row, candidates[here], torch.float64)
            margin = CLEAR * self._score_error(row, candidates[here])
            if self.chunk_mask is not None:
                allowed = allowed & self.chunk_mask[row, self.query[here], None]
            scores = scores.masked_fill(~allowed, -torch.inf)
            best, chunks = scores.topk(min(k + 1, scores.shape[-1]))
            is_clear = torch.ones(best.shape[:2], dtype=torch.bool, device=best.device)
            if best.shape[-1] > k:
                is_clear = best[..., k].isinf() | (best[..., k - 1] - best[..., k] > margin)
            first = torch.arange(len(best), device=best.device), is_clear.int().argmax(1)
            self.inputs["queries"][row, self.query[here]] = candidates[here][first]
            found.append((is_clear[first], chunks[first][:, :k], best[first][:, :k].isfinite()))
        clear, chunks, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
        return clear, chunks, kept

    def _places(self, chunks: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the steps of the chunks [P, K] lie, [P, K * C], and whether they exist."""
        size = self.config.mem_chunk_size
        at = (
            chunks[..., None] * size
            + torch.arange(size, device=chunks.device)
            - -self.config.steps % size
        )
        exists = (kept[..., None] & (at >= 0)).flatten(1)
        at = at.clamp(min=0).flatten(1)
        return at, exists if self.mask is None else exists & self.mask[self.row[:, None], at]

    def _scores(self, row: Tensor, queries: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the router's scores [P, X, M] in the paper's order, and the valid chunks [M]."""
        steps, mask = self.inputs["memories"][row, None].to(dtype), self.mask
        mask = None if mask is None else mask[row, None]
        size, eps = self.config.mem_chunk_size, self.layer.eps
        memory = Steps(steps, size, mask, eps).chunked()
        asked, keys = (
            linear(x.to(dtype), *(self.inputs[f"{name}.{part}"].to(dtype) for part in _LINEAR))
            for name, x in (("to_summary_queries", queries), ("to_summary_keys", memory.summaries))
        )
        return asked @ keys[0].T * keys.shape[-1] ** -0.5, memory.valid[0]

    def _score_error(self, row: Tensor, queries: Tensor) -> Tensor:
        """Return how much a score is off in the dtype, [P, X]; what all share does not matter."""
        true, rough = (
            self._scores(row, queries, dtype)[0].double()
            for dtype in (torch.float64, self.measured)
        )
        return (rough - true).std(-1, correction=0) * self.shrink

    def layer_output(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the layer's output [B, Q, D]."""
        memory, mask = self._memory(inputs)
        chunk_mask = self.chunk_mask
        if chunk_mask is not None:
            chunk_mask = chunk_mask.to(inputs["queries"].device)
        weights = {name: x for name, x in inputs.items() if name not in ("queries", "memories")}
        arguments = (inputs["queries"], memory, mask, chunk_mask)
        return torch.func.functional_call(self.layer, weights, arguments)

    def _memory(self, inputs: dict[str, Tensor]) -> tuple[Tensor | ChunkedMemory, Tensor | None]:
        """Return the memory as the layer is given it, and its mask."""
        memory = inputs["memories"]
        mask = None if self.mask is None else self.mask.to(memory.device)
        if not self.config.chunked:
            return memory, mask
        size, eps = self.config.mem_chunk_size, self.layer.eps
        return ChunkedMemory.from_steps(memory, size, mask, borders="newest", eps=eps), None

    def plain_output(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the reference's output [B, Q, D], of the compared queries alone.

        Each of them is a row of its own, whose memory is the chunks it keeps: others are not in
        the result, and would cost most of the time.
        """
        config, queries = self.config, inputs["queries"]
        row, query, at, exists = (
            part.to(queries.device) for part in (self.row, self.query, self.at, self.exists)
        )
        steps = inputs["memories"][row[:, None], at].to(queries.dtype)
        steps = steps.masked_fill(~exists[..., None], 0.0)
        size, eps = config.mem_chunk_size, self.layer.eps if config.masked else 0.0
        memory = ChunkedMemory.from_steps(steps, size, exists, borders="newest", eps=eps)
        positions = None
        if config.add_pos_enc:
            positions = sinusoid(size, config.dim, queries.dtype, queries.device)
        outputs = htm_attention(
            queries[row, query, None],
            memory,
            inputs,
            heads=config.heads,
            k=config.topk_mems,
            positions=positions,
        )
        return queries.new_zeros(queries.shape).index_put((row, query), outputs[:, 0])

    def values(
        self,
        function: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor] | None = None,
        cotangent: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the function's output [P, D] for the compared queries, and all gradients."""
        inputs = self.leaves() if inputs is None else inputs
        output = function(inputs)[self.row, self.query]
        leaves = {name: x for name, x in inputs.items() if x.requires_grad}
        cotangent = (self.cotangent if cotangent is None else cotangent).to(output)
        gradients = torch.autograd.grad(
            output, list(leaves.values()), cotangent, materialize_grads=True
        )
        named = zip(leaves, gradients, strict=True)
        return {"output": output.detach()} | {f"gradient of {name}": g for name, g in named}

    def truth(self) -> dict[str, Tensor]:
        """Return the values of the reference in float64; not every device knows that well."""
        return self.values(self.plain_output, self.leaves("cpu", torch.float64))

    def reference_values(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return the values of the reference in the dtype; a generator moves its inputs by u."""
        inputs, cotangent = self.leaves(dtype=self.measured), self.cotangent
        if generator is not None:
            cotangent = self._moved(cotangent, generator)
            inputs = {
                name: self._moved(x.detach(), generator).requires_grad_(x.requires_grad)
                for name, x in inputs.items()
            }
        return self.values(self.plain_output, inputs, cotangent)

    def _moved(self, x: Tensor, generator: torch.Generator) -> Tensor:
        by = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu") - 0.5
        moved = x.cpu().double() * (1 + torch.finfo(self.measured).eps * by)
        return moved.to(x.device, self.measured)

    def leaves(
        self, device: str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return copies of the inputs, by default as the layer gets them, that take gradients."""
        inputs = {}
        for name, x in self.inputs.items():
            is_wanted = name != "memories" or not self.config.detach_memories
            copy = x.clone().to(device or self.config.device, dtype or self.dtype)
            inputs[name] = copy.requires_grad_(is_wanted)
        return inputs

    def errors(self, values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
        """Return the largest differences from the truth, relative to its largest entries."""
        everything = max(_largest(true) for true in truth.values()) or 1.0
        errors = {}
        for name, true in truth.items():
            scale = _largest(true)
            scale = scale if scale > NOISE * everything else everything
            difference = values[name].cpu().double() - true
            if name == "output":
                difference = difference[self.clear]
            errors[name] = _largest(difference) / scale
        return errors

    def taken(self) -> str:
        """Return the name of the implementation that "auto" takes."""
        inputs = self.leaves()
        queries, (memory, mask) = inputs["queries"], self._memory(inputs)
        size, positions = self.config.mem_chunk_size, None
        if isinstance(memory, Tensor):
            memory = Steps(memory, size, mask, self.layer.eps)
        if self.config.add_pos_enc:
            positions = sinusoid(size, self.config.dim, queries.dtype, queries.device)
        # The queries stand for what they are projected to, which is of their shape and dtype.
        call = Call.of(queries, memory, self.config.topk_mems, positions, None, "auto")
        return choose("auto", call).name

    def gradcheck(self) -> bool:
        """Compare all gradients with finite differences."""
        inputs = self.leaves()

        def function(*tensors: Tensor) -> Tensor:
            return self.layer_output(dict(zip(inputs, tensors, strict=True)))

        return torch.autograd.gradcheck(
            function,
            tuple(inputs.values()),
            atol=1e-7,
            rtol=1e-5,
            # A GPU may take the sums of two calls in two orders.
            nondet_tol=1e-10,
            fast_mode=True,
            raise_exception=False,
        )


_LINEAR = ("weight", "bias")


def _layer(config: CheckConfig) -> HTMAttention:
    # Its own parameters are not used, and their drawing leaves no trace.
    with torch.random.fork_rng(devices=[]):
        return HTMAttention(
            config.dim,
            config.heads,
            config.topk_mems,
            config.mem_chunk_size,
            config.dim_head,
            config.add_pos_enc,
            detach_memories=config.detach_memories,
            impl=config.impl,
        )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
