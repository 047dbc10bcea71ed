"""Small agents learn to remember. Slow: minutes on one core."""

import csv
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from htm_pytorch import HTMTransformer
from htm_pytorch.rl import TrainConfig, evaluate, train
from htm_pytorch.tasks import find

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def test_agent_learns_who_danced_what(tmp_path: Path) -> None:
    """The demo, two dancers: without memory, half of the touches are right."""
    task = find("ballet")
    assert task.parts is not None
    config = task.config.replace(run_dir=tmp_path / "run", frames=5_300_000, stop_at=0.75)
    train(config, task.parts())
    with (config.run_dir / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["return"]) >= 0.75
    # On episodes it never saw, 0.65 is seven standard deviations of luck above a half.
    assert evaluate(config.run_dir, 500, parts=task.parts()).mean >= 0.65


def test_agent_balances_what_it_sees_half_of(tmp_path: Path) -> None:
    config = find("cartpole-positions").config.replace(run_dir=tmp_path / "run")
    train(config)
    assert evaluate(config.run_dir, 50).mean >= 400


@pytest.mark.parametrize("memory", ["htm", "lstm"])
def test_agent_says_what_it_saw_before(memory: str, tmp_path: Path) -> None:
    """Dict observations and Box actions; without memory, 0.5 is the best."""
    config = TrainConfig(env="tests.rl.worlds:Test/Recall-v0", run_dir=tmp_path / "run").replace(
        memory=memory, frames=150_000, steps=32, mem_chunk_size=2, window=2, stop_at=0.85
    )
    train(config)
    assert evaluate(config.run_dir, 50).mean >= 0.75


KEYS, VALUES, ASKED, CHUNK = 16, 8, 8, 8
"""Of the keys, the first half are asked for."""


def told(rows: int, length: int, which: Literal["newest", "only"]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with values, one a step, then a question for each asked key; and the answers.

    Of a key that came often its newest value counts; the last two chunks hold no asked key.
    """
    body = length - 2 * CHUNK
    values = torch.randint(VALUES, (rows, length))
    keys = torch.randint(ASKED, KEYS, (rows, length))
    if which == "newest":
        keys[:, :body] = torch.randint(KEYS, (rows, body))
    else:
        at = torch.rand(rows, body).argsort(1)[:, :ASKED]
        keys.scatter_(1, at, torch.arange(ASKED).expand(rows, -1))
    asked = torch.rand(rows, ASKED).argsort(1)
    is_hit = keys[:, None] == asked[..., None]
    newest = torch.where(is_hit, torch.arange(length), -1).amax(2)
    x = torch.zeros(rows, length + ASKED, KEYS + VALUES + 1)
    x[:, :length].scatter_(2, keys[..., None], 1.0)
    x[:, :length].scatter_(2, KEYS + values[..., None], 1.0)
    x[:, length:].scatter_(2, asked[..., None], 1.0)
    x[:, length:, -1] = 1
    return x, values.gather(1, newest.clamp(min=0)), newest >= 0


@pytest.mark.parametrize(("which", "goal"), [("newest", 0.95), ("only", 0.99)])
def test_a_layer_finds_the_newest_of_many(which: Literal["newest", "only"], goal: float) -> None:
    """One layer that recalls 2 of 25 chunks; without recency the newest is found by chance."""
    torch.manual_seed(0)
    enter, leave = nn.Linear(KEYS + VALUES + 1, 64), nn.Linear(64, VALUES)
    sizes = {"topk_mems": 2, "mem_chunk_size": CHUNK, "mem_chunks": 32, "window": 8}
    memory = HTMTransformer(64, 1, 4, 16, **sizes)
    parameters = [*enter.parameters(), *memory.parameters(), *leave.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)

    def answers(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1] - ASKED, x.shape[1]).expand(len(x), -1)
        return leave(memory(enter(x), at=at)[0])

    for update in range(1_500):
        length = 40 if update < 600 else 104 if update < 1_000 else 200
        x, values, is_known = told(64, length, which)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, update / 30) * (1 - update / 1_600)
        loss = nn.functional.cross_entropy(answers(x)[is_known], values[is_known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, values, is_known = told(512, 200, which)
        right = answers(x).argmax(2) == values
    assert right[is_known].float().mean() >= goal
