"""The folder of a run: who may write there, its config, metrics, and checkpoint."""

import contextlib
import csv
import importlib.metadata
import io
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from htm_pytorch.rl.checkpoint import CHECKPOINT, Checkpoint, write_checkpoint
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.record import differs_in, from_json, to_json

CONFIG, METRICS, CURVE, LOCK = "config.json", "metrics.csv", "curve.png", ".lock"
VERSIONS, EVALUATIONS = "versions.json", "evaluations.jsonl"
_PACKAGES = ("htm-pytorch", "torch", "gymnasium", "numpy")


def check_free(config: TrainConfig) -> None:
    """Raise unless a training of the config may go on, or begin, in its folder.

    Raises:
        ValueError: it is no folder, or holds a run and `resume` is not set, or a run of another
            config, or a file of that name that is none.
    """
    place = config.run_dir
    nearest = next((part for part in (place, *place.parents) if part.exists()), place)
    if nearest.exists() and not nearest.is_dir():
        raise ValueError(
            f"run_dir: expected a folder, got {str(place)!r}, as {str(nearest)!r} is a file"
        )
    metrics = place / METRICS
    # The first line is the names.
    has_rows = metrics.exists() and metrics.read_bytes().count(b"\n") > 1
    if not config.resume and (has_rows or (place / CHECKPOINT).exists()):
        raise ValueError(
            f"run_dir: {str(place)!r} already holds a run; "
            "pass --resume to go on with it, or another --run-dir"
        )
    recorded = recorded_config(place)
    if not config.resume or recorded is None:
        return
    if names := differs_in(config, recorded):
        own, others = config.options(), recorded.options()
        told = ", ".join(f"{name} is {others[name]!r} there, got {own[name]!r}" for name in names)
        begins = has_rows or (place / CHECKPOINT).exists()
        instead = "another --run-dir" if begins else "no --resume, as nothing was learned there"
        raise ValueError(
            f"run_dir: {str(place)!r} holds a run of another config, {told}; pass the options that "
            f"it was trained with, or {instead}"
        )


def recorded_config(place: Path) -> TrainConfig | None:
    """Return the config of the run in a folder, by its checkpoint if it has one; None: no run.

    Raises:
        ValueError: one of the two files is not what a training wrote.
    """
    if (place / CHECKPOINT).exists():
        return Checkpoint(place / CHECKPOINT).config
    if not (place / CONFIG).exists():
        return None
    try:
        return from_json((place / CONFIG).read_text(), run_dir=place)
    except ValueError as error:
        raise ValueError(
            f"run_dir: {str(place)!r} holds a {CONFIG} that is no record of a run of this version "
            f"({error}); pass another --run-dir"
        ) from error


class Run:
    """The right to write to a run's folder, and its metrics.

    Raises:
        ValueError: another training has that right, or see `check_free`.
    """

    def __init__(self, config: TrainConfig):
        import filelock

        self.config, self.place = config, config.run_dir
        self.place.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.place / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise ValueError(
                f"run_dir: another training writes to {str(self.place)!r}; "
                "wait for it, or pass another --run-dir"
            ) from error
        self._file: Any = None
        try:
            check_free(config)
            path = self.place / CHECKPOINT
            self.checkpoint = Checkpoint(path) if path.exists() else None
            self._put(CONFIG, to_json(config).encode() + b"\n")
            versions = json.dumps(_versions(config.env), indent=2) + "\n"
            self._put(VERSIONS, versions.encode())
            # Rows after the checkpoint are played again; those before it are as it holds them.
            known = b"" if self.checkpoint is None else self.checkpoint.metrics
            self._put(METRICS, known)
            self._metrics = known
            self._file = (self.place / METRICS).open("ab")
        except BaseException:
            self.close()
            raise

    def add(self, row: dict[str, Any]) -> None:
        """Write one row of metrics."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(row))
        if not self._metrics:
            writer.writeheader()
        writer.writerow(row)
        made = text.getvalue().encode()
        self._metrics += made
        self._file.write(made)
        self._file.flush()

    def save(
        self, agent: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
    ) -> None:
        """Write all that the rest of the training depends on; `progress` must fit JSON."""
        record = {"config": to_json(self.config), "progress": json.dumps(progress)}
        write_checkpoint(self.place / CHECKPOINT, agent, optimizer, self._metrics, record)

    def _put(self, name: str, data: bytes) -> None:
        """Write a file as a whole or not at all."""
        written = self.place / f"{name}.tmp"
        written.write_bytes(data)
        written.replace(self.place / name)

    def close(self) -> None:
        """Give the folder free."""
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _versions(env: str) -> dict[str, str]:
    """Return what the run was made with, the package that `module:id` names included."""
    found = {"python": platform.python_version(), "processor": platform.machine()}
    module = env.rpartition(":")[0].partition(".")[0]
    # Which looks at every package that is installed.
    packages = importlib.metadata.packages_distributions().get(module, []) if module else []
    for package in dict.fromkeys([*_PACKAGES, *packages]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
