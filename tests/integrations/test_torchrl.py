"""`HTMModule` keeps the contract of TorchRL's recurrent modules, and trains with its parts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import (
    OneHotCategorical,
    ProbabilisticActor,
    ValueOperator,
    set_recurrent_mode,
)
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from htm_pytorch import HTMTransformer
from htm_pytorch.integrations.torchrl import HTMModule
from tests.helpers import assert_near

pytestmark = pytest.mark.usefixtures("one_thread")
DIM, ROWS = 16, 3


def transformer() -> HTMTransformer:
    return HTMTransformer(
        DIM, 2, 2, 8, topk_mems=2, mem_chunk_size=4, mem_chunks=4, window=4, detach_memories=False
    )


class Parts:
    """An actor and a critic with one memory, in `ROWS` environments."""

    def __init__(self, primed: bool = True, **options: Any):
        self.env = TransformedEnv(SerialEnv(ROWS, lambda: GymEnv("CartPole-v1")), InitTracker())
        embed = TensorDictModule(nn.Linear(4, DIM), in_keys=["observation"], out_keys=["embedded"])
        self.memory = HTMModule(transformer(), in_key="embedded", out_key="remembered", **options)
        self.body = TensorDictSequential(embed, self.memory)
        head = TensorDictModule(nn.Linear(DIM, 2), in_keys=["remembered"], out_keys=["logits"])
        self.actor = ProbabilisticActor(
            TensorDictSequential(self.body, head),
            in_keys=["logits"],
            out_keys=["action"],
            spec=self.env.action_spec,
            distribution_class=OneHotCategorical,
            return_log_prob=True,
        )
        value = ValueOperator(nn.Linear(DIM, 1), in_keys=["remembered"])
        self.critic = TensorDictSequential(self.body, value)
        if primed:
            self.env.append_transform(get_primers_from_module(self.actor))
        self.env.set_seed(0)

    def read(self, window: Any) -> torch.Tensor:
        inputs = window.select("observation", "is_init", "htm_step")
        with set_recurrent_mode(True):
            return self.body(inputs)["remembered"]


@pytest.fixture
def parts() -> Parts:
    return Parts()


def test_a_window_gives_what_its_steps_gave(parts: Parts) -> None:
    played = parts.env.rollout(80, parts.actor, break_when_any_done=False)
    assert played["is_init"].sum() > ROWS, "no episode began inside"
    assert_near(parts.read(played), played["remembered"], 1e-5)


def test_batches_begin_with_the_memory_that_acting_had(parts: Parts) -> None:
    collector = Collector(
        parts.env, parts.actor, frames_per_batch=ROWS * 10, total_frames=ROWS * 50
    )
    inside = 0
    for batch in collector:
        inside += int((~batch["is_init"][:, 0]).sum())
        assert_near(parts.read(batch), batch["remembered"], 1e-5)
        order = torch.tensor([2, 0])  # a minibatch of rows
        assert_near(parts.read(batch[order]), batch["remembered"][order], 1e-5)
    collector.shutdown()
    assert inside > 4, "all windows began with an episode"


def test_it_trains_with_collector_gae_and_ppo(parts: Parts) -> None:
    collector = Collector(
        parts.env, parts.actor, frames_per_batch=ROWS * 24, total_frames=ROWS * 72
    )
    gae = GAE(gamma=0.99, lmbda=0.95, value_network=parts.critic, shifted=True)
    ppo = ClipPPOLoss(parts.actor, parts.critic)
    optimizer = torch.optim.Adam(ppo.parameters(), 1e-3)
    before = {name: value.detach().clone() for name, value in parts.body.named_parameters()}
    for batch in collector:
        with set_recurrent_mode(True), torch.no_grad():
            gae(batch)
        for rows in torch.randperm(ROWS).split(2):
            losses = ppo(batch[rows])
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    collector.shutdown()
    still = [name for name, value in parts.body.named_parameters() if value.equal(before[name])]
    # A bias of the summaries' keys adds the same to all scores.
    assert all(name.endswith("to_summary_keys.bias") for name in still), still


def test_a_window_inside_an_episode_is_refused(parts: Parts) -> None:
    played = parts.env.rollout(8, parts.actor)
    with pytest.raises(ValueError, match=r"windows that begin with an episode .* rows \[0, 1, 2\]"):
        parts.read(played[:, 3:])


def test_any_steps_are_read_as_they_were_acted_or_refused(parts: Parts) -> None:
    """Whatever is put together as a window, and whatever is marked as a beginning."""
    played = parts.env.rollout(40, parts.actor, break_when_any_done=False).detach()
    begins = played["is_init"][..., 0].clone()
    assert begins.sum() > ROWS, "no episode began inside"
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(300):
        cut = torch.randint(1, 3, (), generator=generator)
        places: list[tuple[int, int]] = []
        for _ in range(int(cut)):
            row, start = (int(torch.randint(n, (), generator=generator)) for n in (ROWS, 40))
            starts = begins[row, : start + 1].nonzero()[-1]
            # Mostly from where an episode began, else nearly nothing is accepted.
            start = int(starts) if torch.rand((), generator=generator) < 0.7 else start
            stride = int(torch.rand((), generator=generator) < 0.2) + 1
            end = start + int(torch.randint(1, 9, (), generator=generator))
            places += [(row, step) for step in range(start, min(end, 40), stride)]
        window = torch.stack([played[place] for place in places])
        marks = window["is_init"] | (torch.rand(len(places), 1, generator=generator) < 0.2)
        is_whole = all(
            bool(begins[place]) or (number > 0 and places[number - 1] == (place[0], place[1] - 1))
            for number, place in enumerate(places)
        )
        window = window.set("is_init", marks)[None]
        if is_whole:
            assert_near(parts.read(window), window["remembered"], 1e-5)
            accepted += 1
        else:
            with pytest.raises(ValueError, match="expected windows"):
                parts.read(window)
    assert 50 < accepted < 250


@pytest.mark.parametrize("init_key", [None, "is_init"])
def test_slices_of_a_replay_buffer_are_read_from_beginnings_alone(
    parts: Parts, init_key: str | None
) -> None:
    played = parts.env.rollout(24, parts.actor, break_when_any_done=False).detach()
    sampler = SliceSampler(num_slices=1, end_key=("next", "done"), init_key=init_key)
    storage = LazyTensorStorage(ROWS * 24, ndim=2)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=4)
    buffer.extend(played)
    accepted = 0
    for _ in range(60):
        window = buffer.sample().reshape(1, 4)
        if (window["htm_step"][:, 0] < 0).all():
            assert_near(parts.read(window), window["remembered"], 1e-5)
            accepted += 1
        else:
            with pytest.raises(ValueError, match=r"init_key=None"):
                parts.read(window)
    assert 0 < accepted < 60


def test_a_window_whose_beginning_was_kept_is_read_whatever_marks_it(parts: Parts) -> None:
    first = parts.env.rollout(6, parts.actor)
    parts.memory.begin_window()
    going_on = parts.env.step_mdp(first[:, -1])
    second = parts.env.rollout(6, parts.actor, tensordict=going_on, auto_reset=False).detach()
    second["is_init"][:, 0] = True
    assert_near(parts.read(second), second["remembered"], 1e-5)


def test_a_window_begins_where_it_was_said(parts: Parts) -> None:
    first = parts.env.rollout(6, parts.actor)
    parts.memory.begin_window()
    going_on = parts.env.step_mdp(first[:, -1])
    second = parts.env.rollout(6, parts.actor, tensordict=going_on, auto_reset=False)
    assert not second["is_init"][:, 0].any()
    assert_near(parts.read(second), second["remembered"], 1e-5)


def test_memories_of_older_windows_are_kept_as_asked() -> None:
    parts = Parts(windows=2)
    collector = Collector(parts.env, parts.actor, frames_per_batch=ROWS * 6, total_frames=ROWS * 24)
    batches = []
    for batch in collector:
        batches.append(batch.clone())
        parts.read(batch)
    collector.shutdown()
    for batch in batches[-2:]:
        assert_near(parts.read(batch), batch["remembered"], 1e-5)
    mixed = torch.cat([batches[-1][:1], batches[-2][1:]])
    assert_near(parts.read(mixed), mixed["remembered"], 1e-5)
    if not batches[1]["is_init"][:, 0].all():
        with pytest.raises(ValueError, match=r"keep more of them \(windows=2\)"):
            parts.read(batches[1])


def test_acting_elsewhere_in_between_is_refused_and_a_copy_is_not(parts: Parts) -> None:
    first = parts.env.rollout(6, parts.actor)
    going_on = parts.env.step_mdp(first[:, -1])
    copy.deepcopy(parts.actor)(parts.env.reset())
    parts.actor(going_on.clone())
    parts.actor(parts.env.reset())
    with pytest.raises(ValueError, match=r"go on where the module is, got others in rows \[0, 1"):
        parts.actor(going_on)
    with pytest.raises(ValueError, match="go on where the module is"):
        parts.actor(going_on[:2])


def test_no_memory_goes_along_to_another_process(parts: Parts) -> None:
    played = parts.env.rollout(6, parts.actor)
    parts.read(played)
    other = pickle.loads(pickle.dumps(parts.memory))
    assert other._state is None and not other._beginnings
    assert other.htm.norm.weight.equal(parts.memory.htm.norm.weight)
    assert len(pickle.dumps(parts.memory)) < 2 * len(pickle.dumps(parts.memory.htm))


def test_two_memories_of_one_policy_have_keys_of_their_own() -> None:
    for key, fails in (("htm_step", True), ("other_step", False)):
        parts = Parts()
        other = HTMModule(transformer(), in_key="embedded", out_key="other", step_key=key)
        if not fails:
            parts.env.append_transform(other.make_tensordict_primer())
        policy = TensorDictSequential(parts.actor, other)
        if fails:
            with pytest.raises(ValueError, match="a step_key of its own"):
                parts.env.rollout(3, policy)
        else:
            assert parts.env.rollout(3, policy)["other"].shape == (ROWS, 3, DIM)


def unprimed() -> None:
    parts = Parts(primed=False)
    parts.actor(parts.env.reset())


def one_step() -> None:
    parts = Parts()
    parts.read(parts.env.reset()[0])


def window_outside_recurrent_mode() -> None:
    parts = Parts()
    parts.body(parts.env.rollout(6, parts.actor).select("observation", "is_init", "htm_step"))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    def act() -> None:
        parts = Parts()
        shown = parts.env.reset()
        parts.actor(shown.set(name, change(shown[name])))

    return act


def named(**keys: Any) -> Callable[[], HTMModule]:
    return lambda: HTMModule(transformer(), **{"in_key": "a", "out_key": "b"} | keys)


def shaped(shape: tuple[int, ...], entry: tuple[int, ...]) -> Callable[[], None]:
    """Put an entry of some shape through a module, of windows where there is time."""

    def act() -> None:
        first, numbers = torch.ones(*shape, 1, dtype=torch.bool), torch.zeros(*shape, 1).long()
        given = {"a": torch.zeros(*shape, *entry), "is_init": first, "htm_step": numbers}
        with set_recurrent_mode(len(shape) > 1):
            named()()(TensorDict(given, shape))

    return act


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (window_outside_recurrent_mode, r"as recurrent mode is off, got 18 .*set_recurrent_mode"),
        (
            changed("is_init", torch.Tensor.float),
            r"'is_init' as \[3, 1\] of torch.bool, got .*float",
        ),
        (changed("is_init", lambda p: p.repeat(1, 2)), r"\[3, 1\] of torch.bool, got \[3, 2\]"),
        (changed("htm_step", torch.Tensor.float), r"'htm_step' as \[3, 1\] of torch.int64, got"),
        (named(in_key=["a", "c"]), r"in_key: expected the name of one entry, .* got \['a', 'c'\]"),
        (named(out_key=1), "out_key: expected the name of one entry"),
        (named(is_init_key=()), "is_init_key: expected the name of one entry"),
        (named(step_key="a"), "step_key: expected an entry apart from that of in_key, 'a', got"),
        (named(out_key="is_init"), "out_key: expected an entry apart from that of is_init_key"),
        (
            named(out_key="next"),
            r"out_key: .* of next step_key, .*, got 'next'",
        ),
        (named(out_key=("next", "htm_step")), "out_key: expected an entry apart"),
        (named(out_key=("next", "htm_step", "c")), "out_key: expected an entry apart"),
        (
            named(out_key=("htm_step", "c")),
            "out_key: .* apart from that of step_key",
        ),
        (named(out_key=("a", "c")), "out_key: expected an entry apart from that of in_key"),
        (named(default_recurrent_mode=1), "default_recurrent_mode: expected a bool, got int"),
        (
            lambda: named()()(torch.zeros(3, DIM)),
            "tensordict: expected a tensordict, .* got Tensor",
        ),
        (lambda: HTMModule(nn.Linear(2, 2), in_key="a", out_key="b"), "htm: expected an HTMTr"),
        (lambda: Parts(windows=0), "windows: expected an integer >= 1, got 0"),
        (shaped((0,), (DIM,)), r"tensordict: expected at least one step, got shape \[0\]"),
        (shaped((3, 0), (DIM,)), r"tensordict: expected at least one step, got shape \[3, 0\]"),
        (shaped((3,), (5,)), r"in_key='a' as \[3, 16\], got \[3, 5\]"),
        (shaped((3,), (4, 4)), r"in_key='a' as \[3, 16\], got \[3, 4, 4\]"),
        (shaped((3, 5), (2, 8)), r"in_key='a' as \[3, 5, 16\], got \[3, 5, 2, 8\]"),
        (
            changed("htm_step", lambda p: p + 3),
            "expected 0 as 'htm_step' of the first step of an episode",
        ),
        (unprimed, r"an entry 'htm_step'.*make_tensordict_primer"),
        (one_step, "expected time as its last dimension"),
    ],
)
def test_what_is_wrong_is_told(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
