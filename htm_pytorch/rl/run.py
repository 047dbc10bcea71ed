"""The folder of a run: who may write there, its config, metrics, and checkpoint; never pickle."""

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from htm_pytorch.memory import MemoryFileError
from htm_pytorch.memory.files import load_tensors, save_tensors
from htm_pytorch.rl.config import TrainConfig

KIND = "htm-agent"
CHECKPOINT, CONFIG, METRICS, CURVE, LOCK = (
    "checkpoint.safetensors",
    "config.json",
    "metrics.csv",
    "curve.png",
    ".lock",
)
VERSIONS, EVALUATIONS = "versions.json", "evaluations.jsonl"
_PACKAGES = ("htm-pytorch", "torch", "gymnasium", "numpy")
Path_ = str | os.PathLike[str]


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
    if names := config.differs_in(recorded):
        own, others = config.options(), recorded.options()
        told = ", ".join(f"{name} is {others[name]!r} there, got {own[name]!r}" for name in names)
        raise ValueError(
            f"run_dir: {str(place)!r} holds a run of another config, {told}; pass the options that "
            "it was trained with, or another --run-dir"
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
        return TrainConfig.from_json((place / CONFIG).read_text(), run_dir=place)
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
            self._put(CONFIG, config.to_json().encode() + b"\n")
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
        tensors = {f"agent.{name}": tensor for name, tensor in agent.state_dict().items()}
        for number, parts in optimizer.state_dict()["state"].items():
            for name, tensor in parts.items():
                tensors[f"optimizer.{number}.{name}"] = tensor
        tensors["metrics"] = torch.frombuffer(bytearray(self._metrics or b"\n"), dtype=torch.uint8)
        record = {"config": self.config.to_json(), "progress": json.dumps(progress)}
        names = json.dumps(sorted(tensors))
        checksum = _checksum(tensors, record)
        path = self.place / CHECKPOINT
        save_tensors(path, KIND, tensors, names=names, checksum=checksum, **record)

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


class Checkpoint:
    """What `Run.save` wrote, read and checked.

    Raises:
        FileNotFoundError: no such file.
        MemoryFileError: a ValueError; truncated, damaged, or not a checkpoint of this format.
    """

    def __init__(self, path: Path_):
        self.path = Path(path)
        self._tensors, record = load_tensors(path, KIND)
        wanted = {"config", "progress", "names", "checksum"}
        if missing := sorted(wanted - set(record)):
            raise MemoryFileError(f"path: {str(path)!r} lacks its record of {missing}")
        checksum = record.pop("checksum")
        try:
            missing = sorted(set(json.loads(record.pop("names"))) ^ set(self._tensors))
        except (json.JSONDecodeError, TypeError) as error:
            raise MemoryFileError(f"path: {str(path)!r} is damaged ({error})") from error
        if missing:
            raise MemoryFileError(f"path: {str(path)!r} is damaged: it differs in {missing[:4]}")
        if checksum != _checksum(self._tensors, record):
            raise MemoryFileError(
                f"path: {str(path)!r} is damaged: it is not what its checksum is of"
            )
        self.config = TrainConfig.from_json(record["config"], run_dir=self.path.parent)
        self.progress: dict[str, Any] = json.loads(record["progress"])

    @property
    def metrics(self) -> bytes:
        """The rows of metrics.csv up to here."""
        return self._tensors["metrics"].numpy().tobytes().lstrip(b"\n")

    def take_what_fits(self, agent: nn.Module) -> int:
        """Load what fits by name and shape, a module's buffers all or none; count parameters.

        Raises:
            ValueError: next to nothing fits.
        """
        own, weights = agent.state_dict(), self._under("agent.")
        names = {name for name, _ in agent.named_parameters()}
        fits = {n: t for n, t in weights.items() if n in own and own[n].shape == t.shape}
        # A count without the sums that it is of would be wrong.
        whole = {name.rpartition(".")[0] for name in own.keys() - names - fits.keys()}
        fits = {n: t for n, t in fits.items() if n in names or n.rpartition(".")[0] not in whole}
        taken = sum(fits[name].numel() for name in names & fits.keys())
        # A few biases are alike in any two agents.
        if taken < 0.01 * (count := sum(own[name].numel() for name in names)):
            raise ValueError(
                f"init_from: expected a run whose agent is like this one, got "
                f"{str(self.path.parent)!r}: of {count:,} parameters only {taken:,} fit"
            )
        # What is missing stays, or becomes what layers know to be without it.
        agent.load_state_dict(fits, strict=False)
        return taken

    def restore_agent(self, agent: nn.Module) -> None:
        """Load the weights.

        Raises:
            MemoryFileError: they are another model's.
        """
        weights = self._under("agent.")
        try:
            agent.load_state_dict(weights)
        except RuntimeError as error:
            what = " ".join(str(error).split())
            what = what if len(what) <= 300 else f"{what[:300]} ..."
            raise MemoryFileError(
                f"path: {str(self.path)!r} holds another model; where it was trained with parts of "
                f"one's own, evaluate(run_dir, parts=...) takes them: {what}"
            ) from error

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimizer's state."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._under("optimizer.").items():
            number, _, part = name.partition(".")
            state.setdefault(int(number), {})[part] = tensor
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }


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


def _checksum(tensors: dict[str, Tensor], record: dict[str, str]) -> str:
    found = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
