"""The examples run as they stand, without a warning, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
    # Warnings of imported packages are theirs; ours are of class UserWarning.
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *options, EXAMPLES / name, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {
        "01_attention.py",
        "02_streaming.py",
        "03_train_ballet.py",
        "04_sharded.py",
        "05_library.py",
        "06_transformers.py",
        "07_language_model.py",
        "ppo_htm.py",
    }


def test_attention_learns_to_keep_the_right_chunk() -> None:
    printed = run("01_attention.py")
    rows = re.findall(r"^ *\d+ +([\d.]+) +[\d.]+ +([\d.]+)$", printed, re.MULTILINE)
    first, last = rows[0], rows[-1]
    assert float(first[0]) < 0.3 and float(last[0]) > 0.7
    assert float(last[1]) < 0.5 * float(first[1])
    change = re.search(r"changes the output by (\S+)\.$", printed, re.MULTILINE)
    assert change and float(change[1]) < 1e-4


def test_stream_in_pieces_equals_the_whole() -> None:
    printed = run("02_streaming.py")
    apart = re.search(r"all at once: (\S+) apart", printed)
    assert apart and float(apart[1]) < 1e-5
    # 300 steps and, for the second row, 100 since its new episode; chunks of 8.
    assert "row 0: 16 chunks to recall and 4 steps" in printed
    assert "row 1: 12 chunks to recall and 4 steps" in printed


def test_training_goes_through_all_parts() -> None:
    for package in ("filelock", "gymnasium", "matplotlib", "safetensors", "tqdm", "tyro"):
        pytest.importorskip(package)
    printed = run("03_train_ballet.py")
    assert "unseen episodes: return" in printed
    assert "checkpoint.safetensors config.json curve.png" in printed


def test_two_processes_recall_what_one_does() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run("04_sharded.py", *torchrun)
    assert "rank 0 of 2 holds 63 of 125 chunks" in printed
    assert "rank 1 of 2 holds 62 of 125 chunks" in printed
    recalled = re.findall(r"(\d+) of the 20 that were recalled", printed)
    assert sum(map(int, recalled)) == 20
    apart = re.findall(r"(\S+) from those of one process", printed)
    assert len(apart) == 2 and all(float(number) < 1e-5 for number in apart)
    # 4 scores, 4 numbers and 4 heads of 32, of 4 bytes each.
    assert "a query hands 544 bytes to the others" in printed


def test_a_reader_with_a_library_is_better(tmp_path: Path) -> None:
    pytest.importorskip("lance")
    arguments = ("--small", "--updates", "200", "--place", str(tmp_path / "library"))
    printed = run("05_library.py", arguments=arguments)
    losses = re.findall(r"^(without|with) memory +([\d.]+) nats", printed, re.MULTILINE)
    without, with_memory = (float(loss) for _, loss in losses)
    assert with_memory < without


def test_a_small_qwen_trains_and_generates_with_a_memory() -> None:
    pytest.importorskip("transformers")
    printed = run("06_transformers.py", arguments=("--updates", "4"))
    shares = re.findall(r"^  ([\d.]+) right, ([\d.]+) by generate", printed, re.MULTILINE)
    assert len(shares) == 2 and all(0 <= float(share) < 0.3 for pair in shares for share in pair)


@pytest.mark.slow
def test_a_small_qwen_names_what_it_read_long_ago() -> None:
    pytest.importorskip("transformers")
    printed = run("06_transformers.py")
    shares = re.findall(r"^  ([\d.]+) right, ([\d.]+) by generate", printed, re.MULTILINE)
    with_memory, window_only = ([float(share) for share in pair] for pair in shares)
    assert min(with_memory) >= 0.95
    assert max(window_only) <= 0.12  # chance is 1 of 16


def test_a_language_model_learns_with_a_memory_and_writes() -> None:
    printed = run("07_language_model.py", arguments=("--updates", "12", "--most", "3000"))
    found = re.findall(r"^(with|without) memory: perplexity ([\d.]+) on unseen", printed, re.M)
    assert [name for name, _ in found] == ["without", "with"]
    # Of 128 characters; a model that has learned nothing is above 128.
    assert all(1 < float(perplexity) < 100 for _, perplexity in found)
    assert len(printed.partition(" s\nwith")[2]) > 300


SHIFTED = """
import gymnasium
from gymnasium import spaces

class Shifted(gymnasium.Env):
    def __init__(self, observation_space=spaces.Discrete(3, start=5)):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2, start=-4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 7, {}

    def step(self, action):
        assert action in (-4, -3), action
        return 5, 1.0, bool(self.np_random.random() < 0.2), False, {}

gymnasium.register("Shifted-v0", entry_point=Shifted)
pair = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)])
gymnasium.register("Pair-v0", entry_point=Shifted, kwargs={"observation_space": pair})
"""


def test_one_file_knows_where_choices_start_and_refuses_tuples(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    (tmp_path / "shifted.py").write_text(SHIFTED)
    command = [sys.executable, str(EXAMPLES / "ppo_htm.py"), "--num-envs=4", "--steps=8"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{EXAMPLES.parent}"}
    for name, code, told in (("Shifted", 0, "64 frames"), ("Pair", 2, "observations of Box or")):
        done = subprocess.run(
            [*command, "--frames=64", f"shifted:{name}-v0"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == code, done.stderr
        assert told in done.stdout + done.stderr


def test_one_file_trains_on_any_environment() -> None:
    pytest.importorskip("gymnasium")
    assert len((EXAMPLES / "ppo_htm.py").read_text().splitlines()) <= 250
    arguments = ("--frames", "2048", "--num-envs", "8", "--steps", "64")
    printed = run("ppo_htm.py", arguments=("CartPole-v1", *arguments))
    frames = re.findall(r"^ *([\d,]+) frames  return +([\d.]+)  [\d,]+ frames/s$", printed, re.M)
    assert [row[0] for row in frames] == ["512", "1,024", "1,536", "2,048"]
    assert all(float(row[1]) > 8 for row in frames)
