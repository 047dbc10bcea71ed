"""The command line: what it offers, what it prints last, and how it fails."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import htm_pytorch
from htm_pytorch import cli, kernels, memory
from htm_pytorch.check import CheckConfig
from htm_pytorch.ops import blocked
from htm_pytorch.rl import TrainConfig
from tests.command_line import assert_line, htm

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    "--dim=16",
    "--heads=2",
    "--num-envs=8",
    "--minibatches=2",
    "--frames=700",
    "--eval-episodes=8",
]

SMALL = ["--queries=5", "--steps=50", "--dim=16", "--heads=2", "--dim-head=8", "--topk-mems=2"]


def htm_process(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from htm_pytorch.cli import main; main()", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_names_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert htm(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: htm ")
    assert all(f"\n  {command} " in printed for command in cli.COMMANDS)
    assert htm(monkeypatch) == 0
    assert capsys.readouterr().out == printed


def test_every_command_is_a_file_and_every_file_a_command() -> None:
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(cli.COMMANDS) == files


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert htm(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"htm_pytorch {htm_pytorch.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["trian"], "did you mean `htm train`?"),
        (["memory", "inof", "x"], "did you mean `htm memory info`?"),
        (["frobnicate"], "`htm --help` lists those there are"),
    ],
    ids=str,
)
def test_an_unknown_command_is_refused_and_the_nearest_named(
    arguments: list[str],
    meant: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert htm(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no command" in printed.err and printed.err.endswith(f"; {meant}\n")


def test_a_memory_command_alone_prints_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert htm(monkeypatch, "memory") == 0
    assert "verify" in capsys.readouterr().out


@pytest.mark.parametrize("env", [[], ["ballet"], ["CartPole-v1"]], ids=str)
def test_help_of_train_lists_the_options_in_two_screens(
    env: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert htm(monkeypatch, "train", *env, "--help") == 0
    printed = capsys.readouterr().out
    hidden = {"env", "task"}
    on = {"normalize_advantages", "recency"}
    for name in set(TrainConfig().options()) - hidden:
        name = f"no_{name}" if name in on else name
        assert f"--{name.replace('_', '-')}" in printed.split()
    assert "htm train ballet --run-dir" in printed
    assert len(printed.splitlines()) < 160


def test_help_of_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert htm(monkeypatch, "eval", "--help") == 0
    printed = capsys.readouterr().out.split()
    assert {"PATH", "--episodes", "--seed", "--actions", "--render"} <= set(printed)


def test_help_needs_neither_torch_nor_gymnasium() -> None:
    helps = (["train"], ["train", "ballet"], ["eval"], ["check"], ["memory"], ["memory", "info"])
    for arguments in ([], ["--version"], *([*words, "--help"] for words in helps)):
        code = (
            f"import sys; sys.argv = ['htm', *{arguments}]\n"
            "from htm_pytorch.cli import main\n"
            "try:\n    main()\nexcept SystemExit:\n"
            "    pass\n"
            "print('loaded', {'torch', 'gymnasium'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "loaded set()", done.stderr


def test_help_of_check_lists_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert htm(monkeypatch, "check", "--help") == 0
    printed = capsys.readouterr().out.split()
    on = {"add_pos_enc", "detach_memories"}
    for field in dataclasses.fields(CheckConfig):
        name = f"no_{field.name}" if field.name in on else field.name
        assert f"--{name.replace('_', '-')}" in printed


def test_what_check_takes_is_told_without_torch() -> None:
    code = "import sys; import htm_pytorch.check as c; c.CheckConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_check_prints_a_table_and_exits_by_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", "--impl=blocked", "--masked", "--no-detach-memories", *SMALL]
    assert htm(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("blocked, float32 on cpu, torch ")
    assert lines[1] == (
        "1 x 5 queries, 50 steps, dim 16, 2 heads of 8, 2 chunks of 32, "
        "masked, gradients into the memory"
    )
    quantities = ["output", "gradient of queries", "gradient of memories"]
    assert [line.split("  ")[0] for line in lines[4:7]] == quantities
    assert all(line.endswith("  yes") for line in lines[4:-2])
    assert lines[-1] == "passed"

    right = blocked.recall

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        context, *rest = right(*arguments)
        return context * 1.001, *rest

    monkeypatch.setattr(blocked, "recall", wrong)
    assert htm(monkeypatch, *arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].startswith("output ") and lines[4].endswith("  NO")
    assert lines[-1] == "FAILED"


def test_train_then_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The last line says how well it did and where the picture is; eval repeats it."""
    run_dir = tmp_path / "run"
    assert htm(monkeypatch, "train", "ballet", f"--run-dir={run_dir}", *TINY) == 0
    sizes, trained, line = capsys.readouterr().out.splitlines()
    ended = r"trained on [\d,]+ frames in \d+ rollouts; --frames 700 ends with a whole one"
    assert re.fullmatch(ended, trained)
    assert re.fullmatch(r"memory htm: [\d,]+ parameters \(1.00 of htm's\)", sizes)
    assert re.match(r"return [01]\.\d+ \+- .* in 8 unseen episodes of .* steps, greedy; ", line)
    picture = run_dir / "recall.png"
    assert line.endswith(f"what it recalled: {picture}") and picture.is_file()

    picture.unlink()
    assert htm(monkeypatch, "eval", run_dir) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"{first}; {second}" == line
    assert picture.is_file()

    wrong = htm(monkeypatch, "train", "ballet", f"--run-dir={run_dir}", *TINY)
    assert_line(capsys, wrong, "already holds a run")
    wrong = htm(
        monkeypatch, "train", "ballet", f"--run-dir={run_dir}", "--resume", *TINY, "--seed=1"
    )
    assert_line(capsys, wrong, "another config, seed is 0 there, got 1; pass the options")
    checkpoint = run_dir / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert_line(capsys, htm(monkeypatch, "eval", run_dir), "is truncated or not", 1)


def test_a_training_that_resumes_says_where_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = [f"--run-dir={run_dir}", "--memory=gru", "--steps=16", "--resume", *TINY]
    for more, beginning in (
        ([], f"no checkpoint.safetensors in {run_dir} yet, so the training begins anew"),
        ([], "goes on after 768 frames"),
        (["--frames=800"], "goes on after 768 frames, frames 800 instead of 700"),
    ):
        assert htm(monkeypatch, "train", "CartPole-v1", *options, *more) == 0
        _, told, trained, _ = capsys.readouterr().out.splitlines()
        assert told == beginning
        # Of 8 environments and 16 steps each.
        rollouts, asked = (7, 800) if more else (6, 700)
        assert trained.startswith(f"trained on {rollouts * 128} frames in {rollouts} rollouts; ")
        assert f"--frames {asked} " in trained


def test_several_seeds_have_a_mean_and_a_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [f"--run-dir={tmp_path}/run", "--seeds=2", "--memory=gru", "--steps=16", *TINY]
    assert htm(monkeypatch, "train", "CartPole-v1", *options) == 0
    *_, first, _, _, second, line = capsys.readouterr().out.splitlines()
    means = [float(one.split()[1]) for one in (first, second)]
    mean, spread = float(line.split()[1]), float(line.split()[3].rstrip(","))
    assert mean == pytest.approx(sum(means) / 2, abs=1e-3)
    assert spread == pytest.approx(abs(means[0] - means[1]) / 2**0.5, abs=1e-3)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"seed-0", "seed-1"}
    shutil.rmtree(tmp_path / "run/seed-0")
    assert_line(capsys, htm(monkeypatch, "train", "CartPole-v1", *options), "run_dir: ")
    assert not (tmp_path / "run/seed-0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "env: expected `htm train ENV [options]`"),
        (["train", "ballet", "--heads=3"], "heads: expected a divisor of dim = 64, got 3"),
        (["train", "ballet", "--run-dir={tmp}/run", "--seed=99999999999999999999"], "seed: "),
        (["train", "ballet", "--run-dir={tmp}/run", "--mem-chunks=10000000000"], "mem_chunks: "),
        (["train", "ballet", "--run-dir={tmp}/run", "--env-args", "num_dancers=9"], "env_args: "),
        (["train", "Nothing-v0", "--run-dir={tmp}/run"], "env: expected the id"),
        (["train", "ballet", "--run-dir={tmp}/run", "--observe", "sounds"], "observe: "),
        (["train", "ballet", "--run-dir={tmp}/run", "--device=abacus"], "device: "),
        (["train", "ballet", "--run-dir={tmp}/run", "--processes=3"], "processes: "),
        (["train", "ballet", "--run-dir={tmp}/run", "--seeds=2", "--processes=2"], "seeds: "),
        (["train", "ballet", "--run-dir={tmp}/file/run"], "run_dir: expected a folder"),
        (["train", "ballet", "--run-dir={tmp}/file"], "run_dir: expected a folder"),
        (["eval", "{tmp}/nothing"], "run_dir: expected a run"),
        (["check", "--steps=0"], "steps: expected an integer >= 1, got 0"),
        (["check", "--device=abacus"], "device: expected one of this machine that knows float64"),
        (["train", "ballet", "--run-dir", ""], "run-dir: expected something, got nothing in '--ru"),
        (["train", "ballet", "--init-from="], "init-from: expected something, got nothing in 'ba"),
        (
            ["train", ""],
            "train: expected something, got nothing in 'train' ''; is a shell variable",
        ),
        (["eval", ""], "eval: expected something, got nothing in 'eval' ''"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("not a run")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    assert_line(capsys, htm(monkeypatch, *filled), message)
    assert (tmp_path / "file").read_text() == "not a run"
    assert not (tmp_path / "run").exists()


MODULE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Lazy(CartPoleEnv):
    def step(self, action):
        import nothing_like_it

gymnasium.register("Own-v0", entry_point=CartPoleEnv, max_episode_steps=20)
gymnasium.register("Lazy-v0", entry_point=Lazy)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_module_in_the_current_folder_is_found(processes: int, tmp_path: Path) -> None:
    """As the console script is called, whose folder is first on the path, not the current."""
    (tmp_path / "ownworld.py").write_text(MODULE)
    code = "import sys; sys.path[:1] = []; from htm_pytorch.cli import main; main()"
    for arguments in (
        ["train", "ownworld:Own-v0", "--run-dir=run", *TINY, f"--processes={processes}"],
        ["eval", "run"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        assert "unseen episodes" in done.stdout


def test_a_package_that_the_environment_lacks_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazyworld.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["htm", "train", "lazyworld:Lazy-v0", *TINY])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):
        cli.main()


def test_a_failed_process_prints_one_line_and_no_traceback() -> None:
    done = htm_process("train", "ballet", "--num-envs=7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "htm: minibatches: expected a divisor of num_envs = 7, got 4\n"


def test_a_memory_is_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    place = tmp_path / "life"
    with memory.open(place, dim=8, chunk_size=2, sync=False) as life:
        life.append(torch.randn(1, 601, 8))
    assert htm(monkeypatch, "memory", "verify", place) == 0
    assert capsys.readouterr().out == "300 chunks are as they were stored\n"
    for action, indexed in (("compact", 0), ("index", 300), ("info", 300)):
        assert htm(monkeypatch, "memory", action, place) == 0
        told = capsys.readouterr().out
        assert ("finds 100.0%" in told) == (action == "index")
        assert re.search(rf"^chunks in the index +{indexed}$", told, re.MULTILINE)
    assert htm(monkeypatch, "memory", "info", place, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["chunks"], told["chunks in the index"]) == (601, 300, 300)
    assert 601 * 8 * 4 < told["bytes of the table"] < 100 * 601 * 8
    assert_line(capsys, htm(monkeypatch, "memory", "info", tmp_path / "none"), "uri: no memory at")


@pytest.mark.parametrize(
    "command", [["info"], ["verify"], ["compact"], ["index"], ["repair"], ["show", "--chunk=0"]]
)
def test_a_path_to_something_else_is_a_wrong_argument(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    pytest.importorskip("lance")
    file = tmp_path / "file.txt"
    file.write_text("no memory")
    told = "uri: expected the folder of a memory, got "
    name, *options = command
    for place, what in ((file, "the file "), (tmp_path, f"'{tmp_path}' with other files")):
        assert_line(capsys, htm(monkeypatch, "memory", name, place, *options), told + what)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_memory_is_copied_shown_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    place = tmp_path / "life"
    with memory.open(place, dim=8, chunk_size=2, sync=False) as life:
        life.append(torch.ones(1, 7, 8), keys=[f"page {n}" for n in range(7)], times=1e9)
        # The writer goes on while a copy is made.
        assert htm(monkeypatch, "memory", "save", place, tmp_path / "copy") == 0
        life.append(torch.ones(1, 7, 8), times=2e9)
    assert "7 steps are in" in capsys.readouterr().out
    assert_line(capsys, htm(monkeypatch, "memory", "save", place, tmp_path / "copy"), "exists")
    assert htm(monkeypatch, "memory", "show", tmp_path / "copy", "--chunk=-1") == 0
    told = capsys.readouterr().out
    assert "chunk 2: steps 4 to 5, episode 0, 2001-09-09 01:46:40 to" in told
    assert "'page 5'  [1, 1, 1, 1, 1, 1, ...]" in told
    assert htm(monkeypatch, "memory", "show", tmp_path / "copy", "--chunk=2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["first_step"], shown["keys"]) == (4, ["page 4", "page 5"])
    assert shown["steps"] == [[1.0] * 8] * 2
    assert htm(monkeypatch, "memory", "verify", place, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"chunks": 7, "problems": []}
    told = "chunk: expected the number of one there is, from -7 to 6, got 9"
    assert_line(capsys, htm(monkeypatch, "memory", "show", place, "--chunk=9"), told)
    assert_line(
        capsys, htm(monkeypatch, "memory", "forget", place), "expected --episodes, --before"
    )
    assert htm(monkeypatch, "memory", "forget", place, "--before=1.5e9") == 0
    assert capsys.readouterr().out == "7 steps are forgotten; 7 are left\n"
    beyond = ["--before-step=99", "--episodes", "0", "5"]
    assert htm(monkeypatch, "memory", "forget", place, *beyond) == 0
    printed = capsys.readouterr()
    assert printed.out == "7 steps are forgotten; 0 are left\n"
    assert "--before-step 99 is beyond the end, the next step is number 14" in printed.err
    assert "no episodes [5]: there are 1, counted from 0" in printed.err
    told = "chunk: expected the number of one there is, none yet, got 0"
    assert_line(capsys, htm(monkeypatch, "memory", "show", place, "--chunk=0"), told)


def test_what_there_is_to_compact_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    place = tmp_path / "life"

    def told() -> dict[str, str]:
        assert htm(monkeypatch, "memory", "compact", place, "--dry-run") == 0
        lines = capsys.readouterr().out.splitlines()
        return dict(re.split(r" +(?=\S+$)", line) for line in lines)

    with memory.open(place, dim=8, chunk_size=2, sync=False) as life:
        life.append(torch.randn(1, 40, 8)).build_index()
        for _ in range(3):
            life.append(torch.randn(1, 40, 8)).flush()
        life.forget(before_step=3).append(torch.randn(1, 8, 8))
        # Beside its writer, and nothing is changed.
        before = life.info()
        first = told()
        assert life.info() == before
    assert first["chunks to move from the log"] == "4"
    # Which are not in the index yet.
    assert first["fragments to be joined"] == "3"
    assert first["chunks to be added to the index"] == "60"
    assert int(first["bytes that no reader of now needs"].replace(",", "")) > 1000
    assert first["forgotten and still in files"] == "True"
    # The second time those can be joined that the index has only since the first.
    for _ in range(2):
        assert htm(monkeypatch, "memory", "compact", place) == 0
        capsys.readouterr()
    after = told()
    assert int(after.pop("bytes that no reader of now needs").replace(",", "")) > 1000
    assert set(after.values()) == {"0", "False"}


def test_many_memories_are_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    place = tmp_path / "users"
    with memory.open_many(place, dim=8, chunk_size=2) as users:
        users.append(["ann", "bob"], torch.randn(2, 5, 8))
    assert htm(monkeypatch, "memory", "info", place) == 0
    assert re.search(r"^memories +2$", capsys.readouterr().out, re.MULTILINE)
    assert htm(monkeypatch, "memory", "verify", place, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"memories": 2, "problems": []}
    assert htm(monkeypatch, "memory", "show", place, "--name=ann", "--chunk=-1") == 0
    assert capsys.readouterr().out.startswith("chunk 1: steps 2 to 3")
    assert htm(monkeypatch, "memory", "forget", place, "--name=bob", "--before-step=2") == 0
    assert capsys.readouterr().out == "2 steps are forgotten; 3 are left\n"
    assert htm(monkeypatch, "memory", "save", place, tmp_path / "copy", "--name=bob") == 0
    with memory.open(tmp_path / "copy", read_only=True) as copy:
        assert (copy.steps, copy.next_step) == (3, 5)
    capsys.readouterr()
    with memory.open_many(place) as users:
        users.remove("ann")
    for options in (["--dry-run"], []):
        assert htm(monkeypatch, "memory", "compact", place, *options) == 0
        assert "bytes of the log" in capsys.readouterr().out
    assert b"ann" not in (place / "journal").read_bytes()

    for verb, more in (("index", []), ("save", [tmp_path / "b"]), ("show", ["--chunk=0"])):
        told = f"path: expected one memory, got '{place}' of many; --name takes one of 1 names"
        assert_line(capsys, htm(monkeypatch, "memory", verb, place, *more), told)
    told = "name: expected one of 1 names ('bob'), got 'eve'"
    assert_line(capsys, htm(monkeypatch, "memory", "info", place, "--name=eve"), told)
    told = "name: expected none, as "
    assert_line(capsys, htm(monkeypatch, "memory", "info", tmp_path / "copy", "--name=a"), told)


def test_a_damaged_memory_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    place = tmp_path / "life"
    with memory.open(place, dim=8, chunk_size=2, sync=False) as life:
        life.append(torch.randn(1, 601, 8)).flush()
    assert htm(monkeypatch, "memory", "repair", place) == 0
    assert capsys.readouterr().out == "nothing is damaged; it holds 601 steps\n"
    data = next((place / "chunks.lance" / "data").iterdir())
    stored = bytearray(data.read_bytes())
    stored[100] ^= 1
    data.write_bytes(stored)
    assert htm(monkeypatch, "memory", "verify", place) == 1
    assert "checksum is wrong; `htm memory repair`" in capsys.readouterr().out
    assert htm(monkeypatch, "memory", "verify", place, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1
    assert htm(monkeypatch, "memory", "repair", place) == 0
    told = capsys.readouterr().out
    assert "now it holds 599 steps" in told
    lost = re.search(r"^lost: steps (\d+) to (\d+)$", told, re.MULTILINE)
    assert lost is not None
    assert int(lost[2]) - int(lost[1]) == 1
    assert (place / "set-aside").is_dir()
    assert htm(monkeypatch, "memory", "verify", place) == 0


@pytest.mark.parametrize(
    "command",
    [
        *("train ballet", "eval run", "report run", "check", "memory", "memory info x", "info"),
        "completion bash",
    ],
)
def test_an_unknown_option_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert htm(monkeypatch, *command.split(), "--colour=red") == 2
    printed = capsys.readouterr()
    assert "colour" in printed.err and printed.out == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("dim: expected 8, got 9"), 2),
        (FileNotFoundError("uri: no memory at 'x'"), 2),
        (FileExistsError("path: 'x' exists"), 2),
        (FileNotFoundError(2, "No such file or directory", "x"), 1),
        (memory.MemoryFileError("path: 'x' is damaged"), 1),
        (BlockingIOError("uri: another process writes to 'x'"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_wrong_arguments_and_failures_have_different_statuses(
    error: Exception,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("htm_pytorch.cli.info.main", fails)
    assert_line(capsys, htm(monkeypatch, "info"), str(error), status)


def test_stopping_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import htm_pytorch.rl

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(htm_pytorch.rl, "train", stopped)
    assert htm(monkeypatch, "train", "ballet", f"--run-dir={tmp_path}/run") == 130
    assert "--resume goes on" in capsys.readouterr().err


def test_stopping_another_command_says_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("htm_pytorch.cli.info.main", stopped)
    assert htm(monkeypatch, "info") == 130
    assert capsys.readouterr().err == "htm: stopped\n"


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--debug", "check", "--steps=0"], ["check", "--steps=0", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["htm", *arguments])
        with pytest.raises(ValueError, match="steps: expected an integer"):
            cli.main()


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = [sys.executable, "-c", "from htm_pytorch.cli import main; main()", "info", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(100)) == (b"", 141)


@pytest.mark.parametrize("columns", [1, 6, 39])
def test_help_fits_any_terminal(columns: int) -> None:
    command = [sys.executable, "-m", "htm_pytorch", "memory", "--help"]
    there = os.environ | {"COLUMNS": str(columns)}
    done = subprocess.run(command, env=there, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0 and "repair" in done.stdout


def test_letters_that_the_output_has_not_are_spelled() -> None:
    command = [sys.executable, "-m", "htm_pytorch", "memory", "--help"]
    there = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=there, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0 and "set the rest aside" in " ".join(done.stdout.split())


def test_without_any_output_it_does_its_work() -> None:
    command = f"{sys.executable} -m htm_pytorch info >&- 2>&-"
    assert subprocess.run(command, shell=True, timeout=100).returncode == 0


def test_no_index_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    memory.open(tmp_path / "m", dim=8, sync=False).close()
    status = htm(monkeypatch, "memory", "index", tmp_path / "m")
    assert_line(capsys, status, "path: expected a memory with chunks, got")


def test_many_damaged_memories_are_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lance", reason="the extra `store` is not installed")
    with memory.open_many(tmp_path / "m", dim=8, chunk_size=2, sync=False) as users:
        for _ in range(2):
            users.append(["ada", "alan"], torch.randn(2, 5, 8))
        last = users["ada"].read(9, 10)[0, 0].numpy().tobytes()
    journal = tmp_path / "m" / "journal"
    stored = bytearray(journal.read_bytes())
    stored[stored.index(last)] ^= 1
    journal.write_bytes(stored)
    assert htm(monkeypatch, "memory", "verify", tmp_path / "m") == 1
    assert "`htm memory repair`" in capsys.readouterr().out
    assert htm(monkeypatch, "memory", "repair", tmp_path / "m") == 0
    told = capsys.readouterr().out
    assert "now it holds 15 steps" in told
    assert "lost: steps 5 to 9 of 'ada'" in told
    assert htm(monkeypatch, "memory", "verify", tmp_path / "m") == 0


def test_another_broken_pipe_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr("htm_pytorch.cli.info.main", broken)
    assert_line(capfd, htm(monkeypatch, "info"), "a worker is gone", 1)


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert htm(monkeypatch, "info", *options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_info_says_what_is_here_and_what_auto_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Not even the command line of the extras is needed.
    monkeypatch.setitem(sys.modules, "tyro", None)
    found = json.loads(told(monkeypatch, capsys, "--json"))
    assert found["htm_pytorch"]["version"] == htm_pytorch.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["kernel"]["is_there"] == kernels.IS_AVAILABLE
    assert found["devices"]["cpu"]["auto"] == ("native" if kernels.IS_AVAILABLE else "blocked")

    monkeypatch.setattr(kernels, "IS_AVAILABLE", False)
    lines = told(monkeypatch, capsys).splitlines()
    assert any(
        line.startswith("kernel ") and "no kernel for this machine" in line for line in lines
    )
    (cpu,) = (line for line in lines if line.startswith("cpu "))
    assert "auto takes blocked; native has no kernel" in cpu and "; triton " in cpu


def test_info_finds_another_package_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(told(monkeypatch, capsys, "--json"))["others"]
    (tmp_path / "htm_pytorch").mkdir()
    (tmp_path / "htm_pytorch" / "__init__.py").touch()
    metadata = tmp_path / "htm_pytorch-0.0.4.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: htm-pytorch\nVersion: 0.0.4\n")
    (metadata / "RECORD").write_text("htm_pytorch/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = {"name": "htm-pytorch", "version": "0.0.4", "folder": str(tmp_path / "htm_pytorch")}
    found = json.loads(told(monkeypatch, capsys, "--json"))["others"]
    assert [one for one in found if one not in before] == [other]
    assert f"htm-pytorch 0.0.4 in {tmp_path}/htm_pytorch has" in told(monkeypatch, capsys)


def completion_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    assert not htm(monkeypatch, "completion", shell)
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_knows_all_commands(
    shell: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = completion_script(shell, monkeypatch, capsys)
    known = (*cli.COMMANDS, "verify", "--run-dir", "--episodes", "--topk-mems", "--before-step")
    assert all(f"'{name}'" in script for name in known)
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("memory co", "compact"),
        ("train cart", "cartpole-positions"),
        ("train --memory ls", "lstm"),
        ("train CartPole-v1 --eval-ev", "--eval-every"),
        ("info --j", "--json"),
        ("report run --fi", "--film"),
        ("completion ", "bash zsh fish -h --help"),
        ("eval so", "some run/"),
        ("memory info some", "some run/"),
        ("train CartPole-v1 --run-dir so", "some run/"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion_offers_words_options_and_files(
    shell: str,
    typed: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(completion_script(shell, monkeypatch, capsys))
    (tmp_path / "some run").mkdir()
    line = f"source ./script; complete -C 'htm {typed}'"
    if shell == "bash":
        empty = "''" if typed.endswith(" ") else ""
        words = f"COMP_WORDS=(htm {typed}{empty})"
        # Which can be asked for in a completion alone.
        reply = "compopt() { :; }; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _tyro_htm"
        line = f'source ./script; {words}; {reply}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        [shell, "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    offered = [word.split("\t")[0].rstrip("/") for word in done.stdout.splitlines()]
    wanted = [expected.rstrip("/")] if expected.endswith("/") else expected.split()
    assert sorted(offered) == sorted(wanted), done.stderr


def test_completion_knows_the_options_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its help says them; a description that is not one line would be offered as a word."""
    monkeypatch.setenv("COLUMNS", "200")
    script = completion_script("bash", monkeypatch, capsys)
    (line,) = (line for line in script.splitlines() if line.startswith("COMPLETION_SPEC = "))
    spec = ast.literal_eval(line.partition(" = ")[2])["subcommands"]
    spec |= {f"memory {name}": part for name, part in spec.pop("memory")["subcommands"].items()}
    for name, part in spec.items():
        htm(monkeypatch, *name.split(), "--help")
        helped = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
        known = {flag for option in part["options"] for flag in option["flags"]}
        assert helped <= known, name
        assert not any("\n" in option["description"] for option in part["options"]), name


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "needs the extra `rl`" in str(htm(monkeypatch, "train", "ballet"))
