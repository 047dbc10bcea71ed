"""A memory shared out among 2, 3 and 4 processes equals one in one process, and none waits forever.

What each rank does and asserts is in `shard_cases`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from htm_pytorch import ChunkedMemory, kernels, recall
from htm_pytorch.memory import ShardedMemory, ShardError
from htm_pytorch.memory.best import where_best
from htm_pytorch.ops.sharded import choose
from tests.ops import shard_cases
from tests.ops.shard_cases import TIMEOUT, Writing
from tests.ops.test_recall import Sizes
from tests.shard_world import World

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
GROUPS = {"two": [0, 1], "three": [0, 1, 2], "four": [0, 1, 2, 3]}
IMPLS = ["reference", *(["native"] if kernels.IS_AVAILABLE else [])]

every_group = pytest.mark.parametrize("group", GROUPS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(4, tmp_path_factory.mktemp("world"), GROUPS)
    yield world
    assert world.close() == [0] * 4


CASES = {
    "plain: chunks for all ranks, not the same number": Sizes(M=7),
    "primes: nothing divides anything": Sizes(3, 7, 5, 13, 11, 17, 2),
    "one-chunk: the other ranks have none": Sizes(M=1, k=1),
    "k-is-1: the router has no gradient": Sizes(M=9, k=1),
    "k-beyond-M: clamped, and beyond what any rank has": Sizes(k=12),
    "acting: one query, many chunks": Sizes(B=3, Q=1, M=40, k=4),
    "shared-masked: batch 1, masks of the reader": Sizes(B=4, shared=True, steps=0.7, seen=0.5),
    "step-masks: ragged chunks": Sizes(steps=0.5),
    "valid: a ring that is not full": Sizes(M=11, valid=0.5),
    "chunk-masks: queries disagree": Sizes(seen=0.5),
    "fewer-than-k: some see one chunk or none": Sizes(seen=0.15, k=4),
    "all-masked-steps: nothing to attend anywhere": Sizes(steps=0.0),
    "all-invalid: an empty ring": Sizes(valid=0.0),
    "all-forbidden: nothing to see": Sizes(seen=0.0),
    "every-mask-at-once": Sizes(M=13, steps=0.7, valid=0.7, seen=0.7),
    "no-positions-masked": Sizes(positions=False, steps=0.6, seen=0.6),
    "M-is-0: empty memory": Sizes(M=0),
    "Q-is-0: nobody asks": Sizes(Q=0),
    "ages: the newer of like ones": Sizes(M=13, ages="of now"),
    "ages-of-one: the other ranks have none": Sizes(M=1, k=1, ages="of now"),
    "ages-of-each: masked": Sizes(M=11, seen=0.7, valid=0.8, ages="for each"),
    "H-is-0: no heads": Sizes(H=0),
}


@every_group
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", CASES.values(), ids=[name.split(":")[0] for name in CASES])
def test_equals_one_process(world: World, group: str, impl: str, sizes: Sizes) -> None:
    world.run(shard_cases.equals_one_process, group, sizes, impl, None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("group", "counts", "chunks"),
    [
        ("two", [5, 0], 9),
        ("two", [0, 3], 6),
        ("three", [1, 6, 2], 17),
        ("four", [0, 0, 4, 1], 15),
    ],
    ids=str,
)
def test_ranks_may_hold_any_number_of_chunks(
    world: World, group: str, impl: str, counts: list[int], chunks: int
) -> None:
    for sizes in (Sizes(M=chunks, k=4), Sizes(M=chunks, k=2, seen=0.6, valid=0.8)):
        world.run(shard_cases.equals_one_process, group, sizes, impl, counts)


@every_group
@pytest.mark.parametrize(
    "sizes",
    [Sizes(M=11), Sizes(M=2, k=5), Sizes(M=9, steps=0.6, valid=0.8, seen=0.5, shared=True)],
    ids=["plain", "few-chunks", "masked"],
)
def test_what_was_recalled(world: World, group: str, sizes: Sizes) -> None:
    world.run(shard_cases.weights_equal, group, sizes)


@every_group
def test_attend(world: World, group: str) -> None:
    for impl in ("auto", *IMPLS):
        world.run(shard_cases.attend_equals, group, impl)


@pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="topk of torch breaks ties anyhow")
@every_group
def test_ties_go_to_the_older_chunk(world: World, group: str) -> None:
    world.run(shard_cases.ties_go_to_the_older, group)


@pytest.mark.parametrize(
    ("dtype", "memory_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_other_dtypes(world: World, dtype: torch.dtype, memory_dtype: torch.dtype) -> None:
    world.run(shard_cases.other_dtypes, "three", dtype, memory_dtype)


def test_nan_reaches_only_its_query(world: World) -> None:
    world.run(shard_cases.nan_reaches_only_its_query, "three")


WRITING = {
    "one-episode: the ring turns several times": Writing(T=150),
    "ring-no-multiple: of any number of ranks": Writing(chunks=11, T=150),
    "one-slot-a-rank": Writing(chunks=4, T=40),
    "episodes: rows out of step": Writing(border=0.05),
    "episodes-kept: short chunks": Writing(keep=True, border=0.2, T=120),
    "chunks-of-one-step": Writing(C=1, B=3),
    "not-yet-full": Writing(chunks=40, border=0.02),
}


@every_group
@pytest.mark.parametrize("writing", WRITING.values(), ids=[name.split(":")[0] for name in WRITING])
def test_appended_in_pieces_at_once_and_in_one_process(
    world: World, group: str, writing: Writing
) -> None:
    world.run(shard_cases.append_equals, group, writing)


@every_group
def test_gradients_of_appended_steps(world: World, group: str) -> None:
    world.run(shard_cases.gradients_of_appended_steps, group)


@every_group
def test_one_rank_needs_gradients(world: World, group: str) -> None:
    world.run(shard_cases.one_rank_needs_gradients, group)


@every_group
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
def test_layers(world: World, group: str, detach: bool) -> None:
    world.run(shard_cases.layers_equal, group, detach)


@every_group
@pytest.mark.parametrize("impl", IMPLS)
def test_parts_that_are_fetched(world: World, group: str, impl: str) -> None:
    world.run(shard_cases.other_parts, group, impl)


@every_group
def test_parts_on_disk(world: World, group: str, tmp_path: Path) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    world.run(shard_cases.on_disk, group, str(tmp_path))


@every_group
@pytest.mark.parametrize("kept", ["ram", "disk"])
def test_saved_and_loaded(world: World, group: str, kept: str, tmp_path: Path) -> None:
    if kept == "disk":
        pytest.importorskip("lance", reason="the extra `store` is not installed")
    pytest.importorskip("safetensors", reason="the extra `files` is not installed")
    world.run(shard_cases.saved_and_loaded, group, str(tmp_path), kept == "disk")


@every_group
def test_fetched(world: World, group: str) -> None:
    world.run(shard_cases.fetched_chunks, group)


def test_bytes_are_the_formula_whatever_the_chunks_and_the_ranks(world: World) -> None:
    answers = [
        answer
        for group in GROUPS
        for chunk_size in (2, 32)
        for answer in world.run(shard_cases.bytes_are_the_formula, group, chunk_size)
    ]
    forward = [[messages[:3] for messages in answer] for answer in answers]
    assert all(messages == forward[0] for messages in forward)


@every_group
def test_mismatched_arguments_are_named_on_all_ranks(world: World, group: str) -> None:
    world.run(shard_cases.mismatches_are_named, group)


@every_group
def test_ranks_that_drift_apart_hear_of_it(world: World, group: str) -> None:
    world.run(shard_cases.drifting_apart_is_noticed, group)


@every_group
def test_parts_of_different_moments_are_refused(world: World, group: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="the extra `files` is not installed")
    world.run(shard_cases.parts_of_different_moments, group, str(tmp_path))


def test_parts_on_disk_that_moved_on_are_refused(world: World, tmp_path: Path) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    world.run(shard_cases.parts_that_moved_on, "two", str(tmp_path))


@every_group
@pytest.mark.parametrize("others", GROUPS)
def test_another_number_of_ranks_loads(
    world: World, group: str, others: str, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors", reason="the extra `files` is not installed")
    world.run(shard_cases.saved_by_some, group, str(tmp_path))
    world.run(shard_cases.loaded_by_others, others, str(tmp_path), len(GROUPS[group]))


@pytest.fixture
def losing(tmp_path: Any) -> Iterator[World]:
    # Groups of their own, since each is of no use once a rank is lost.
    every = [0, 1, 2]
    world = World(3, tmp_path, dict.fromkeys(["backward", "fails", "hangs", "dies"], every))
    yield world
    *survivors, killed = world.close()
    assert survivors == [0, 0]
    assert killed == -9


def test_a_lost_rank_ends_in_an_error_in_time(losing: World) -> None:
    errors = losing.run(shard_cases.a_rank_does_not_go_back, "backward", TIMEOUT)
    for rank, error in enumerate(errors[:2]):
        assert error.startswith(f"all_reduce of gradients: rank {rank} of 3 did not"), error
    losing.run(shard_cases.an_error_between_exchanges, "fails")
    for how in ("hangs", "dies"):
        for rank, (seconds, error) in enumerate(
            losing.run(shard_cases.a_rank_is_lost, how, how, TIMEOUT)[:2]
        ):
            assert seconds < TIMEOUT + 1
            assert error.startswith(f"all_gather of the header: rank {rank} of 3 did not"), error
            assert "within 2 s, or one of them is gone" in error


@pytest.mark.parametrize("absent", [0.0, 0.3])
def test_the_best_of_many_lists(absent: float) -> None:
    """Against sorting by hand, with many ties; lists as ranks send them, and k of any size."""
    for _ in range(100):
        ranks, width = (int(torch.randint(1, most, ())) for most in (12, 5))
        k = int(torch.randint(1, ranks * width + 1, ()))
        scores = torch.randint(-2, 3, (2, 3, ranks, width)).double()
        scores[torch.rand_like(scores) < 0.1] = -torch.inf
        numbers = torch.stack([torch.randperm(ranks * width) for _ in range(6)]).view(scores.shape)
        missing = torch.rand_like(scores) < absent
        scores, numbers = scores.masked_fill(missing, -torch.inf), numbers.masked_fill(missing, -1)
        places = where_best(scores, width, numbers)
        scores, numbers = scores.gather(3, places), numbers.gather(3, places)
        best = choose(scores, numbers, k).flatten(0, 1).tolist()
        pairs = zip(scores.view(6, -1).tolist(), numbers.view(6, -1).tolist(), best, strict=True)
        for score, number, got in pairs:
            there = [i for i, chunk in enumerate(number) if chunk >= 0]
            expected = sorted(there, key=lambda i: (-score[i], number[i]))[:k]
            assert got[: len(expected)] == expected
            assert all(number[i] < 0 for i in got[len(expected) :])
            assert len(set(got)) == k


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="^group: expected torch.distributed to be initialised"):
        ShardedMemory(ChunkedMemory.empty(1, 2, 3, 4))


def test_a_memory_does_not_keep_its_group_alive(tmp_path: Any) -> None:
    """A process whose group outlives `destroy_process_group` may abort when it ends."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        memory = ShardedMemory(ChunkedMemory.empty(1, 2, 3, 4)).append(torch.ones(1, 7, 4))
        query = torch.ones(1, 1, 4, requires_grad=True)
        context = recall(query, query[:, :, None], memory, 1)
    finally:
        dist.destroy_process_group()
    gone = "^the process group of this memory was destroyed$"
    with pytest.raises(ShardError, match=gone):
        recall(query, query[:, :, None], memory, 1)
    with pytest.raises(ShardError, match=gone):
        context.sum().backward()


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), True, "1"])
def test_timeout(timeout: Any, tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="^timeout: expected seconds > 0, got "):
            ShardedMemory(ChunkedMemory.empty(1, 2, 3, 4), timeout=timeout)
        with pytest.raises(ValueError, match="^group: expected one that this process belongs to"):
            ShardedMemory(ChunkedMemory.empty(1, 2, 3, 4), group=3)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError,
            match="^local: expected a ChunkedMemory or another ScoredHome or ExactHome, got Tensor",
        ):
            ShardedMemory(torch.zeros(1, 2, 3, 4))  # type: ignore[arg-type]
        alone = ShardedMemory(ChunkedMemory.empty(1, 2, 3, 4)).append(torch.ones(1, 7, 4))
        assert alone.local.valid.all()
    finally:
        dist.destroy_process_group()
