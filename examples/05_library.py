"""A memory on disk: the standard library of Python, and a small model that looks things up in it.

`build` stores every module, token by token. `train`, in another process, opens what is stored and
trains a small model to name the next token from the 16 before it. It is judged on modules that it
was not trained on, against the same model with an empty memory. The memory holds these modules,
so this is an exam with open books: what has to be learned is to find the page among thousands.

    python examples/05_library.py           # both; or one of them: build, train
    python examples/05_library.py --small   # a part of the library, for a first try
"""

import argparse
import re
import subprocess
import sys
import sysconfig
import time
import zlib
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from htm_pytorch import ChunkedMemory, HTMAttention, memory
from htm_pytorch.memory import StoredMemory

TOKEN = re.compile(r"\w+|[^\w\s]")
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
FREQUENT, HASHED = 4096, 1024  # classes of tokens: frequent ones, and the others by a hash
CODE = 64
CHUNK_SIZE, KEPT, HEADS = 32, 4, 4
DIM = 3 * CODE  # of a step: what comes before a token, the token as a mark of its page, the token
CONTEXT, WIDTH = 16, 128
BATCH, OTHERS = 64, 256
PAGE, PLACE, VOTE = 40.0, 9.0, 20.0  # how sharply pages and places are told apart at first


def read_library(small: bool) -> list[list[str]]:
    """Return the tokens of every module."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.parts)]
    modules = [
        TOKEN.findall(path.read_text(encoding="utf-8", errors="replace")) for path in sorted(paths)
    ]
    modules = [tokens for tokens in modules if len(tokens) > 8 * CONTEXT]
    return modules[::16] if small else modules


def classes_of(modules: list[list[str]]) -> list[Tensor]:
    """Return the modules with a number for each token."""
    count = Counter(token for tokens in modules for token in tokens)
    known = {token: number for number, (token, _) in enumerate(count.most_common(FREQUENT))}

    def number(token: str) -> int:
        return known.get(token, FREQUENT + zlib.crc32(token.encode()) % HASHED)

    return [torch.tensor([number(token) for token in tokens]) for tokens in modules]


def codes() -> Tensor:
    """Return a fixed random code for each class, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return normalize(torch.randn(FREQUENT + HASHED, CODE, generator=generator), dim=1)


def rarity() -> Tensor:
    """Return how much a class says about a page: a comma says little."""
    rank = torch.arange(1, FREQUENT + HASHED + 1).clamp(max=FREQUENT)
    return (rank.log1p() / rank[-1].log1p())[:, None] ** 2


def before(tokens: Tensor) -> Tensor:
    """Return codes of what comes before each place [..., T]: the last token, and the one before."""
    code = codes()[tokens]
    shifted = torch.zeros_like(code)
    shifted[..., 1:, :] = code[..., :-1, :]
    shifted[..., 2:, :] += 0.5 * code[..., :-2, :]
    return shifted


def build(place: Path, small: bool) -> None:
    """Store each module as an episode."""
    modules = classes_of(read_library(small))
    start = time.perf_counter()
    with memory.open(place, dim=DIM, chunk_size=CHUNK_SIZE, dtype=torch.float16) as stored:
        for tokens in modules:
            code, mark = codes()[tokens], (codes() * rarity())[tokens]
            steps = torch.cat([before(tokens), mark, code], 1).half()[None]
            is_first = torch.zeros(1, len(tokens), dtype=torch.bool)
            is_first[:, 0] = True
            stored.append(steps, is_first)
        stored.flush()
        print(f"{len(modules)} modules stored in {time.perf_counter() - start:.1f} s: {stored}")


class Reader(nn.Module):
    """A GRU over the last tokens, and a look into the memory; both vote for the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", codes())
        self.register_buffer("marks", codes() * rarity())
        self.recurrent = nn.GRU(CODE, WIDTH, batch_first=True)
        self.attend = HTMAttention(
            WIDTH + 2 * CODE,
            HEADS,
            KEPT,
            dim_head=CODE,
            dim_memory=DIM,
            dim_features=DIM,
        )
        self.vote = nn.Linear(WIDTH + DIM, FREQUENT + HASHED)
        self.read = nn.Linear(WIDTH + DIM, CODE)
        self._begin_as_a_search()

    @torch.no_grad()
    def _begin_as_a_search(self) -> None:
        """Compare tokens with tokens, before anything is learned.

        The router compares those of the context with those of a page, the heads the last two with
        those before each step; what came next there gets votes. Gradients reach only the pages
        that were kept, and of thousands a router that begins at random keeps none that helps.
        """
        same, bag, last = torch.eye(CODE), slice(WIDTH, WIDTH + CODE), slice(WIDTH + CODE, None)
        before, page, token = slice(CODE), slice(CODE, 2 * CODE), slice(2 * CODE, None)
        inside = self.attend.attn
        keys, values = inside.to_kv.weight.view(2, HEADS, CODE, -1)
        for weight, columns, value in (
            (self.attend.to_summary_queries.weight[:CODE], bag, PAGE * same),
            (self.attend.to_summary_keys.weight[:CODE], page, PAGE * same),
            (inside.to_q.weight.view(HEADS, CODE, -1), last, PLACE * same),
            (keys, before, PLACE * same),
            (values, token, same),
            (inside.to_out.weight[:CODE], slice(None), same.repeat(1, HEADS) / HEADS),
            (self.read.weight, slice(WIDTH, WIDTH + CODE), VOTE * same),
        ):
            weight.zero_()
            weight[..., columns] = value

    def forward(
        self, context: Tensor, held: StoredMemory | ChunkedMemory, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the token after each context [B, T], and what the memory was asked."""
        code = self.codes[context]
        hidden = self.recurrent(code)[0][:, -1:]
        last = code[:, -1:] + 0.5 * code[:, -2:-1]
        mark = self.marks[context].mean(1, keepdim=True)
        query = torch.cat([hidden, mark, last], 2)
        attended = self.attend(query, held, chunk_attn_mask=mask)
        both = torch.cat([hidden, attended], 2)[:, 0]
        return self.vote(both) + self.read(both) @ self.codes.T, query


class Places:
    """Places in some modules, each with the tokens before it."""

    def __init__(self, modules: list[Tensor], episodes: list[int], held: StoredMemory):
        self.modules, self.episodes, self.held = modules, episodes, held
        self.first_chunk = torch.searchsorted(held.episodes, torch.arange(len(modules)))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return contexts [B, T], the tokens after them [B], their modules and their chunks [B]."""
        chosen = torch.randint(len(self.episodes), (count,), generator=generator).tolist()
        episode = [self.episodes[number] for number in chosen]
        shares = torch.rand(count, generator=generator).tolist()
        place = [
            CONTEXT + int(share * (len(self.modules[number]) - CONTEXT))
            for number, share in zip(episode, shares, strict=True)
        ]
        pairs = list(zip(episode, place, strict=True))
        contexts = torch.stack([self.modules[n][at - CONTEXT : at] for n, at in pairs])
        following = torch.stack([self.modules[n][at] for n, at in pairs])
        chunk = torch.tensor([int(self.first_chunk[n]) + at // CHUNK_SIZE for n, at in pairs])
        return contexts, following, torch.tensor(episode), chunk


def train(place: Path, small: bool, updates: int, seed: int) -> None:
    """Train with the memory and without, and judge on every eighth module."""
    modules = classes_of(read_library(small))
    held = memory.open(place, read_only=True)
    print(f"opened: {held}")
    exam = Places(modules, list(range(0, len(modules), 8)), held)
    lessons = Places(modules, [n for n in range(len(modules)) if n % 8], held)
    empty = ChunkedMemory.from_steps(torch.zeros(1, 0, DIM), CHUNK_SIZE)
    print(f"{'':16}{'loss on new modules':>22}{'page found':>12}{'seconds':>9}")
    for name, stored in ("without memory", empty), ("with memory", held):
        torch.manual_seed(seed)
        reader, generator = Reader(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates)
        start = time.perf_counter()
        for _ in range(updates):
            contexts, following, episode, _ = lessons.draw(BATCH, generator)
            mask = None
            if stored is held:
                # Among all pages a beginner finds none; among its module's and some others, a few.
                mask = held.episodes == episode[:, None]
                mask[:, torch.randint(held.chunks, (OTHERS,), generator=generator)] = True
                mask = mask[:, None]
            loss = cross_entropy(reader(contexts, stored, mask)[0], following)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        taken = time.perf_counter() - start
        losses, found = judge(reader, exam, stored)
        print(f"{name:16}{losses:>15.2f} nats {found:>11.0%}{taken:>9.0f}")


@torch.no_grad()
def judge(
    reader: Reader, places: Places, held: StoredMemory | ChunkedMemory
) -> tuple[float, float]:
    """Return the mean loss, and how often the chunk of the place itself was recalled."""
    generator, losses, found = torch.Generator().manual_seed(0), [], []
    for _ in range(16):
        contexts, following, _, chunk = places.draw(BATCH, generator)
        logits, query = reader(contexts, held, None)
        losses.append(cross_entropy(logits, following))
        _, recalled = reader.attend.recall(query, held)
        found.append((recalled.chunks[:, 0] == chunk[:, None]).any(1).float().mean())
    return float(torch.stack(losses).mean()), float(torch.stack(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("step", nargs="?", choices=["build", "train"])
    parser.add_argument("--place", type=Path, default=Path("runs/library"))
    parser.add_argument("--small", action="store_true", help="a part of the library")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1, help="of training")
    options = parser.parse_args()
    if options.step == "build":
        build(options.place, options.small)
    elif options.step == "train":
        train(options.place, options.small, options.updates, options.seed)
    else:
        for step in ("build", "train"):
            subprocess.run([sys.executable, __file__, step, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
