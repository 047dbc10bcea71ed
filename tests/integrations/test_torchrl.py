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

from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
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
        (named(step_key="a"), "in_key: expected entries of different names"),
        (named(out_key="is_init"), "in_key: expected entries of different names"),
        (named(default_recurrent_mode=1), "default_recurrent_mode: expected a bool, got int"),
        (
            lambda: named()()(torch.zeros(3, DIM)),
            "tensordict: expected a tensordict, .* got Tensor",
        ),
        (lambda: HTMModule(nn.Linear(2, 2), in_key="a", out_key="b"), "htm: expected an HTMTr"),
        (lambda: Parts(windows=0), "windows: expected an integer >= 1, got 0"),
        (unprimed, r"an entry 'htm_step'.*make_tensordict_primer"),
        (one_step, "expected time as its last dimension"),
    ],
)
def test_what_is_wrong_is_told(make: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
