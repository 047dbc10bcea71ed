"""A run: its files, its config, and that one broken off anywhere goes on as if it had not been."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from htm_pytorch import ChunkedMemory
from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors
from htm_pytorch.rl import (
    Parts,
    TrainConfig,
    evaluate,
    evaluation,
    learner,
    run,
    train,
    training,
    unseen,
)
from htm_pytorch.rl.checkpoint import KIND, Checkpoint
from htm_pytorch.rl.observations import make_encoder
from htm_pytorch.rl.processes import World
from htm_pytorch.rl.record import from_json, to_json
from htm_pytorch.rl.run import Run
from tests.rl import worlds

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = 6
TINY: dict[str, Any] = {
    "dim": 16,
    "heads": 2,
    "mem_chunk_size": 4,
    "mem_chunks": 3,
    "window": 4,
    "num_envs": 4,
    "minibatches": 2,
    "checkpoint_every": 2,
    "eval_episodes": 8,
}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "steps": {
        "env": "tests.rl.worlds:Test/Walk-v0",
        "steps": 16,
        "frames": 4 * 16 * BATCHES,
        "normalize_observations": True,
        "normalize_rewards": True,
        "final_learning_rate": 0.5,
    },
    "episodes": {
        "env": "htm_pytorch.envs:htm_pytorch/Ballet-v0",
        "env_args": ("dance_delay=2", "observation=symbols"),
        "rollout": "episodes",
        "action_repeat": 3,
        "decisions": 1,
        "epochs": 1,
        "frames": 4 * 38 * BATCHES,
    },
}


def tiny(run_dir: Path, kind: str = "steps", **changes: Any) -> TrainConfig:
    return TrainConfig(run_dir=run_dir).replace(**TINY | ROLLOUTS[kind] | changes)


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the time they took."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) >= 0
    return rows


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = load_tensors(run_dir / "checkpoint.safetensors", KIND)[0]
    del found["metrics"]
    return found


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Same metrics, and same weights, optimizer and statistics to the last bit."""
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


@pytest.fixture(scope="module", params=ROLLOUTS)
def unbroken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[str, Path]:
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    train(tiny(run_dir, request.param))
    return request.param, run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
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


def test_a_run_leaves_its_files(unbroken: tuple[str, Path]) -> None:
    kind, run_dir = unbroken
    assert {path.name for path in run_dir.iterdir()} - {".lock"} == {
        "checkpoint.safetensors",
        "config.json",
        "versions.json",
        "curve.png",
        "metrics.csv",
    }
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    text = (run_dir / "config.json").read_text()
    assert from_json(text, run_dir=run_dir) == tiny(run_dir, kind)
    rows = metrics(run_dir)
    assert [int(row["batch"]) for row in rows] == list(range(1, BATCHES + 1))
    frames = [int(row["frames"]) for row in rows]
    assert frames == sorted(set(frames))
    for row in rows[1:]:
        assert row.pop("unseen_return") == ""
        assert all(np.isfinite(float(value)) for value in row.values())


def test_a_run_is_its_seeds(unbroken: tuple[str, Path], tmp_path: Path) -> None:
    kind, run_dir = unbroken
    train(tiny(tmp_path / "same", kind))
    assert_same_run(tmp_path / "same", run_dir)
    train(tiny(tmp_path / "other", kind, seed=1))
    assert metrics(tmp_path / "other") != metrics(run_dir)


PLACES = [
    (learner.Learner, "learn", 0),
    (learner.Learner, "learn", 1),
    (learner.Learner, "_update", 7),
    (training, "play", 4),
    (learner.Learner, "learn", BATCHES - 1),
    (Run, "save", 0),
    (Run, "save", 2),
    (Run, "add", 3),
    (os, "replace", 2),
    (training, "plot_curve", 0),
]


@pytest.mark.parametrize(("module", "name", "after"), PLACES, ids=lambda value: str(value))
def test_a_run_broken_off_goes_on_as_if_unbroken(
    module: Any,
    name: str,
    after: int,
    unbroken: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first checkpoint, between two, and instead of one."""
    kind, whole = unbroken
    config = tiny(tmp_path / "run", kind)
    break_off(monkeypatch, module, name, after, config)
    agent = train(config.replace(resume=True))
    assert_same_run(config.run_dir, whole)
    assert (config.run_dir / "curve.png").exists()
    stored = weights(config.run_dir)
    for key, tensor in agent.state_dict().items():
        assert torch.equal(tensor, stored[f"agent.{key}"])


def test_a_run_broken_off_again_and_again(
    unbroken: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, whole = unbroken
    config = tiny(tmp_path / "run", kind, resume=True)
    for batches in (1, 2, 0, 1):
        break_off(monkeypatch, learner.Learner, "learn", batches, config)
    train(config)
    assert_same_run(config.run_dir, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_command_that_is_killed_20_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL, which no process can answer, at moments that nobody chose."""
    draw = random.Random(0)
    frames = 4 * 16 * 150
    train(tiny(tmp_path / "whole", frames=frames))
    run_dir = tmp_path / "run"
    options = {**TINY, **ROLLOUTS["steps"], "run_dir": run_dir, "frames": frames}
    env = options.pop("env")
    given = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        given += [flag] if value is True else [f"{flag}={value}"]
    path = run_dir / "metrics.csv"
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-m", "htm_pytorch", "train", env, "--resume", *given],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # Some while they begin, or between two checkpoints, so that they have done nothing.
            wanted = _rows(path) + draw.randrange(6)
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and _rows(path) < wanted:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            assert process.poll() is None, "it was killed while it ran"
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert 0 < _rows(path) < 150
    train(tiny(run_dir, frames=frames, resume=True))
    assert_same_run(run_dir, tmp_path / "whole")


def _rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_finished_run_can_be_made_longer(unbroken: tuple[str, Path], tmp_path: Path) -> None:
    """From an end where a checkpoint would have been anyway."""
    kind, whole = unbroken
    config = tiny(tmp_path / "run", kind, final_learning_rate=1.0)
    train(config)
    shorter = config.replace(run_dir=tmp_path / "longer", frames=config.budget.frames * 2 // 3)
    train(shorter)
    longer = config.replace(run_dir=shorter.run_dir, resume=True)
    train(longer)
    assert_same_run(longer.run_dir, config.run_dir)
    before = files(longer.run_dir)
    train(longer)
    after = files(longer.run_dir)
    for name in ("checkpoint.safetensors", "metrics.csv", "config.json"):
        assert before[name] == after[name]


def test_metrics_are_those_of_the_checkpoint(
    unbroken: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that a loss of power took, or half of one, come from the checkpoint."""
    kind, whole = unbroken
    config = tiny(tmp_path / "run", kind)
    for damage in (lambda b: b[:-40], lambda b: b""):
        break_off(monkeypatch, learner.Learner, "learn", 2, config)
        path = config.run_dir / "metrics.csv"
        path.write_bytes(damage(path.read_bytes()))
        config = config.replace(resume=True)
    train(config)
    with (config.run_dir / "metrics.csv").open("a") as file:
        file.write("7,1234")
    train(config)
    assert_same_run(config.run_dir, whole)


def test_a_rollout_teaches_until_the_policy_is_another(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", target_kl=1e-9, epochs=3)
    with training.Training(config, None, World()) as trained:
        calls, update = 0, trained.learner._update

        def counted(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            return update(*given)

        trained.learner._update = counted
        trained.batch()
        # The first update is by the policy that played; the second one sees that it has moved.
        assert calls == 2


def test_two_trainings_in_one_folder_are_refused(finished: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    with Run(config), pytest.raises(ValueError, match="run_dir: another training writes to"):
        train(config.replace(resume=True))
    train(config.replace(resume=True))
    assert_same_run(config.run_dir, finished)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run")
    losses, calls = learner.Learner._losses, 0

    def overflows(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        policy, retold, moved = losses(*given)
        if calls > 15:
            policy = policy._replace(value=policy.value * torch.inf)
        return policy, retold, moved

    with monkeypatch.context() as patch:
        patch.setattr(learner.Learner, "_losses", overflows)
        with pytest.raises(learner.NotFiniteError, match=r"learning_rate: .* inf.* the last"):
            train(config)
        with pytest.raises(learner.NotFiniteError, match="there is no checkpoint yet"):
            train(tiny(tmp_path / "other"))
    assert all(part.isfinite().all() for part in weights(config.run_dir).values())
    train(config.replace(resume=True))
    assert_same_run(config.run_dir, finished)


def test_tensorboard_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny(tmp_path / "run", tensorboard=True)
    break_off(monkeypatch, learner.Learner, "learn", 3, config)
    train(config.replace(resume=True))
    events = accumulator.EventAccumulator(str(config.run_dir)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("policy_loss")]
    rows = metrics(config.run_dir)
    assert [step for step, _ in curve] == [int(row["frames"]) for row in rows]
    expected = [float(row["policy_loss"]) for row in rows]
    np.testing.assert_allclose([value for _, value in curve], expected, rtol=1e-6)


def test_a_run_is_not_overwritten(finished: Path) -> None:
    before = files(finished)
    with pytest.raises(ValueError, match=r"run_dir: .* already holds a run; pass --resume"):
        train(tiny(finished))
    assert files(finished) == before


def test_a_checkpoint_alone_is_a_run_too(finished: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes((finished / checkpoint.name).read_bytes())
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(tmp_path))


def test_a_folder_without_a_row_holds_no_run(finished: Path, tmp_path: Path) -> None:
    """What stopped before its first row is begun again."""
    config = tiny(tmp_path / "run")
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(to_json(config))
    (config.run_dir / "metrics.csv").write_text("")
    train(config)
    assert_same_run(config.run_dir, finished)
    (config.run_dir / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        train(config)


def test_packages_are_missed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run")
    for name in ("tqdm", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ModuleNotFoundError, match=name):
                train(config)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard: expected the package .* not installed"):
        train(config.replace(tensorboard=True))
    assert not config.run_dir.exists()


def test_a_run_of_another_config_does_not_go_on(finished: Path) -> None:
    before = files(finished)
    told = r"another config, seed is 0 there, got 1, discount is 0\.99 there, got 0\.5; pass"
    with pytest.raises(ValueError, match=told):
        train(tiny(finished, resume=True, seed=1, discount=0.5, stop_at=7.0))
    assert files(finished) == before


def test_a_run_without_a_checkpoint_goes_on_with_its_own_config_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run")
    break_off(monkeypatch, learner.Learner, "learn", 1, config)
    before = files(config.run_dir)
    assert "checkpoint.safetensors" not in before
    with pytest.raises(ValueError, match="seed is 0 there, got 1; pass the options"):
        train(config.replace(resume=True, seed=1))
    assert files(config.run_dir) == before
    train(config.replace(resume=True))
    assert_same_run(config.run_dir, finished)


@pytest.mark.parametrize("resume", [False, True])
def test_a_config_of_something_else_is_not_overwritten(tmp_path: Path, resume: bool) -> None:
    for text in ('{"model_type": "llama"}', "{", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"run_dir: .* no record of a run of this version"):
            train(tiny(tmp_path, resume=resume))
        assert files(tmp_path) == {"config.json": text.encode()}


def without(path: Path, source: Path, *prefixes: str, **changes: str) -> None:
    tensors, record = load_tensors(source, KIND)
    kept = {name: part for name, part in tensors.items() if not name.startswith(prefixes)}
    save_tensors(path, KIND, kept, **record | changes)


def flipped(path: Path, source: Path) -> None:
    stored = bytearray(source.read_bytes())
    stored[len(stored) - 20_001] ^= 64
    path.write_bytes(stored)


def foreign(path: Path, source: Path) -> None:
    path.write_text("episodes,frames\n" * 100)


def recordless(path: Path, source: Path) -> None:
    save_tensors(path, KIND, {"agent.x": torch.zeros(1)})


def cut(path: Path, source: Path, length: int) -> None:
    path.write_bytes(source.read_bytes()[:length])


BROKEN = {
    "empty": (lambda path, source: cut(path, source, 0), "truncated"),
    "cut in its header": (lambda path, source: cut(path, source, 300), "truncated"),
    "cut in its tensors": (lambda path, source: cut(path, source, -1), "truncated"),
    "foreign": (foreign, "not a safetensors file"),
    "a memory": (
        lambda path, source: ChunkedMemory.empty(1, 2, 3, 4).save(path),
        "expected .* to hold a htm-agent of format 1, got kind 'ChunkedMemory'",
    ),
    "without its record": (recordless, "lacks its record"),
    "a flipped bit": (flipped, "is not what its checksum is of"),
    "no optimizer": (
        lambda path, source: without(path, source, "optimizer"),
        r"differs in \['optimizer",
    ),
    "no weights": (lambda path, source: without(path, source, "agent.core"), "differs in"),
    "another record": (
        lambda path, source: without(path, source, "none", progress="{}"),
        "is not what its checksum is of",
    ),
}


@pytest.mark.parametrize(("make", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_kept(
    make: Any, message: str, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    path = tmp_path / "checkpoint.safetensors"
    make(path, finished / path.name)
    before = files(tmp_path)
    for call in (lambda: train(tiny(tmp_path, resume=True)), lambda: evaluate(tmp_path)):
        with pytest.raises(MemoryFileError, match=f"path: .*{message}"):
            call()
    assert files(tmp_path) == before


def test_weights_of_another_model_are_refused(finished: Path) -> None:
    checkpoint = Checkpoint(finished / "checkpoint.safetensors")
    with pytest.raises(MemoryFileError, match="holds another model"):
        checkpoint.restore_agent(torch.nn.Linear(2, 2))


def test_an_agent_begins_as_that_of_another_run(finished: Path, tmp_path: Path) -> None:
    """Its weights are those; what does not fit in shape stays fresh."""
    from htm_pytorch.rl.preparing import prepare

    stored = weights(finished)
    agent = prepare(tiny(tmp_path / "run", init_from=finished))
    for name, part in agent.state_dict().items():
        assert torch.equal(part, stored[f"agent.{name}"]), name
    other = prepare(tiny(tmp_path / "run", init_from=finished, env="CartPole-v1"))
    assert torch.equal(other.core.norm.weight, stored["agent.core.norm.weight"])  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with pytest.raises(ValueError, match="init_from: expected the folder of a run that has a che"):
        prepare(tiny(tmp_path / "run", init_from=tmp_path))
    with pytest.raises(ValueError, match=r"init_from: expected .* only \d+ fit"):
        prepare(tiny(tmp_path / "run", init_from=finished, dim=18))


def test_statistics_of_another_run_are_taken_whole_or_not_at_all(
    finished: Path, tmp_path: Path
) -> None:
    from htm_pytorch.rl.preparing import describe_source, prepare

    config = tiny(tmp_path / "run", init_from=finished, env="CartPole-v1")
    agent = prepare(config)
    assert agent.normalizer is not None
    moments = agent.normalizer.state_dict()
    assert len(moments) == 3 and not any(part.any() for part in moments.values())
    assert agent.returns.moments.count > 0
    told = re.fullmatch(
        rf"of ([\d,]+) parameters of the agent ([\d,]+) are those of {finished}",
        describe_source(config, agent),
    )
    assert told is not None
    count, taken = (int(number.replace(",", "")) for number in told.groups())
    assert 0 < taken < count == sum(part.numel() for part in agent.parameters())


def test_a_run_goes_on_without_the_one_it_began_as(finished: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", init_from=finished)
    train(config)
    gone = config.replace(init_from=tmp_path / "gone", resume=True)
    train(gone)
    train(gone.replace(init_from=None))
    assert_same_run(config.run_dir, tmp_path / "run")


class DropOut(torch.nn.Module):
    """An encoder that notes in which mode it is asked."""

    asked: ClassVar[list[bool]] = []

    def __init__(self, space: Any, dim: int):
        super().__init__()
        self.encoder = make_encoder(space, dim)

    def forward(self, observation: Any) -> torch.Tensor:
        self.asked.append(self.training)
        return self.encoder(observation)


def test_an_agent_is_judged_in_its_mode_of_evaluation(tmp_path: Path) -> None:
    parts = Parts(encoder=DropOut)
    DropOut.asked.clear()
    config = tiny(tmp_path / "run", eval_every=1, frames=2 * 64)
    assert not train(config, parts).training
    asked = DropOut.asked
    assert asked[0] and not asked[-1]
    assert sum(mode != before for before, mode in pairwise(asked)) == 3
    asked.clear()
    evaluate(tmp_path / "run", 2, parts=parts)
    assert asked and not any(asked)


def test_learning_stops_when_it_is_good_enough(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", stop_at=-100.0, average_over=8))
    assert 1 <= len(metrics(tmp_path / "run")) < BATCHES


def test_a_curriculum_promotes_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {
        "curriculum": ('{"bonus": 1}', '{"bonus": -10}'),
        "promote_at": (2.0,),
        "average_over": 8,
    }
    train(tiny(tmp_path / "run", **changes))
    stages = [row["stage"] for row in metrics(tmp_path / "run")]
    assert stages == sorted(stages) and set(stages) == {"0", "1"}
    assert float(metrics(tmp_path / "run")[-1]["return"]) < 0
    config = tiny(tmp_path / "broken", **changes)
    break_off(monkeypatch, learner.Learner, "learn", 5, config)
    train(config.replace(resume=True))
    assert_same_run(config.run_dir, tmp_path / "run")


@pytest.mark.parametrize("kind", ROLLOUTS)
def test_a_run_that_rehearses_is_resumed_exactly(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {
        "steps": ('{"bonus": 1}', '{"bonus": -10}'),
        "episodes": ('{"num_dancers": 1}', '{"num_dancers": 2}'),
    }
    changes: dict[str, Any] = {
        "curriculum": stages[kind],
        "promote_at": (-100.0,),
        "average_over": 4,
        "rehearse": 0.5,
        "frames": 2 * ROLLOUTS[kind]["frames"],
        "start": "refreshed" if kind == "steps" else "stored",
    }
    train(tiny(tmp_path / "run", kind, **changes))
    rows = metrics(tmp_path / "run")
    played = [row["stage"] for row in rows]
    assert played[0] == "0" and "0" in played[played.index("1") :], "an earlier one comes again"
    if kind == "steps":
        means = {
            stage: {float(r["return"]) < 0 for r in rows if r["stage"] == stage} for stage in "01"
        }
        assert means == {"0": {False}, "1": {True}}, "the mean is of the stage that was played"
    config = tiny(tmp_path / "broken", kind, **changes)
    break_off(monkeypatch, learner.Learner, "learn", 5, config)
    train(config.replace(resume=True))
    assert_same_run(config.run_dir, tmp_path / "run")


def test_agents_are_judged_while_they_learn(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", eval_every=3))
    judged = [row["unseen_return"] for row in metrics(tmp_path / "run")]
    assert [value != "" for value in judged] == [n % 3 == 0 for n in range(1, BATCHES + 1)]


WAYS = {
    "vtrace": {"algorithm": "vtrace"},
    "pieces": {"bptt": 5},
    "refreshed": {"start": "refreshed"},
    "zeros": {"start": "zeros"},
    "previous": {"see_previous": True},
    "clock": {"see_time": True},
    "stacked": {"frame_stack": 2, "time_limit": 20},
    "clipped": {"value_clip": 0.2, "normalize_advantages": False, "reconstruction_weight": 0.0},
}


@pytest.mark.parametrize("memory", ["htm", "lstm"])
@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_every_way_to_learn_changes_all_weights(
    changes: dict[str, Any], memory: Any, tmp_path: Path
) -> None:
    config = tiny(tmp_path / "run", memory=memory, frames=2 * 64, **changes)
    torch.manual_seed(0)
    agent = train(config)
    from htm_pytorch.rl.preparing import prepare

    fresh = prepare(config.replace(run_dir=tmp_path / "other"))
    # Nothing closed a chunk of so short episodes, and biases of keys never matter.
    for (name, after), before in zip(agent.named_parameters(), fresh.parameters(), strict=True):
        if "core.layers" not in name:
            assert not torch.equal(after, before), name


def test_evaluation_is_the_same_each_time(finished: Path) -> None:
    result = evaluate(finished)
    assert result == evaluate(finished)
    assert result.episodes == TINY["eval_episodes"]
    assert result.length > 3 and result.interval > 0 and result.greedy
    assert evaluate(finished, 50, greedy=False) != evaluate(finished, 50)
    assert evaluate(finished, seed=7) != result
    assert evaluate(finished, 3).episodes == 3
    lines = (finished / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"seed": 0} | evaluate(finished, 3)._asdict()
    assert "torch" in json.loads((finished / "versions.json").read_text())


def test_one_number_is_seen_and_endless_episodes_are_not_judged(tmp_path: Path) -> None:
    endless = tiny(tmp_path / "run", env="tests.rl.worlds:Test/Scalar-v0")
    agent = train(endless)
    assert agent.normalizer is not None
    assert agent.normalizer.state_dict()["moments.0.count"] > 0
    with pytest.raises(ValueError, match=r"env: expected episodes that end, .* --time-limit"):
        evaluate(endless.run_dir, patience=200)
    train(endless.replace(run_dir=tmp_path / "cut", time_limit=300))
    assert evaluate(tmp_path / "cut").length == 300


def test_an_evaluation_has_as_many_environments_as_a_training(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    make = unseen.make_environments

    def noted(config: TrainConfig, rows: int, *more: Any) -> Any:
        asked.append(rows)
        return make(config, rows, *more)

    monkeypatch.setattr(unseen, "make_environments", noted)
    assert evaluate(finished, 11).episodes == 11
    assert max(asked) == TINY["num_envs"]


def test_an_episode_can_be_watched(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(finished, 2, render=tmp_path / "film.gif")
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF")
    monkeypatch.setattr(evaluation, "judge", None)
    with pytest.raises(ValueError, match=r"render: expected a file .gif or .mp4"):
        evaluate(finished, 2, render=tmp_path / "film.txt")
    with pytest.raises(ValueError, match=r"render: expected a file in a folder that exists"):
        evaluate(finished, 2, render=tmp_path / "nowhere" / "film.gif")


def test_a_film_of_what_does_not_draw_itself_is_refused_before_it_is_judged(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no display")

    monkeypatch.setattr(worlds.Walk, "render", fails)
    monkeypatch.setattr(evaluation, "judge", None)
    with pytest.raises(
        ValueError, match=r"render: .* itself, got .*Walk-v0 \(RuntimeError: no dis"
    ):
        evaluate(finished, 2, render=tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


def test_the_record_is_json(finished: Path) -> None:
    record = json.loads((finished / "config.json").read_text())
    assert record["env"].endswith("Walk-v0") and "run_dir" not in record
    assert run.CONFIG == "config.json"
