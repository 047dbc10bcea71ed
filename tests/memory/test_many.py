"""Many small memories in one folder: each is a memory of its own, and rows read their own."""

import contextlib
import copy
import os
import pickle
import sqlite3
from pathlib import Path

import pytest
import torch
from torch import Tensor

from htm_pytorch import ChunkedMemory, HTMAttention, memory
from htm_pytorch.memory import MemoryFileError, many

pytest.importorskip("lance", reason="the extra `store` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, DIM = 4, 8


def make(path: Path, **options: object) -> memory.Memories:
    return memory.open_many(path, dim=DIM, chunk_size=SIZE, sync=False, **options)  # type: ignore[arg-type]


def filled(users: memory.Memories, count: int) -> dict[str, Tensor]:
    steps = {f"user {n}": torch.randn(1, 1 + 7 * n % 30, DIM) for n in range(count)}
    for name, of_user in steps.items():
        users.open(name).append(of_user)
    return steps


def test_each_row_of_queries_reads_its_own(tmp_path: Path) -> None:
    layer = HTMAttention(DIM, heads=2, dim_head=4, topk_mems=3)
    with make(tmp_path / "m") as users:
        steps = filled(users, 12)
        names = ["user 3", "user 0", "user 11", "user 3"]
        queries = torch.randn(4, 5, DIM, requires_grad=True)
        out = layer(queries, users.rows(names))
        (found,) = torch.autograd.grad(out.square().sum(), queries)
        for row, name in enumerate(names):
            of_user = steps[name][:, : steps[name].shape[1] // SIZE * SIZE]
            one = queries[row : row + 1].detach().requires_grad_()
            expected = layer(one, ChunkedMemory.from_steps(of_user, SIZE))
            (gradient,) = torch.autograd.grad(expected.square().sum(), one)
            torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[row : row + 1], gradient, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="memories: expected batch"):
            layer(torch.randn(3, 5, DIM), users.rows(names))


def test_they_stay_apart_and_are_there_again(tmp_path: Path) -> None:
    with make(tmp_path / "m") as users:
        steps = filled(users, 9)
        pair = torch.randn(2, 6, DIM)
        users.append(["user 1", "new"], pair, keys="together")
        steps["user 1"], steps["new"] = torch.cat([steps["user 1"], pair[:1]], 1), pair[1:]
        assert users["new"].spans(torch.tensor([0]))[0].keys == ("together",) * SIZE
    with memory.open_many(tmp_path / "m") as users:
        assert users.names() == sorted(steps)
        for name, of_user in steps.items():
            assert torch.equal(users[name].read(0, of_user.shape[1]), of_user)
        assert users.verify() == []
        assert "user 1" in users
        assert "nobody" not in users
        with pytest.raises(KeyError, match="no such memory"):
            users["nobody"]


def test_of_a_row_that_fails_none_is_stored(tmp_path: Path) -> None:
    with make(tmp_path / "m") as users:
        users.append(["a", "b"], torch.ones(2, 3, DIM))
        steps = torch.ones(2, 3, DIM)
        steps[1, 2] = torch.nan
        with pytest.raises(ValueError, match="steps: expected finite numbers"):
            users.append(["a", "b"], steps)
        assert [users[name].steps for name in "ab"] == [3, 3]
        users.append(["a", "b"], torch.ones(2, 3, DIM))
        with pytest.raises(ValueError, match="names: expected different ones"):
            users.append(["a", "a"], torch.ones(2, 3, DIM))
    with memory.open_many(tmp_path / "m", read_only=True) as users:
        assert [users[name].steps for name in "ab"] == [6, 6]


def test_one_of_them_is_forgotten_or_removed(tmp_path: Path) -> None:
    secret = torch.randn(1, 30, DIM)
    with make(tmp_path / "m") as users:
        filled(users, 4)
        users.open("left").append(secret, torch.arange(30)[None] % 7 == 0)
        users.open("gone").append(secret)
        users["left"].forget(episodes=[1, 3], before_step=2)
        users.remove("gone")
        assert "gone" not in users
        users.compact()
        held = users["left"]
        numbers = [n for n in range(2, 30) if n // 7 not in (1, 3)]
        spans = held.spans(torch.arange(held.chunks))
        found = [n for s in spans for n in range(s.first_step, s.first_step + s.count)]
        assert found == [n for n in numbers if n < 28]
        for span in spans:
            part = held.read(span.first_step, span.first_step + span.count)
            assert torch.equal(part, secret[:, span.first_step : span.first_step + span.count])
    data = b"".join(path.read_bytes() for path in (tmp_path / "m").iterdir())
    for step in range(30):
        assert (secret[0, step].numpy().tobytes() in data) == (step in numbers)
    with memory.open_many(tmp_path / "m") as users:
        again = users["left"]
        assert again.spans(torch.arange(again.chunks)) == spans


def test_a_reader_follows(tmp_path: Path) -> None:
    with make(tmp_path / "m") as users:
        filled(users, 3)
        reader = memory.open_many(tmp_path / "m", read_only=True)
        seen = reader["user 2"].steps
        users["user 2"].append(torch.ones(1, 5, DIM))
        users.open("late").append(torch.ones(1, 5, DIM))
        assert reader["user 2"].steps == seen
        assert reader.refresh()["user 2"].steps == seen + 5
        assert reader["late"].steps == 5
        with pytest.raises(ValueError, match="open for reading only"):
            reader.append(["late"], torch.ones(1, 5, DIM))
        with pytest.raises(BlockingIOError, match="open for writing already"):
            make(tmp_path / "m")
        for copied in (copy.copy(reader), pickle.loads(pickle.dumps(reader))):
            assert copied.names() == users.names()
        assert copy.copy(reader["late"]).steps == 5
        with pytest.raises(TypeError, match="open for writing"):
            copy.copy(users)


@pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning")
def test_in_a_forked_child_they_are_read(tmp_path: Path) -> None:
    with make(tmp_path / "m") as users:
        filled(users, 3)
        users.open("a").append(torch.ones(1, 5, DIM))
        out, into = os.pipe()
        child = os.fork() if hasattr(os, "fork") else pytest.skip("no fork here")
        if child == 0:
            try:
                users["a"].append(torch.ones(1, 5, DIM))
                os.write(into, b"appended")
            except ValueError:
                os.write(into, str(users["a"].steps).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(out, 100) == b"5"
        assert users["a"].append(torch.ones(1, 2, DIM)).steps == 7


def test_more_of_them_than_stay_in_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "MOST_LOADED", 3)
    with make(tmp_path / "m") as users:
        steps = filled(users, 20)
        assert users.info()["memories in RAM"] == 3
        assert len(users) == len(steps) == 20
        kept = users["user 5"]
        filled_again = [users[name] for name in steps]
        assert users["user 5"] is kept
        assert filled_again[5] is kept


def test_a_damaged_one_of_many_is_removed(tmp_path: Path) -> None:
    with make(tmp_path / "many") as users:
        steps = filled(users, 3)
    journal = sqlite3.connect(tmp_path / "many" / "journal")
    query = "UPDATE records SET body = zeroblob(length(body)) WHERE name = ?"
    with contextlib.closing(journal), journal:
        journal.execute(query, ("user 1",))
    with make(tmp_path / "many") as users:
        (problem,) = users.verify()
        assert "memory 'user 1': the record of step 0 is damaged" in problem
        assert "`htm memory repair`" in problem
        with pytest.raises(MemoryFileError, match="memory 'user 1'"):
            users["user 1"]
        users.remove("user 1")
        assert users.verify() == []
        assert users.names() == [name for name in steps if name != "user 1"]
        with pytest.raises(KeyError, match="no such memory"):
            users.remove("user 1")


def test_one_memory_and_many_are_not_taken_for_each_other(tmp_path: Path) -> None:
    make(tmp_path / "many").close()
    memory.open(tmp_path / "one", dim=DIM).close()
    with pytest.raises(MemoryFileError, match="of many memories: memory.open_many opens it"):
        memory.open(tmp_path / "many")
    with pytest.raises(MemoryFileError, match="is one memory: memory.open opens it"):
        memory.open_many(tmp_path / "one")
    with pytest.raises(ValueError, match="dim: expected 8"):
        memory.open_many(tmp_path / "many", dim=9)
    with pytest.raises(ValueError, match="expected a folder for many memories"):
        memory.open_many("s3://bucket/many", dim=9)
    with pytest.raises(FileNotFoundError):
        memory.open_many(tmp_path / "none")
    with make(tmp_path / "many") as users, pytest.raises(ValueError, match="has no table"):
        users.open("a").build_index()


def test_a_reader_lets_go_of_what_was_removed(tmp_path: Path) -> None:
    with make(tmp_path / "m") as users:
        users.append(["ada", "bob"], torch.ones(2, 4, DIM))
        with memory.open_many(tmp_path / "m", read_only=True) as reader:
            held = reader["ada"]
            assert reader["bob"].steps == held.steps == 4
            users.remove("ada")
            users.append(["bob"], torch.ones(1, 2, DIM))
            assert reader.refresh()["bob"].steps == 6
            assert reader.names() == ["bob"] and "ada" not in reader
            with pytest.raises(KeyError, match="no such memory"):
                reader["ada"]
            with pytest.raises(MemoryFileError, match="its writer has removed it"):
                held.refresh()
            users.append(["ada"], 2 * torch.ones(1, 5, DIM))
            assert torch.equal(reader.refresh()["ada"].read(0, 5), 2 * torch.ones(1, 5, DIM))


def test_what_is_refused_makes_no_memory(tmp_path: Path) -> None:
    good = torch.ones(2, 3, DIM)
    with make(tmp_path / "m") as users:
        users.append(["old"], good[:1])
        for names, steps, keys in (
            (["old", "new"], good * torch.nan, None),
            (["old", "new"], good.double(), None),
            (["old", "new"], good.to_sparse(), None),
            (["old", "new"], good, ["a"]),
            (["new", ""], good, None),
            (["new", 3], good, None),
        ):
            with pytest.raises(ValueError, match=r"^(steps|keys|name): expected"):
                users.append(names, steps, keys=keys)  # type: ignore[arg-type]
            assert users.names() == ["old"] and users["old"].steps == 3
        users.append(["new", "none"], good[:, :0])
        assert users.names() == ["new", "none", "old"]
        users.append(["new", "newer", "old"], torch.cat([good, good[:1]]), keys="k")
        assert [users[name].steps for name in ("new", "newer", "old")] == [3, 3, 6]
    with memory.open_many(tmp_path / "m") as users:
        assert [users[name].steps for name in ("new", "newer", "none", "old")] == [3, 3, 0, 6]
        assert users.verify() == []


def test_one_that_was_closed_is_opened_again(tmp_path: Path) -> None:
    with make(tmp_path / "m") as users:
        with users.open("ada") as ada:
            ada.append(torch.ones(1, 3, DIM))
        told = r"it was closed\); memory.open_many\(uri\).open\(name\) opens it for writing"
        with pytest.raises(ValueError, match=told):
            ada.append(torch.ones(1, 3, DIM))
        assert users.open("ada").append(torch.ones(1, 3, DIM)).steps == 6
        assert users.append(["ada"], torch.ones(1, 1, DIM))["ada"].steps == 7
        with pytest.raises(
            TypeError, match=r"memory.open_many\(uri, read_only=True\).open\(name\)"
        ):
            pickle.dumps(users["ada"])


@pytest.mark.parametrize("uri", [None, 3, b"m"])
def test_no_place_is_refused_by_name(uri: object) -> None:
    for way in (memory.open_many, memory.open, memory.repair):
        with pytest.raises(ValueError, match="uri: expected a str or a path, got"):
            way(uri)  # type: ignore[arg-type]
