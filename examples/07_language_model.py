"""A language model with a memory: characters of Python's standard library, then writing on.

An `HTMTransformer` is trained twice on texts of 1,024 characters: with a memory, and without one
(`mem_chunks=0`), with about as many parameters. Both attend to the newest 32 characters. They are
judged on modules that they were not trained on, each read from its beginning to its end in pieces,
with the state carried from piece to piece. Then the one with a memory writes on.

    python examples/07_language_model.py
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from htm_pytorch import HTMTransformer
from htm_pytorch.nn import TransformerState

DIM, DEPTH, HEADS, WINDOW = 96, 1, 4, 32
CHUNK, CHUNKS, KEPT = 16, 512, 8
CHARACTERS = 128  # ASCII; all others are one
LENGTH, BATCH = 1024, 8
GRAM, GRAMS = 3, 8192  # so many characters are one of so many numbers, by a hash
LEAD = GRAM  # the characters before a text that are needed to read it
RATE = 3e-3


def read_modules() -> list[Tensor]:
    """Return the modules of the standard library that are long enough, as numbers."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(root.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > 8 * LENGTH:
            modules.append(torch.tensor([min(ord(letter), CHARACTERS - 1) for letter in text]))
    return modules


class LanguageModel(nn.Module):
    def __init__(self, has_memory: bool):
        super().__init__()
        self.character = nn.Embedding(CHARACTERS, DIM)
        self.gram = nn.Embedding(GRAMS, DIM)
        self.gram_before = nn.Linear(DIM, DIM, bias=False)
        self.body = HTMTransformer(
            DIM,
            DEPTH,
            HEADS,
            DIM // HEADS,
            topk_mems=KEPT,
            mem_chunk_size=CHUNK,
            mem_chunks=CHUNKS if has_memory else 0,
            window=WINDOW,
            # An HTM block has 6 DIM ** 2 parameters, an MLP 2 DIM ** 2 for each unit of its ratio.
            mlp_ratio=4 if has_memory else 7,
            detach_memories=False,
        )
        self.head = nn.Linear(DIM, CHARACTERS)

    def forward(
        self, text: Tensor, state: TransformerState | None = None
    ) -> tuple[Tensor, TransformerState]:
        """Return the logits of what comes after each of the T characters, and the state.

        A step of the memory has to say what came before a character beside the character itself:
        so whoever finds the step by what came before finds what comes next. The text therefore
        has `LEAD` characters more at its beginning, which are not read themselves.
        """
        grams = text.unfold(1, GRAM, 1) @ torch.tensor([16769023, 131071, 8191]) % GRAMS
        grams = self.gram(grams)
        x = self.character(text[:, LEAD:]) + grams[:, 1:] + self.gram_before(grams[:, :-1])
        y, state = self.body(x, state)
        return self.head(y), state


def train(model: LanguageModel, modules: list[Tensor], updates: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    sizes = torch.tensor([float(len(module)) for module in modules])
    losses = []
    for update in range(1, updates + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, update / 20, 1.1 - update / updates)
        texts = []
        for number in torch.multinomial(sizes, BATCH, replacement=True).tolist():
            start = int(torch.randint(len(modules[number]) - LENGTH - LEAD, ()))
            texts.append(modules[number][start : start + LEAD + LENGTH + 1])
        text = torch.stack(texts)
        logits, _ = model(text[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), text[:, LEAD + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if update % 50 == 0:
            print(f"  update {update:4}: perplexity {math.exp(sum(losses[-50:]) / 50):.2f}")


@torch.no_grad()
def perplexity(model: LanguageModel, modules: list[Tensor], most: int) -> float:
    """Return the perplexity of a character, over the first `most` of each module."""
    total, count = 0.0, 0
    for module in modules:
        text, state = module[None, : most + LEAD + 1], None
        for start in range(0, text.shape[1] - LEAD - 1, 2048):
            piece = text[:, start : start + 2048 + LEAD + 1]
            logits, state = model(piece[:, :-1], state)
            targets = piece[0, LEAD + 1 :]
            total += float(cross_entropy(logits[0], targets, reduction="sum"))
            count += len(targets)
    return math.exp(total / count)


@torch.no_grad()
def write(model: LanguageModel, text: Tensor, length: int) -> str:
    """Read a text [N] at once, and write on, a character at a time, with the state."""
    made = text.tolist()
    logits, state = model(text[None])
    for _ in range(length):
        made.append(int(torch.multinomial((logits[0, -1] / 0.5).softmax(-1), 1)))
        logits, state = model(torch.tensor([made[-LEAD - 1 :]]), state)
    return "".join(map(chr, made[len(text) :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--most", type=int, default=20_000, help="characters read of each module")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    modules = read_modules()
    unseen, seen = modules[::16], [m for n, m in enumerate(modules) if n % 16]
    print(f"trains on {len(seen)} modules, is judged on {len(unseen)} others")
    for name in ("without memory", "with memory"):
        torch.manual_seed(options.seed)
        model = LanguageModel(has_memory=name == "with memory")
        count = sum(parameter.numel() for parameter in model.body.parameters())
        print(f"{name}: {count:,} parameters in the transformer")
        began = time.process_time()
        train(model, seen, options.updates)
        seconds = time.process_time() - began
        result = perplexity(model.eval(), unseen, options.most)
        print(f"{name}: perplexity {result:.2f} on unseen modules, trained {seconds:.0f} s")
    print(write(model, unseen[0][:4000], 300))


if __name__ == "__main__":
    main()
