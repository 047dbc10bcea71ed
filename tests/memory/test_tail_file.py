"""The file of a tail: whatever happened to it, its entries are read, put right, or told as lost."""

import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from htm_pytorch.memory import tail
from htm_pytorch.memory.formats import Format
from htm_pytorch.memory.log import Head, Record
from htm_pytorch.memory.one_bit import put_right
from htm_pytorch.memory.tail import Entry, Tail, TailError, make

FORM = Format(2, 4, torch.float32)

# One flipped bit.


@pytest.mark.parametrize("length", [0, 1, 2, 5, 44, 300])
def test_every_flipped_bit_is_put_right(length: int) -> None:
    data = random.Random(length).randbytes(length)
    checksum = zlib.crc32(data)
    assert put_right(data, checksum) == data
    for bit in range(8 * length):
        assert put_right(flipped(data, bit), checksum) == data
    for bit in range(32):
        assert put_right(data, checksum ^ 1 << bit) == data


def test_more_flipped_bits_are_not_put_right() -> None:
    draw = random.Random(0)
    data = draw.randbytes(200)
    for _ in range(200):
        places = draw.sample(range(1600), draw.randint(2, 9))
        found = data
        for bit in places:
            found = flipped(found, bit)
        assert put_right(found, zlib.crc32(data)) in (None, data)


def flipped(data: bytes, bit: int) -> bytes:
    found = bytearray(data)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


# The file.


def entries_of(lengths: list[int], first: int = 1) -> list[Entry]:
    head, found, at = Head.first(FORM), [], 0
    for number, length in enumerate(lengths, first):
        steps = random.Random(number).randbytes(8 * length)
        record = Record(at, 0, (), (float(number),), ("a key",), False, steps)
        at += length
        head = head._replace(sequence=number, steps=at)
        found.append(Entry.of(head, record))
    return found


def written(folder: Path, entries: list[Entry]) -> Tail:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = make(folder, sync=False)
    made.follow(entries[0].sequence - 1 if entries else 0)
    for entry in entries:
        made.append(entry, sync=False)
    return made


def read(path: Path, after: int = 0) -> Tail:
    found = Tail(path)
    found.follow(after)
    return found


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tail") / "m" / "tails"


@given(lengths=lengths, share=st.floats(0, 1))
def test_a_file_cut_anywhere_has_the_entries_before(
    place: Path, lengths: list[int], share: float
) -> None:
    entries = entries_of(lengths)
    path = written(place, entries).path
    whole = path.read_bytes()
    ends = [
        len(whole) - sum(len(tail.encoded(path.name, e)) for e in entries[n:]) for n in range(9)
    ]
    cut = ends[0] + round(share * (len(whole) - ends[0]))
    path.write_bytes(whole[:cut])
    found = read(path)
    count = sum(end <= cut for end in ends[1:])
    assert found.entries == entries[:count]
    assert found.is_torn == (cut != ends[count])
    assert not found.is_put_right


@given(lengths=lengths, share=st.floats(0, 1, exclude_max=True), after=st.integers(0, 4))
def test_one_flipped_bit_anywhere_is_put_right(
    place: Path, lengths: list[int], share: float, after: int
) -> None:
    entries = entries_of(lengths)
    path = written(place, entries).path
    whole = path.read_bytes()
    path.write_bytes(flipped(whole, int(share * 8 * len(whole))))
    found = read(path, after)
    assert found.entries == entries[after:]
    assert found.is_put_right or after
    assert found.end == len(whole) and not found.is_torn
    assert [e for e in tail.salvaged(place, "") if e.sequence > after] == entries[after:]


@given(
    lengths=lengths,
    start=st.floats(0, 1),
    fill=st.one_of(st.just(b"\0"), st.binary(min_size=1, max_size=9)),
    more=st.integers(0, 300),
)
def test_an_end_that_was_not_written_is_torn(
    place: Path, lengths: list[int], start: float, fill: bytes, more: int
) -> None:
    """Whatever the disk has in its stead."""
    entries = entries_of(lengths)
    path = written(place, entries).path
    whole = path.read_bytes()
    last = len(tail.encoded(path.name, entries[-1]))
    at = len(whole) - last + round(start * last)
    size = len(whole) - at + more
    path.write_bytes(whole[:at] + (fill * size)[:size])
    found = read(path)
    assert found.entries[: len(entries) - 1] == entries[:-1]
    # Unless what is there happens to be what was written.
    assert found.entries in (entries, entries[:-1])
    assert len(found.entries) == len(entries) or found.is_torn


@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 2**32))
def test_damage_before_the_last_entry_is_told(place: Path, lengths: list[int], seed: int) -> None:
    entries = entries_of(lengths)
    path = written(place, entries).path
    draw, whole = random.Random(seed), path.read_bytes()
    last = len(whole) - len(tail.encoded(path.name, entries[-1]))
    end = len(whole) - sum(len(tail.encoded(path.name, entry)) for entry in entries)
    at = draw.randrange(end, last - 8)
    changed = bytes(byte ^ draw.randrange(1, 256) for byte in whole[at : at + 8])
    path.write_bytes(whole[:at] + changed + whole[at + 8 :])
    with pytest.raises(TailError, match=f"{path.name}.* is damaged .*; `htm memory repair`"):
        read(path)
    assert entries[-1] in tail.salvaged(place, "")
    assert all(entry in entries for entry in tail.salvaged(place, path.name))
    # Two entries at most are touched by 8 bytes.
    assert len(tail.salvaged(place, "")) >= len(entries) - 2


def test_entries_that_were_taken_over_do_not_count(place: Path) -> None:
    entries = entries_of([1, 2, 3, 4])
    del entries[1]
    path = written(place, entries).path
    assert read(path, 2).entries == entries[1:]
    assert read(path, 3).entries == entries[2:]
    assert read(path, 9).entries == []
    # One is missing.
    with pytest.raises(TailError, match="goes on at change 3, not 2; `htm memory repair`"):
        read(path, 0)
    follower = read(path, 3)
    follower.follow(2)
    assert follower.entries == entries[1:]
    follower.follow(4)
    assert follower.entries == []


def test_an_entry_of_another_file_is_none(place: Path) -> None:
    entries = entries_of([1, 2])
    first = written(place, entries[:1]).path.read_bytes()
    path = written(place, entries[:1]).path
    path.write_bytes(first)
    with pytest.raises(TailError, match="damaged at byte 0"):
        read(path)
