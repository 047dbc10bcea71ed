"""A memory in a language model of Hugging Face transformers, asked for what it read long ago.

A text is 8 pairs of a key and a value, noise, and the 8 keys again in another order; the model
names their values. It is a small Qwen2 whose layers attend to the newest 8 tokens, while the pairs
lie 200 to 516 tokens back. So without a memory it can only guess, 1 of 16 values. With a memory
after its first layer it learns to look the pairs up.

    python examples/06_transformers.py
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from htm_pytorch.integrations.transformers import HTMCache, add_memory

PAIRS, KEYS, VALUES, NOISE = 8, 16, 16, 32
DIM, WINDOW, CHUNK = 64, 8, 8
STAGES = [(36, 60), (61, 120), (103, 240), (200, 500)]  # tokens of noise; harder when mastered
TOKENS = 4096  # in a batch
RATE = 3e-3


def texts(rows: int, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Return texts with `least` to `most` tokens of noise, and the values that they ask for."""
    noise = int(torch.randint(least, most + 1, ()))
    keys = torch.rand(rows, KEYS).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (rows, PAIRS))
    order = torch.rand(rows, PAIRS).argsort(1)
    between = KEYS + VALUES + torch.randint(NOISE, (rows, noise))
    pairs = torch.stack([keys, values], 2).flatten(1)
    return torch.cat([pairs, between, keys.gather(1, order)], 1), values.gather(1, order)


def make_model(has_memory: bool) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=KEYS + VALUES + NOISE,
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        use_sliding_window=True,
        max_window_layers=0,  # in all layers
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # for near positions
        initializer_range=DIM**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    if has_memory:
        add_memory(
            model,
            [0],
            topk_mems=8,
            mem_chunk_size=CHUNK,
            mem_chunks=64,
            heads=4,
            dim_head=16,
            detach_memories=False,  # so that the first layer learns what to store
        )
        # A block adds zero at first, for models that are trained already. This one is not.
        nn.init.normal_(model.model.layers[0].htm.attn.attn.to_out.weight, std=0.1)
    return model


def train(model: Qwen2ForCausalLM, updates: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    stage, shares = 0, []
    for update in range(1, updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, update / 20)
        least, most = STAGES[stage]
        x, y = texts(max(8, TOKENS // (most + 3 * PAIRS)), least, most)
        logits = model(x, use_cache=False, logits_to_keep=PAIRS).logits
        loss = cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shares.append(float((logits.argmax(-1) == y).float().mean()))
        if update % 25 == 0:
            share = sum(shares[-25:]) / 25
            if update % 100 == 0:
                print(f"  update {update:4}: noise {least:3} to {most:3}, {share:.3f} right")
            if share > 0.98 and stage == len(STAGES) - 1:
                break
            stage = min(stage + (share > 0.85), len(STAGES) - 1)


@torch.no_grad()
def judge(model: Qwen2ForCausalLM) -> tuple[float, float]:
    """Return the share that is right where texts are read whole, and in pieces with `generate`."""
    model.eval()
    whole, generated = [], []
    for _ in range(4):
        x, y = texts(32, *STAGES[-1])
        answers = model(x, use_cache=False, logits_to_keep=PAIRS).logits.argmax(-1)
        whole.append((answers == y).float().mean())
        # Read to the first question in pieces, then let it generate the answer.
        prompt = x[:, : x.shape[1] - PAIRS + 1]
        cache = HTMCache(config=model.config)
        for piece in prompt[:, :-1].split(100, 1):
            model(piece, cache=cache)
        made = model.generate(prompt, cache=cache, max_new_tokens=1, do_sample=False)
        generated.append((made[:, -1] == y[:, 0]).float().mean())
    return float(torch.stack(whole).mean()), float(torch.stack(generated).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=800, help="at most, of each model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("with memory", "window only"):
        torch.manual_seed(options.seed)
        print(f"{name}:")
        model = make_model(has_memory=name == "with memory")
        began = time.process_time()
        # What the window does not show cannot be learned: a few updates are enough to see it.
        train(model, options.updates if name == "with memory" else min(100, options.updates))
        seconds = time.process_time() - began
        whole, generated = judge(model)
        print(f"  {whole:.3f} right, {generated:.3f} by generate; trained {seconds:.0f} s")


if __name__ == "__main__":
    main()
