"""What environments of somebody else may do, and what is said of what they may not."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from htm_pytorch.rl import Parts, TrainConfig, evaluate, make_agent, train
from htm_pytorch.rl.config import RolloutConfig
from htm_pytorch.rl.environments import Environments
from htm_pytorch.rl.observations import leaves, nested
from htm_pytorch.rl.player import Player
from htm_pytorch.rl.preparing import prepare
from htm_pytorch.rl.received import action_counts, check_finite
from htm_pytorch.rl.rollout import play
from htm_pytorch.rl.space import MOST_CHOICES, check_size
from tests.rl import worlds
from tests.rl.test_environments import MODES, ROWS, make_walker
from tests.rl.test_training import TINY

pytestmark = pytest.mark.usefixtures("one_thread")


class Handing(gymnasium.vector.VectorWrapper):
    """Hands everything over as `hand` makes it, in the same order each time."""

    def __init__(self, vector: VectorEnv, hand: Any):
        super().__init__(vector)
        self.hand = hand

    def reset(self, **given: Any) -> Any:
        observed, info = super().reset(**given)
        return self._observation(observed), info

    def step(self, actions: Any) -> Any:
        observed, *others, info = super().step(actions)
        handed = [self.hand(name, part) for name, part in zip(("r", "e", "c"), others, strict=True)]
        return self._observation(observed), *handed, info

    def _observation(self, observed: Any) -> Any:
        return {name: self.hand(name, part) for name, part in observed.items()}


class Buffers:
    """One array for each name, written again each time."""

    def __init__(self) -> None:
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, name: str, part: Any) -> np.ndarray:
        part = np.asarray(part)
        return np.copyto(self.kept.setdefault(name, part.copy()), part) or self.kept[name]


HANDS = {
    "buffers": Buffers,
    "lists": lambda: lambda name, part: part.tolist() if name in "rec" else part,
    "tensors": lambda: lambda name, part: torch.from_numpy(np.array(part)),
    "float32": lambda: lambda name, part: np.asarray(part, np.float32) if name == "r" else part,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hand", HANDS.values(), ids=HANDS)
def test_what_is_handed_over_may_be_written_again(mode: AutoresetMode, hand: Any) -> None:
    """A rollout is the same as of an environment that hands over arrays of its own."""
    found = []
    for wrap in (lambda vector: vector, lambda vector: Handing(vector, hand())):
        vector = SyncVectorEnv([worlds.Walk for _ in range(ROWS)], autoreset_mode=mode)
        environments = Environments(wrap(vector))
        player = Player(environments, make_walker(environments))
        player.begin(list(range(ROWS)))
        found.append([play(player, RolloutConfig(steps=31), None) for _ in range(2)])
    for got, expected in zip(*found, strict=True):
        assert len(got.episodes) > ROWS
        np.testing.assert_allclose(np.array(got.episodes), np.array(expected.episodes), rtol=1e-6)
        for one, other in zip(got.rollout[2:], expected.rollout[2:], strict=True):
            torch.testing.assert_close(one, other)
        shown, wanted = (leaves(played.rollout.seen.observation) for played in (got, expected))
        assert all(map(torch.equal, shown, wanted))


OUTCOMES = {
    "words": ("r", lambda part: ["much"] * ROWS, "rewards of .* to be numbers, got"),
    "two a row": ("r", lambda part: np.stack([part, part], 1), r"rewards of .* to be 5, one a row"),
    "one in all": ("e", lambda part: False, r"terminated of .* to be 5, one a row, got shape \(\)"),
    "too few": ("c", lambda part: part[1:], r"truncated of .* to be 5, .* got shape \(4,\)"),
}


@pytest.mark.parametrize(("which", "change", "message"), OUTCOMES.values(), ids=OUTCOMES)
def test_outcomes_that_are_none_are_named(which: str, change: Any, message: str) -> None:
    vector = SyncVectorEnv([worlds.Walk for _ in range(ROWS)])
    handing = Handing(vector, lambda name, part: change(part) if name == which else part)
    environments = Environments(handing)
    environments.reset(list(range(ROWS)))
    with pytest.raises(ValueError, match=f"env: expected .*{message}"):
        environments.step(np.zeros((ROWS, 2), np.float32))


COUNTS = {
    "nothing": ({}, [True, True, True]),
    "none": ({"action_counts": None}, [True, True, True]),
    "each": ({"action_counts": np.array([True, False, True])}, [True, False, True]),
    "all": ({"action_counts": False}, [False, False, False]),
    "a list": ({"action_counts": [True, False, False]}, [True, False, False]),
    "some say": (
        {"action_counts": np.array([False, False, False]), "_action_counts": [True, False, True]},
        [False, True, False],
    ),
    "objects": ({"action_counts": np.array([True, None, False], object)}, [True, True, False]),
}


@pytest.mark.parametrize(("info", "expected"), COUNTS.values(), ids=COUNTS)
def test_where_actions_count(info: dict[str, Any], expected: list[bool]) -> None:
    assert action_counts("env", info, 3).tolist() == expected


@pytest.mark.parametrize(
    "wrong", ["yes", 1, np.ones(3), np.ones(2, bool), np.ones((3, 2), bool), np.array(["a"] * 3)]
)
def test_what_does_not_say_where_actions_count_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"env: expected info\['action_counts'\] of env to be a b"):
        action_counts("env", {"action_counts": wrong}, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_with_its_place(value: float) -> None:
    shown = {"a": torch.ones(4, 1, 2), "b": (torch.arange(4), {"c": torch.zeros(4, 1)})}
    check_finite("env", 10, "observations", shown)
    huge = nested(lambda part: part if part.dtype == torch.int64 else part * 3e38, shown)
    check_finite("env", 10, "observations", huge)
    shown["b"][1]["c"][2, 0] = value
    message = rf"finite observations at b\[1\].c, got {value} from the environment env in row 12;"
    with pytest.raises(ValueError, match=message):
        check_finite("env", 10, "observations", shown)


class Odd(worlds.Walk):
    """A walk with a fault: `fault` says which, from its `late`-th step in all on."""

    def __init__(self, fault: str = "", late: int = 0, **options: Any):
        super().__init__(**options)
        self.fault, self.late, self.played = fault, late, 0

    def reset(self, **given: Any) -> Any:
        if self.fault == "reset":
            raise RuntimeError("no level")
        return super().reset(**given)

    def step(self, action: Any) -> Any:
        assert np.isfinite(action).all()
        self.played += 1
        observed, reward, terminated, truncated, info = super().step(action)
        if self.played > self.late:
            if self.fault == "value":
                raise ValueError("no such move")
            if self.fault == "nan":
                observed["numbers"][1] = np.nan
            if self.fault == "endless":
                terminated = truncated = False
        return observed, reward, terminated, truncated, info


gymnasium.register("Test/Odd-v0", entry_point=Odd)


def odd(run_dir: Path, *env_args: str, **options: Any) -> TrainConfig:
    config = TrainConfig(env="Test/Odd-v0", run_dir=run_dir)
    return config.replace(**TINY | {"steps": 16, "frames": 128, "env_args": env_args} | options)


def test_an_observation_that_is_not_finite_stops_training_and_judging(tmp_path: Path) -> None:
    config = odd(tmp_path / "run", "fault=nan", "late=20")
    with pytest.raises(ValueError, match="env: expected finite observations at numbers, got nan"):
        train(config)
    whole = train(odd(tmp_path / "whole")) and tmp_path / "whole"
    with pytest.raises(ValueError, match="env: expected finite observations at numbers, got nan"):
        evaluate(whole, env_args=("fault=nan",))
    assert not (whole / "evaluations.jsonl").exists()


def test_a_ValueError_of_an_environment_is_said_to_be_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="env: Test/Odd-v0 raised a ValueError in its step: no s"):
        train(odd(tmp_path / "run", "fault=value"))


class Resets(worlds.Walk):
    """Its later levels cannot be made."""

    def __init__(self, good: int = 0, **options: Any):
        super().__init__(**options)
        self.good = good

    def reset(self, **given: Any) -> Any:
        self.good -= 1
        if self.good < 0:
            raise ValueError("no such level")
        return super().reset(**given)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("good", [0, 1])
def test_a_ValueError_of_a_reset_is_said_to_be_the_environments(
    mode: AutoresetMode, good: int
) -> None:
    vector = SyncVectorEnv([lambda: Resets(good) for _ in range(ROWS)], autoreset_mode=mode)
    environments = Environments(vector)
    with pytest.raises(ValueError, match="env: .* raised a ValueError in its .*: no such level; -"):
        environments.reset(list(range(ROWS)))
        for _ in range(20):
            environments.step(np.zeros((ROWS, 2), np.float32))


FINAL = {
    "none": lambda final, ended: None,
    "only those": lambda final, ended: [final[row] for row in np.flatnonzero(ended)][:1],
    "nothing in a row": lambda final, ended: [None] * ROWS,
    "other parts": lambda final, ended: {"numbers": np.zeros((ROWS, 3))},
}


@pytest.mark.parametrize("change", FINAL.values(), ids=FINAL)
def test_final_observations_of_another_form_are_named(change: Any) -> None:
    class Other(gymnasium.vector.VectorWrapper):
        def step(self, actions: Any) -> Any:
            *others, info = super().step(actions)
            if "final_obs" in info:
                info["final_obs"] = change(info["final_obs"], info["_final_obs"])
            return *others, info

    mode = AutoresetMode.SAME_STEP
    vector = SyncVectorEnv([worlds.Walk for _ in range(ROWS)], autoreset_mode=mode)
    environments = Environments(Other(vector))
    environments.reset(list(range(ROWS)))
    with pytest.raises(ValueError, match=r"env: expected info\['final_obs'\] of .* to have 5 rows"):
        for _ in range(20):
            environments.step(np.zeros((ROWS, 2), np.float32))


def test_a_training_that_failed_gives_its_folder_back(tmp_path: Path) -> None:
    """Also while its error is still held, as a notebook holds it; and nothing was learned there."""
    with pytest.raises(RuntimeError, match="no level"):
        train(odd(tmp_path / "run", "fault=reset"))
    assert not (tmp_path / "run").exists()
    for fault in ("value", "nan"):
        with pytest.raises(ValueError, match="env: ") as held:
            train(odd(tmp_path / "run", f"fault={fault}"))
        assert held.value.__traceback__ is not None
    with pytest.raises(ValueError, match="or no --resume, as nothing was learned there"):
        train(odd(tmp_path / "run", resume=True))
    agent = train(odd(tmp_path / "run"))
    expected = train(odd(tmp_path / "other"))
    for one, other in zip(agent.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_film_of_an_endless_episode_ends(tmp_path: Path) -> None:
    train(odd(tmp_path / "run", "render_mode=rgb_array"))
    with pytest.raises(ValueError, match="env: expected episodes that end, got none .* in 41 step"):
        evaluate(
            tmp_path / "run",
            env_args=("fault=endless",),
            render=tmp_path / "film.gif",
            patience=40,
        )
    assert not (tmp_path / "film.gif").exists()


def test_env_args_that_change_what_is_seen_are_named(tmp_path: Path) -> None:
    train(odd(tmp_path / "run", "discrete=false"))
    with pytest.raises(
        ValueError, match=r"env_args: expected an environment like .* Discrete\(3\)"
    ):
        evaluate(tmp_path / "run", env_args=("discrete=true",))


def test_the_stage_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    config = odd(tmp_path / "run", curriculum=('{"bonus": 1.0}', '{"colour": 6}'))
    with pytest.raises(ValueError, match=r"curriculum, stage 1: Test/Odd-v0 is not made with"):
        train(config)
    with pytest.raises(ValueError, match="env_args: Test/Odd-v0 is not made with .*: Attribute"):
        train(odd(tmp_path / "run", "render_mode=3"))
    assert not (tmp_path / "run").exists()


EMPTY = {
    "Dict": spaces.Dict({}),
    "Tuple": spaces.Tuple(()),
    "Box": spaces.Box(0, 1, (0,)),
    "Box of rows": spaces.Box(0, 1, (3, 0)),
}


@pytest.mark.parametrize("space", EMPTY.values(), ids=EMPTY)
def test_spaces_of_nothing_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match="env: expected actions of something, got .* empty; a wr"):
        check_size(space, "actions")


def test_more_choices_than_there_can_be_weights_for_are_refused() -> None:
    for space in (spaces.Discrete(2**40), spaces.MultiDiscrete([MOST_CHOICES, 1])):
        with pytest.raises(ValueError, match="env: expected actions of at most 1,000,000 possib"):
            check_size(space, "actions")
    check_size(spaces.Discrete(MOST_CHOICES, start=-5), "actions")
    check_size(spaces.MultiBinary(12), "actions")


class Memory(torch.nn.Module):
    """A memory of the user's own that keeps the contract, but for its `fault`."""

    def __init__(self, dim: int, fault: str = ""):
        super().__init__()
        self.dim, self.fault = dim, fault
        self.linear = torch.nn.Linear(dim, dim)

    def initial_state(self, batch_size: int) -> Any:
        layers = torch.zeros(2, batch_size, self.dim)
        states = {"none": None, "text": "x", "numbers": [1, 2], "rows last": torch.zeros(1, 9)}
        states |= {"layers first": layers, "one of them": (layers[0], {"h": layers})}
        return states.get(self.fault, torch.zeros(batch_size, self.dim))

    def forward(
        self, x: Any, state: Any, is_first: Any, mask: Any = None, *, at: Any = None
    ) -> Any:
        y = self.linear(x)
        if self.fault == "width":
            y = torch.cat([y, y], -1)
        if self.fault == "no state":
            return y
        if at is not None and self.fault != "all steps":
            y = y.gather(1, at[..., None].expand(-1, -1, y.shape[-1]))
        return (y, None) if self.fault == "state lost" else (y, state)


CORES = {
    "none": r"a state that is a tree of tensors with the 7 rows first, .* got a NoneType before",
    "text": "got a str before its first step",
    "numbers": "got a list before its first step",
    "rows last": r"got a Tensor of shape \[1, 9\] before its first step",
    "layers first": r"got a Tensor of shape \[2, 7, 16\] before .* \(a Tensor of shape .* in it\)",
    "one of them": r"got a tuple before its first step \(a Tensor of shape \[2, 7, 16\] in it\)",
    "state lost": "got a NoneType after some steps",
    "width": r"outputs \[B, P, D = 16\] at the P = 2 .*, got a Tensor of shape \[7, 2, 32",
    "all steps": r"got a Tensor of shape \[7, 3, 16\]",
    "no state": r"to return \(y, state\), got a Tensor of shape",
}


@pytest.mark.parametrize(("fault", "message"), CORES.items(), ids=CORES)
def test_a_memory_that_breaks_its_contract_is_refused(
    fault: str, message: str, tmp_path: Path
) -> None:
    parts = Parts(core=lambda dim: Memory(dim, fault))
    with pytest.raises(ValueError, match=f"parts.core: expected .*{message}"):
        train(odd(tmp_path / "run"), parts)
    assert not (tmp_path / "run").exists()
    prepare(odd(tmp_path / "run"), Parts(core=Memory))


class Blind(Memory):
    """It cannot be asked about some steps alone."""

    def forward(self, x: Any, state: Any, is_first: Any, mask: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x, state


def test_a_memory_without_a_part_of_its_contract_is_refused(tmp_path: Path) -> None:
    message = r"parts.core: .* initial_state\(batch_size\) and forward\(x, .* got a Blind with forw"
    with pytest.raises(ValueError, match=message):
        train(odd(tmp_path / "run"), Parts(core=Blind))
    with pytest.raises(ValueError, match=r"parts.core: .* got a Linear with forward\(input\)"):
        train(odd(tmp_path / "run"), Parts(core=lambda dim: torch.nn.Linear(dim, dim)))
    assert not (tmp_path / "run").exists()


class Normed(torch.nn.Module):
    """An encoder of statistics and chance."""

    def __init__(self, space: Any, dim: int):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, dim), torch.nn.BatchNorm1d(dim), torch.nn.Dropout(0.5)
        )

    def forward(self, seen: Any) -> Any:
        return self.net(seen["numbers"].flatten(0, 1)).unflatten(0, seen["numbers"].shape[:2])


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    agent = prepare(odd(tmp_path / "run"), Parts(encoder=Normed))
    drawn = torch.rand(3)
    assert agent.encoder.net[1].num_batches_tracked == 0  # pyright: ignore[reportIndexIssue]
    assert not agent.encoder.net[1].running_mean.any()  # pyright: ignore[reportIndexIssue]
    expected = make_agent(
        odd(tmp_path / "run"),
        Environments(SyncVectorEnv([Odd])).observation_space,
        spaces.Box(-1, 1, (2,)),
        seeded(Parts(encoder=Normed)),
    )
    assert torch.equal(torch.rand(3), drawn)
    for one, other in zip(agent.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other) and one.grad is None


def seeded(parts: Parts) -> Parts:
    torch.manual_seed(0)
    return parts


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def forward(self, seen: Any) -> Any:
            return seen["numbers"]

    with pytest.raises(ValueError, match=r"parts.encoder: .* \[B, T, D = 16\] .* \[7, 3, 3\]"):
        train(odd(tmp_path / "run"), Parts(encoder=lambda space, dim: Wide()))
    with pytest.raises(ValueError, match="parts.core: expected a class or function that makes it"):
        train(odd(tmp_path / "run"), Parts(core=Memory(16)))  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "run").exists()


class Pushes(worlds.Walk):
    """A walk whose actions are of another unit in each dimension, the last one without bounds."""

    def __init__(self) -> None:
        super().__init__()
        most = np.finfo(np.float32).max
        low, high = np.array([0, -2, -most]), np.array([8, 2, most])
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))


def test_previous_actions_are_in_units_of_the_policy() -> None:
    environments = Environments(SyncVectorEnv([Pushes]), see_previous=True)
    environments.reset([0])
    seen = environments.step(np.array([[8.0, -1.0, 3.0]], np.float32))
    assert seen.observation["previous_action"].tolist() == [[1.0, -0.5, 3.0]]
