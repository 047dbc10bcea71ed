"""`htm report`, from a run to its files, and how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import assert_line, htm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned nothing yet."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    sizes = ["--dim=16", "--heads=2", "--num-envs=8", "--minibatches=2", "--eval-episodes=8"]
    with pytest.MonkeyPatch.context() as patch:
        assert htm(patch, "train", "ballet", *sizes, "--frames=700", "--run-dir", folder) == 0
    return folder


def test_a_run_is_reported_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [run_dir / "moment.png", run_dir / "moments.gif"]
    options = ["--episodes=20", "--picture", files[0], "--film", files[1]]
    assert htm(monkeypatch, "report", run_dir, *options) == 0
    printed = capsys.readouterr().out
    assert "at the first decision of 20 unseen episodes:" in printed
    assert f"{run_dir / 'report.html'}: " in printed
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "<title>What tiny recalled: ballet</title>" in text
    assert "at the first decision of 20 unseen episodes:" in text
    assert len(text) < 500_000
    said = json.loads((run_dir / "report.json").read_text())
    assert (said["episodes"], said["chance_first"], said["chance_among"]) == (20, 0.5, 1.0)
    assert said["layers"][0]["among"] == 1.0
    for file in files:
        assert file.stat().st_size > 1000


OWN = """
# Greets, and looks for a display, before gymnasium is imported.
import pygame
pygame.init()
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
gymnasium.register("Own-v0", CartPoleEnv, max_episode_steps=30)
"""


def test_pygame_is_silent(tmp_path: Path) -> None:
    pytest.importorskip("pygame", reason="the extra `tasks` is not installed")
    (tmp_path / "ownpygame.py").write_text(OWN)
    sizes = ["--dim=16", "--heads=2", "--mem-chunk-size=4", "--num-envs=4", "--steps=16"]
    train = ["train", "ownpygame:Own-v0", *sizes, "--frames=64", "--eval-episodes=4"]
    hushed = {"PYGAME_HIDE_SUPPORT_PROMPT", "DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in hushed}
    for arguments, lines in ((train, 3), (["report", "runs/run"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "htm_pytorch", *arguments],
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == lines, done.stdout


def test_another_place_and_seed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [run_dir / f"{name}.html" for name in ("a", "b", "c")]
    for page, seed in zip(pages, (1, 1, 2), strict=True):
        assert htm(monkeypatch, "report", run_dir, "--out", page, "--seed", seed) == 0
    one, same, other = (page.read_text(encoding="utf-8") for page in pages)
    assert one == same != other
    assert not (run_dir / "a.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes=-1"], "episodes: expected 0 or more, got -1"),
        (["--out=report.txt"], "out: expected a file .html, got 'report.txt'"),
        (["--picture=a.jpg"], "picture: expected a file .png or .pdf or .svg, got 'a.jpg'"),
        (["--film=a.png"], "film: expected a file .gif or .mp4, got 'a.png'"),
        (["--picture=a.png", "--moment=99"], "moment: expected one of"),
    ],
    ids=str,
)
def test_wrong_options_are_a_line(
    options: list[str],
    message: str,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert_line(capsys, htm(monkeypatch, "report", run_dir, *options), message)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "run_dir: expected a run with a checkpoint"
    assert_line(capsys, htm(monkeypatch, "report", tmp_path), message)
