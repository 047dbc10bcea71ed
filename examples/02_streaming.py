"""A stream that comes in pieces: the same as the whole, with a memory that can be put away."""

import importlib.util
import tempfile
from pathlib import Path

import torch

from htm_pytorch import ChunkedMemory, HTMTransformer

torch.manual_seed(0)
model = HTMTransformer(
    dim=32,
    depth=2,
    heads=4,
    dim_head=8,
    topk_mems=2,
    mem_chunk_size=8,
    mem_chunks=16,  # then it forgets: 128 steps
    window=8,  # as long as a chunk, so no step is out of sight while its chunk is open
).eval()

steps = torch.randn(2, 300, 32)
is_first = torch.zeros(2, 300, dtype=torch.bool)
is_first[:, 0] = True
is_first[1, 200] = True  # the second row starts a new episode here

with torch.no_grad():
    whole, _ = model(steps, model.initial_state(2), is_first)

    state = model.initial_state(2)
    pieces = []
    for piece, first in zip(steps.split(37, 1), is_first.split(37, 1), strict=True):
        y, state = model(piece, state, first)
        pieces.append(y)
    difference = (torch.cat(pieces, 1) - whole).abs().max()
    print(f"300 steps in pieces of 37 against all at once: {difference:.0e} apart")

    memory = state[0].memory
    for row in range(2):
        print(
            f"row {row}: {int(memory.valid[row].sum())} chunks to recall "
            f"and {int(memory.open_count[row])} steps in the open one"
        )

    if importlib.util.find_spec("safetensors"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer0.safetensors"
            memory.save(path)
            loaded = ChunkedMemory.load(path)
            print(f"saved and loaded: {path.stat().st_size:,} bytes")
        state = (state[0]._replace(memory=loaded), *state[1:])
    else:
        print("not saved: that needs the extra `files`")

    _, _, recalls = model.recall(torch.randn(2, 1, 32), state)
    for layer, recalled in enumerate(recalls):
        for row in range(2):
            chunks = recalled.chunks[row, 0].tolist()
            weights = [round(weight, 2) for weight in recalled.chunk_weights[row, 0].tolist()]
            print(f"layer {layer}, row {row} recalls chunks {chunks} with weights {weights}")
