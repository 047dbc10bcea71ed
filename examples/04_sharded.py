"""One memory on several machines, here two processes of this one:

torchrun --nproc-per-node 2 examples/04_sharded.py
"""

import os

import torch
from torch import distributed as dist

from htm_pytorch import ChunkedMemory, HTMAttention
from htm_pytorch.memory import ShardedMemory
from htm_pytorch.ops.sharded import exchanged_bytes

if "RANK" not in os.environ:
    raise SystemExit(f"start it by: torchrun --nproc-per-node 2 {__file__}")
dist.init_process_group("gloo")  # torchrun's environment says who the others are
rank, ranks = dist.get_rank(), dist.get_world_size()

# The same parameters, steps and queries on every rank: only the chunks are shared out.
torch.manual_seed(0)
attn = HTMAttention(dim=32, heads=4, dim_head=8, topk_mems=4)
steps = torch.randn(1, 1000, 32)
queries = torch.randn(1, 5, 32)

# Room for 64 chunks of 8 steps on every rank.
memory = ShardedMemory(ChunkedMemory.empty(1, 64, 8, 32), timeout=30)
for piece in steps.split(100, 1):
    memory = memory.append(piece)  # nothing is sent: every rank knows which chunks are its own

attended, recalled = attn.recall(queries, memory)
attended.square().mean().backward()
kept = recalled.chunks % ranks == rank
print(
    f"rank {rank} of {ranks} holds {int(memory.local.valid.sum())} of 125 chunks, "
    f"{int(kept.sum())} of the {kept.numel()} that were recalled"
)

if rank == 0:
    gradients = [parameter.grad for parameter in attn.parameters()]
    attn.zero_grad()
    alone = ChunkedMemory.empty(1, 64 * ranks, 8, 32).append(steps)
    expected = attn(queries, alone)
    expected.square().mean().backward()
    apart = max(
        float((mine - parameter.grad).abs().max())
        for mine, parameter in zip(gradients, attn.parameters(), strict=True)
    )
    print(f"outputs {float((attended - expected).abs().max()):.0e} from those of one process")
    print(f"gradients {apart:.0e} from those of one process")
    sent = exchanged_bytes(queries=5, heads=4, dim=32, k=4)
    print(f"a query hands {(sent.scores + sent.contexts) // 5} bytes to the others")
dist.destroy_process_group()
