"""Learn to find one step among 512 by its key, and look at what is recalled.

Every memory has 32 chunks of 16 steps. One step holds a key and a value, the others noise. The
query is the key, the answer the value.
"""

import torch
from torch import Tensor, nn

from htm_pytorch import HTMAttention

DIM, CHUNK_SIZE, CHUNKS, KEPT, BATCH = 32, 16, 32, 2, 32
HALF = DIM // 2


def make_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memories, queries, answers, and the chunk that holds each answer."""
    memories = 0.2 * torch.randn(BATCH, CHUNKS * CHUNK_SIZE, DIM)
    keys, values = torch.randn(2, BATCH, HALF)
    place = torch.randint(CHUNKS * CHUNK_SIZE, (BATCH,))
    memories[torch.arange(BATCH), place] = torch.cat([keys, values], 1)
    queries = torch.cat([keys, torch.zeros_like(values)], 1)
    return memories, queries[:, None], values, place // CHUNK_SIZE


torch.manual_seed(0)
attend = HTMAttention(DIM, heads=4, topk_mems=KEPT, mem_chunk_size=CHUNK_SIZE, dim_head=DIM)
answer = nn.Linear(DIM, HALF)
optimizer = torch.optim.Adam([*attend.parameters(), *answer.parameters()], 3e-3)

print("updates  right chunk kept  its weight  error (1.0: knows nothing)")
for update in range(401):
    memories, queries, values, chunk = make_batch()
    attended, recalled = attend.recall(queries, memories)
    error = (answer(attended[:, 0]) - values).square().mean()
    optimizer.zero_grad()
    error.backward()
    optimizer.step()
    if update % 100 == 0:
        hit = recalled.chunks[:, 0] == chunk[:, None]
        weight = (recalled.chunk_weights[:, 0] * hit).sum(1).mean().item()
        kept = hit.any(1).float().mean().item()
        print(f"{update:7}{kept:18.2f}{weight:12.2f}{error.item():8.2f}")
print(f"Chance of keeping the right chunk is {KEPT / CHUNKS:.2f}.")

# What was not kept does not matter, whatever it holds.
with torch.no_grad():
    attended, recalled = attend.recall(queries, memories)
    kept = torch.zeros(BATCH, CHUNKS, dtype=torch.bool).scatter(1, recalled.chunks[:, 0], True)
    mask = kept.repeat_interleave(CHUNK_SIZE, 1)
    alone = attend(queries, memories, mask=mask)
change = (alone - attended).abs().max()
print(f"Masking the {CHUNKS - KEPT} other chunks changes the output by {change:.0e}.")
