"""A `TrainConfig` as the record of a run, and what another run has to share with it."""

import json
import math
from typing import Any

from htm_pytorch.rl.config import TrainConfig

_ABOUT_THE_CALL = ("run_dir", "resume", "seeds", "processes", "tensorboard")
ENDS = ("init_from", "frames", "stop_at", "eval_every", "eval_episodes", "device")
"""Options that a resumed run may have others of."""


def to_json(config: TrainConfig) -> str:
    """Return the record of the run, without where and how it was called; infinity is null."""
    record = {k: None if v == math.inf else v for k, v in config.options().items()}
    bars = config.environments.promote_at
    record["promote_at"] = [None if bar == math.inf else bar for bar in bars]
    for name in _ABOUT_THE_CALL:
        del record[name]
    return json.dumps(record, indent=2, default=str)


def from_json(text: str, **call: Any) -> TrainConfig:
    """Read what `to_json` wrote; `call` are the options it leaves out.

    Raises:
        ValueError: not such a record, or one of another version.
    """
    record = json.loads(text)
    if isinstance(record, dict):
        if record.get("stop_at") is None:
            record["stop_at"] = math.inf
        if "promote_at" in record:
            bars = record["promote_at"]
            # A number in a run from before it could differ from stage to stage.
            bars = bars if isinstance(bars, list) else [bars]
            record["promote_at"] = [math.inf if bar is None else bar for bar in bars]
        # Of a run from before there were these.
        added = {"recency": False, "see_time": False, "newest": 1, "rehearse": 0.0}
        record = added | record
    expected = set(TrainConfig().options()) - set(_ABOUT_THE_CALL)
    found = set(record) if isinstance(record, dict) else set()
    if others := sorted(found ^ expected):
        raise ValueError(f"config: expected the options of this version, differs in {others}")
    record = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return TrainConfig().replace(**(record | call))


def differs_in(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Return the options that would make the two runs learn differently."""
    own, others = config.options(), other.options()
    free = {*_ABOUT_THE_CALL, *ENDS}
    # The end of a schedule is part of what is learned on the way to it.
    if min(config.learner.final_learning_rate, config.learner.final_entropy) < 1:
        free.discard("frames")
    return [name for name in own if name not in free and own[name] != others[name]]
