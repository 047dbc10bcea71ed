"""A run: its files, its config, and that one broken off anywhere goes on as if it had not been."""

import csv
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from htm_pytorch import ChunkedMemory
from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors
from htm_pytorch.rl import TrainConfig, evaluate, train
from htm_pytorch.rl.checkpoint import KIND, Checkpoint
from htm_pytorch.rl.task import make_env

pytestmark = pytest.mark.usefixtures("one_thread")

# The package's attribute of this name is the function.
train_module = importlib.import_module("htm_pytorch.rl.train")

TINY: dict[str, Any] = {
    "dim": 16,
    "heads": 2,
    "num_envs": 8,
    "minibatches": 2,
    "episodes": 64,
    "checkpoint_every": 2,
    "eval_episodes": 8,
}
BATCHES = 8


def tiny(run_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(run_dir=run_dir, **TINY | changes)


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the time they took."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) >= 0
    return rows


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run_dir / "checkpoint.safetensors", KIND)[0]


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Same metrics, and same weights, optimizer and generator to the last bit."""
    assert metrics(run_dir) == metrics(other)
    ours, theirs = weights(run_dir), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    records = [Checkpoint(path / "checkpoint.safetensors") for path in (run_dir, other)]
    for record in records:
        del record.progress["seconds"]
    assert records[0].progress == records[1].progress


def files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    train(tiny(run_dir))
    return run_dir


class Killed(BaseException):
    """Passes every `except` that a run may have."""


def break_off(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int, config: TrainConfig
) -> None:
    """Train until a function of the module is called once more than `after` times."""
    function, calls = getattr(module, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counted)
        with pytest.raises(Killed):
            train(config)


def test_a_run_leaves_its_files(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()} - {"recall.png"}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "checkpoint.safetensors",
        "config.json",
        "curve.png",
        "metrics.csv",
    }
    assert (unbroken / "curve.png").read_bytes().startswith(b"\x89PNG")
    text = (unbroken / "config.json").read_text()
    assert TrainConfig.from_json(text, run_dir=unbroken) == tiny(unbroken)

    rows = metrics(unbroken)
    assert [int(row["episodes"]) for row in rows] == [8 * n for n in range(1, BATCHES + 1)]
    frames = [int(row["frames"]) for row in rows]
    assert frames == sorted(set(frames))
    for row in rows:
        assert 0 <= float(row["success"]) <= 1
        assert all(np.isfinite(float(value)) for value in row.values())


def test_a_run_is_its_seeds(unbroken: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path / "same"))
    assert_same_run(tmp_path / "same", unbroken)
    train(tiny(tmp_path / "other", seed=1))
    assert metrics(tmp_path / "other") != metrics(unbroken)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("update", 0),
        ("update", 1),
        ("update", 3),
        ("play", 4),
        ("update", BATCHES - 1),
        ("save_checkpoint", 0),
        ("save_checkpoint", 2),
        ("plot_curve", 0),
    ],
    ids=lambda value: str(value),
)
def test_a_run_broken_off_goes_on_as_if_unbroken(
    name: str, after: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint, between two, and instead of one."""
    config = tiny(tmp_path / "run")
    break_off(monkeypatch, train_module, name, after, config)
    agent = train(dataclasses.replace(config, resume=True))
    assert_same_run(config.run_dir, unbroken)
    assert (config.run_dir / "curve.png").exists()
    stored = weights(config.run_dir)
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, stored[f"agent.{name}"])


def test_a_run_broken_off_while_a_checkpoint_is_written(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All written but not yet in its place: the checkpoint before it holds."""
    config = tiny(tmp_path / "run")
    # The first call is that of metrics.csv.
    break_off(monkeypatch, os, "replace", 2, config)
    assert Checkpoint(config.run_dir / "checkpoint.safetensors").progress["batch"] == 2
    assert len(metrics(config.run_dir)) == 4
    assert not list(config.run_dir.glob(".*"))
    train(dataclasses.replace(config, resume=True))
    assert_same_run(config.run_dir, unbroken)


def test_a_run_broken_off_again_and_again(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", resume=True)
    for batches in (1, 3, 0, 2, 1):
        break_off(monkeypatch, train_module, "update", batches, config)
    train(config)
    assert_same_run(config.run_dir, unbroken)


def test_a_killed_command_goes_on(unbroken: Path, tmp_path: Path) -> None:
    """`htm train` and SIGKILL, which no process can answer."""
    run_dir = tmp_path / "run"
    # More episodes, so that it is not done before it is killed: a run may end elsewhere.
    options = {"run_dir": run_dir, **TINY, "episodes": 8_000}
    process = subprocess.Popen(
        [sys.executable, "-c", "from htm_pytorch.cli import main; main()", "train"]
        + [f"--{name.replace('_', '-')}={value}" for name, value in options.items()],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        path = run_dir / "metrics.csv"
        deadline = time.monotonic() + 120
        while not (path.exists() and len(path.read_text().splitlines()) > 4):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stopped = Checkpoint(run_dir / "checkpoint.safetensors").progress["batch"]
    batches = max(BATCHES, stopped + 1)
    train(tiny(run_dir, resume=True, episodes=8 * batches))
    if batches == BATCHES:
        assert_same_run(run_dir, unbroken)
    assert metrics(run_dir)[:BATCHES] == metrics(unbroken)


def test_a_finished_run_can_be_made_longer(unbroken: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", episodes=24)
    train(config)
    train(dataclasses.replace(config, resume=True, **TINY))
    assert_same_run(config.run_dir, unbroken)
    before = files(config.run_dir)
    train(dataclasses.replace(config, resume=True, **TINY))
    after = files(config.run_dir)
    for name in ("checkpoint.safetensors", "metrics.csv", "config.json"):
        assert before[name] == after[name]


def test_tensorboard_shows_each_batch_once(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(tmp_path / "run")
    break_off(monkeypatch, train_module, "update", 3, config)
    train(dataclasses.replace(config, resume=True))
    curves = []
    for run_dir in (unbroken, config.run_dir):
        events = accumulator.EventAccumulator(str(run_dir)).Reload()
        curves.append([(event.step, event.value) for event in events.Scalars("policy_loss")])
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [int(row["episodes"]) for row in metrics(unbroken)]


def test_a_run_is_not_overwritten(unbroken: Path) -> None:
    before = files(unbroken)
    with pytest.raises(ValueError, match=r"run_dir: .* already holds a run; pass --resume"):
        train(tiny(unbroken))
    assert files(unbroken) == before


def test_a_checkpoint_alone_is_a_run_too(unbroken: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes((unbroken / checkpoint.name).read_bytes())
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(tmp_path))


def test_a_run_of_another_config_does_not_go_on(unbroken: Path) -> None:
    before = files(unbroken)
    with pytest.raises(ValueError, match=r"another config, different in \['seed', 'discount'\]"):
        train(tiny(unbroken, resume=True, seed=1, discount=0.5, episodes=128))
    assert files(unbroken) == before


def cut(path: Path, source: Path, length: int) -> None:
    path.write_bytes(source.read_bytes()[:length])


def memory(path: Path, source: Path) -> None:
    ChunkedMemory.empty(1, 2, 3, 4).save(path)


def foreign(path: Path, source: Path) -> None:
    path.write_text("episodes,frames\n" * 100)


def recordless(path: Path, source: Path) -> None:
    save_tensors(path, KIND, {"agent.x": torch.zeros(1)})


BROKEN = {
    "empty": (lambda path, source: cut(path, source, 0), "truncated"),
    "cut in its header": (lambda path, source: cut(path, source, 300), "truncated"),
    "cut in its tensors": (lambda path, source: cut(path, source, -1), "truncated"),
    "foreign": (foreign, "not a safetensors file"),
    "a memory": (memory, "expected .* to hold a htm-agent of format 1, got kind 'ChunkedMemory'"),
    "without its record": (recordless, "lacks its record"),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_kept(
    make: Any, message: str, unbroken: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((unbroken / "config.json").read_bytes())
    path = tmp_path / "checkpoint.safetensors"
    make(path, unbroken / path.name)
    before = files(tmp_path)
    for call in (lambda: train(tiny(tmp_path, resume=True)), lambda: evaluate(tmp_path)):
        with pytest.raises(MemoryFileError, match=f"path: .*{message}"):
            call()
    assert files(tmp_path) == before


def test_weights_of_another_model_are_refused(unbroken: Path) -> None:
    checkpoint = Checkpoint(unbroken / "checkpoint.safetensors")
    with pytest.raises(MemoryFileError, match="holds another model"):
        checkpoint.restore_agent(torch.nn.Linear(2, 2))


WRONG = [
    ("num_dancers", 0),
    ("num_dancers", 9),
    ("dance_delay", 0),
    ("observation", "sounds"),
    ("dim", 0),
    ("depth", -1),
    ("heads", 3),
    ("topk_mems", 0),
    ("mem_chunk_size", 0),
    ("mem_chunks", 0),
    ("window", 0),
    ("num_envs", 0),
    ("minibatches", 3),
    ("action_repeat", 0),
    ("decisions", 0),
    ("discount", 1.5),
    ("trace", -0.1),
    ("stop_at", float("nan")),
    ("learning_rate", 0.0),
    ("clip", -0.2),
    ("max_grad_norm", float("nan")),
    ("episodes", 0),
    ("epochs", 0),
    ("checkpoint_every", 0),
    ("eval_episodes", 0),
    ("seed", -1),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value))
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        TrainConfig(**{name: value})


def test_a_show_without_time_to_choose_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dance_delay: .* time-out at step 1024, got .* 2060"):
        train(tiny(tmp_path / "run", num_dancers=4, dance_delay=500))
    assert not (tmp_path / "run").exists()


def test_config_survives_its_record(tmp_path: Path) -> None:
    config = tiny(tmp_path, seed=3, detach_memories=True)
    assert TrainConfig.from_json(config.to_json(), run_dir=tmp_path) == config
    record = json.loads(config.to_json())
    assert config.differs_in(TrainConfig.from_json(config.to_json())) == []
    assert config.differs_in(dataclasses.replace(config, resume=True, episodes=1)) == []
    assert config.differs_in(dataclasses.replace(config, seed=4)) == ["seed"]
    for other in ({**record, "colour": 1}, {k: v for k, v in record.items() if k != "dim"}, []):
        with pytest.raises(ValueError, match="expected the fields of this version"):
            TrainConfig.from_json(json.dumps(other))


def test_one_episode_at_a_time_can_be_learned_from(tmp_path: Path) -> None:
    """A batch with one advantage, or none, has no spread to divide by."""
    changes = {"num_envs": 1, "minibatches": 1, "episodes": 6, "decisions": 1}
    agent = train(tiny(tmp_path / "run", **changes))
    assert all(weight.isfinite().all() for weight in agent.parameters())


def test_learning_stops_when_it_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "RECENT", 16)
    train(tiny(tmp_path / "run", stop_at=0.0))
    assert len(metrics(tmp_path / "run")) == 2
    assert Checkpoint(tmp_path / "run" / "checkpoint.safetensors").progress["batch"] == 2


def test_evaluation_is_the_same_each_time(unbroken: Path) -> None:
    result = evaluate(unbroken)
    assert result == evaluate(unbroken)
    assert result.episodes == TINY["eval_episodes"]
    assert result.chance == 0.5
    assert 0 <= result.success <= 1
    assert result.picture == unbroken / "recall.png"
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def test_evaluation_plays_unseen_levels(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the training's own first levels, and others for another seed."""
    module = importlib.import_module("htm_pytorch.rl.evaluate")
    played: list[set[Any]] = []

    def spy(config: TrainConfig, num_envs: int) -> Any:
        env = make_env(config, num_envs)
        reset = env.reset

        def reset_and_note(**kwargs: Any) -> Any:
            result = reset(**kwargs)
            if not kwargs:
                played[-1].update(env.unwrapped.levels())
            return result

        env.reset = reset_and_note
        return env

    monkeypatch.setattr(module, "make_env", spy)
    monkeypatch.setattr(train_module, "make_env", spy)
    for run in (
        lambda: train(tiny(tmp_path / "run", episodes=16)),
        lambda: evaluate(unbroken),
        lambda: evaluate(unbroken, seed=7),
        lambda: evaluate(unbroken, episodes=3, seed=7),
    ):
        played.append(set())
        run()
    trained, unseen, other, few = played
    assert len(trained) >= 16 and len(unseen) >= 8 and len(other) >= 8
    assert not trained & unseen and not trained & other and not unseen & other
    assert len(few) < len(other)
