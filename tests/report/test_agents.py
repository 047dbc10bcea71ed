"""An agent is traced on the path that it runs on: the same actions and values, to the last bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from htm_pytorch.envs import ballet_tables as tables
from htm_pytorch.report import Scene, measure, trace_agent
from htm_pytorch.report.scene import Plot
from htm_pytorch.rl import Agent, TrainConfig, make_agent
from htm_pytorch.rl.evaluation import judge
from htm_pytorch.rl.making import make_environments
from htm_pytorch.rl.rollout import Rollout, play
from htm_pytorch.rl.unseen import begin
from htm_pytorch.tasks import find
from htm_pytorch.tasks.ballet_scene import SCENE

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"dim": 12, "heads": 2, "depth": 2, "mem_chunk_size": 4, "window": 4}
SYMBOLS = ("num_dancers=3", "dance_delay=2", "observation=symbols")


def make(env: str, parts: Any = None, **changes: Any) -> tuple[Agent, TrainConfig]:
    config = TrainConfig(env=env).replace(**SMALL | changes)
    environments = make_environments(config, 1)
    spaces = environments.observation_space, environments.action_space
    return make_agent(config, *spaces, parts).eval(), config


def make_ballet(**changes: Any) -> tuple[Agent, TrainConfig]:
    task = find("ballet")
    assert task.parts is not None
    options = {"mem_chunks": 40, "env_args": SYMBOLS, "action_repeat": 3} | changes
    return make("htm_pytorch.envs:htm_pytorch/Ballet-v0", task.parts(), **options)


def make_walk(**changes: Any) -> tuple[Agent, TrainConfig]:
    options = {"env_args": ("discrete=true",), "mem_chunk_size": 2, "window": 2} | changes
    return make("tests.rl.worlds:Test/Walk-v0", **options)


def watched(agent: Agent, config: TrainConfig) -> tuple[Rollout, float]:
    """One unseen episode as a rollout of a training has it, and its return."""
    player = begin(agent, config, 1, 0)
    options = replace(config.rollouts, rollout="episodes", steps=2**40, decisions=0)
    played = play(player, options, None)
    return played.rollout, played.episodes[0].total


@pytest.mark.parametrize("made", [make_ballet, make_walk], ids=["ballet", "walk"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_traced_episode_is_the_one_that_is_played(made: Any, seed: int) -> None:
    agent, config = made(seed=seed)
    rollout, total = watched(agent, config)
    trace = trace_agent(agent, config)
    counts = rollout.counts[0].nonzero()[:, 0]
    assert len(counts) > 0
    assert [m.step for m in trace.moments] == rollout.at[0, counts].tolist()
    assert [m.action for m in trace.moments] == [
        str(a) for a in rollout.actions[0, counts, 0].tolist()
    ]
    assert [m.value for m in trace.moments] == rollout.values[0, counts].tolist()
    rewards = [step.reward for step in trace.steps]
    assert sum(r for r in rewards if r is not None) == pytest.approx(total)
    assert len(trace.steps) == len(rollout.seen.is_first[0])


def test_sampled_actions_are_those_of_a_judged_episode() -> None:
    agent, config = make_walk(seed=3)
    judged = judge(agent, config, 1, greedy=False)
    trace = trace_agent(agent, config, greedy=False)
    assert len(trace.moments) == judged.length
    assert sum(step.reward or 0 for step in trace.steps) == pytest.approx(judged.mean)


def test_what_ballet_shows() -> None:
    agent, config = make_ballet()
    trace = trace_agent(agent, config, scene=SCENE)
    player = begin(agent, config, 1, 0)
    assert SCENE.plots is not None
    plots = SCENE.plots(player.environments)
    (level,) = player.environments.vector.unwrapped.levels()  # pyright: ignore
    assert plots[0].asked == (17 * level.target, 17 * level.target + 16)
    assert trace.frames is not None and tuple(trace.frames.shape[1:]) == (99, 99, 3)
    labels = [step.label for step in trace.steps]
    names = [tuple(tables.DANCES)[dance] for dance in level.dances]
    assert labels[0] == labels[15] == f"dancer 1 does {names[0]}"
    assert labels[16] == "watch"
    assert labels[17] == f"dancer 2 does {names[1]}"
    assert labels[51] == f"who danced {names[level.target]}?"
    first = trace.moments[0]
    assert first.step == 51
    assert first.action in tables.DIRECTIONS
    # Chunks of 4: of those that hold 4 of its 16 steps the oldest.
    assert first.asked == -(-17 * level.target // 4)
    assert len(first.layers) == 2


def test_ballet_one_by_one_has_the_same_plots() -> None:
    agent, config = make_ballet(vectorize="sync")
    player = begin(agent, config, 2, 0)
    assert SCENE.plots is not None
    plots = SCENE.plots(player.environments)
    for env, plot in zip(player.environments.vector.envs, plots, strict=True):  # pyright: ignore
        assert plot.asked == (17 * env.unwrapped.level.target, 17 * env.unwrapped.level.target + 16)


def test_an_environment_that_draws_itself_is_shown() -> None:
    agent, config = make_walk(seed=0)
    trace = trace_agent(agent, config)
    assert trace.frames is not None
    # Each picture is of the time.
    assert trace.frames[:, 0, 0, 0].tolist() == list(range(len(trace.steps)))
    assert trace.steps[0].label.startswith("0, 0, 0, 0.")


# In a process of its own an environment that fails ends, which at its beginning harms nothing.
@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")
@pytest.mark.parametrize(("fails_at", "vectorize"), [(0, "sync"), (2, "sync"), (0, "async")])
def test_an_environment_that_fails_to_draw_itself_is_shown_without_pictures(
    fails_at: int, vectorize: str
) -> None:
    agent, config = make_walk(seed=0)
    expected = trace_agent(agent, config)
    assert expected.frames is not None
    env_args = (*config.environments.env_args, f"first={fails_at}")
    config = config.replace(
        env="tests.rl.worlds:Test/FailsToDraw-v0", env_args=env_args, vectorize=vectorize
    )
    with pytest.warns(UserWarning, match=r"no pictures \(RuntimeError: no display") as warned:
        trace = trace_agent(agent, config)
    assert sum("no pictures" in str(one.message) for one in warned) == 1
    assert trace.frames is None
    assert (trace.moments, trace.steps) == (expected.moments, expected.steps)


def test_agents_that_recall_no_chunks_are_refused() -> None:
    agent, config = make_walk(memory="gru")
    with pytest.raises(ValueError, match=r"agent: expected one that recalls chunks \(--memory htm"):
        trace_agent(agent, config)
    with pytest.raises(ValueError, match="got --memory window"):
        trace_agent(*make_walk(memory="window"))


def test_episodes_that_do_not_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("htm_pytorch.report.agents.MOST_STEPS", 2)
    with pytest.raises(ValueError, match="env: expected an episode that ends within 2 steps"):
        trace_agent(*make_walk(seed=0))


def test_the_share_of_chunks_asked_about_is_that_of_recall() -> None:
    """By another way: all episodes in one call of `recall`, chunks counted by hand."""
    agent, config = make_ballet(mem_chunk_size=17, depth=1, topk_mems=2, seed=5)
    truth = measure(agent, config, 40, SCENE)
    player = begin(agent, config, 40, 0)
    assert SCENE.plots is not None
    plots = SCENE.plots(player.environments)
    steps = []
    while True:
        step, decides = player.look()
        steps.append(step)
        if decides.any():
            break
        player.advance()
    assert decides.all() and len(steps) == 52
    from htm_pytorch.rl.player import joined

    seen = joined(steps)
    core: Any = agent.core
    with torch.no_grad():
        _, _, (recall,) = core.recall(
            agent.encode(seen), None, seen.is_first, at=torch.full((40, 1), 51)
        )
    kept = recall.chunks[:, 0].numpy() - 40
    asked = np.array([plot.asked[0] // 17 for plot in plots])
    assert set(asked) == {0, 1, 2}
    (layer,) = truth.layers
    assert layer.first == pytest.approx(np.mean(kept[:, 0] == asked))
    assert layer.among == pytest.approx(np.mean((kept == asked[:, None]).any(1)))
    weights = (recall.chunk_weights[:, 0].numpy() * (kept == asked[:, None])).sum(1)
    assert layer.weight == pytest.approx(weights.mean(), rel=1e-5)
    assert (truth.chance_first, truth.chance_among) == pytest.approx((1 / 3, 2 / 3))
    assert (truth.episodes, truth.left_out, truth.k) == (40, 0, 2)
    assert truth.success == pytest.approx(judge(agent, config, 40).mean)
    assert f"first in {layer.first:.3f} +- " in str(truth)


def test_episodes_that_ask_about_nothing_that_has_closed_are_left_out() -> None:
    agent, config = make_ballet(mem_chunk_size=34, depth=1, seed=5)
    truth = measure(agent, config, 30, SCENE)
    # The third dancer dances in the chunk that is open.
    assert truth.episodes + truth.left_out == 30 and truth.left_out > 0
    assert truth.chance_first == 1.0
    assert f"{truth.left_out} more episodes" in str(truth)
    agent, config = make_ballet(mem_chunk_size=99, depth=1)
    with pytest.raises(ValueError, match="a smaller mem_chunk_size closes chunks earlier"):
        measure(agent, config, 4, SCENE)


def test_rows_that_decide_at_other_times_are_measured_each_at_its_own() -> None:
    """Environments one by one; who is asked about the first two steps at once."""
    agent, config = make_walk(env_args=("discrete=true", "watch=true"), num_envs=4)
    scene = Scene(plots=lambda environments: [Plot((0, 2))] * environments.num_envs)
    truth = measure(agent, config, 8, scene)
    assert truth.episodes == 8
    # At step 2 one chunk has closed, and is recalled.
    assert [tuple(layer) for layer in truth.layers] == [pytest.approx((1.0, 1.0, 1.0))] * 2


def test_what_cannot_be_measured_is_refused() -> None:
    agent, config = make_walk()
    with pytest.raises(ValueError, match="episodes: expected a task that knows which steps"):
        measure(agent, config, 3, Scene())
    with pytest.raises(ValueError, match="episodes: expected an integer >= 1, got 0"):
        measure(agent, config, 0, SCENE)


def test_scenes_without_a_task() -> None:
    scene = Scene(actions=("left", "right"))
    assert scene.action_of(np.int64(1)) == "right"
    assert scene.action_of(np.int64(2)) == "2"
    assert scene.action_of(np.array([0.25, -1.0])) == "0.25, -1"
    picture = np.zeros((3, 20, 20, 3), np.uint8)
    board = np.zeros((3, 7, 7, 3), np.uint8)
    grey = np.full((3, 20, 20, 1), 9, np.uint8)
    assert scene.frames_of({"a": board, "b": np.zeros((3, 2))}) is None
    frames = scene.frames_of({"a": board, "b": picture})
    assert frames is not None and frames.shape == picture.shape
    frames = scene.frames_of(grey)
    assert frames is not None and frames.shape == picture.shape and bool((frames == 9).all())
    numbers = np.array([[1.5, 2.0], [0.0, -1.0]])
    assert scene.labels_of({"a": numbers, "n": np.array([3, 4])}) == ["1.5, 2, 3", "0, -1, 4"]
    assert scene.labels_of(picture) == ["", "", ""]


def test_pictures_of_a_moment_and_a_film(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from htm_pytorch.report import draw_moment, film_moments

    trace = trace_agent(*make_ballet(action_repeat=1), scene=SCENE)
    for layer in (0, -1):
        path = draw_moment(trace, tmp_path / "moment.png", -1, layer=layer)
        with image.open(path) as picture:
            assert picture.size == (1500, 780)
    few = replace(trace, moments=trace.moments[-6:])
    with image.open(film_moments(few, tmp_path / "moments.gif")) as film:
        # Equal pictures one after another are one.
        assert 1 < film.n_frames <= len(few.moments)
    with pytest.raises(ValueError, match="number: expected one of"):
        draw_moment(trace, tmp_path / "moment.png", 999)
    with pytest.raises(ValueError, match="layer: expected one of 2 layers, got 2"):
        draw_moment(trace, tmp_path / "moment.png", layer=2)
    with pytest.raises(ValueError, match="path: expected a file .png or .pdf or .svg, got"):
        draw_moment(trace, tmp_path / "moment.jpg")
    with pytest.raises(ValueError, match="path: expected a file .gif or .mp4"):
        film_moments(trace, tmp_path / "moments.webm")
