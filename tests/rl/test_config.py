"""Options: their names, ranges and record."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from htm_pytorch.rl import TrainConfig
from htm_pytorch.rl.record import differs_in, from_json, to_json

WRONG = [
    ("dim", 0),
    ("depth", -1),
    ("heads", 3),
    ("memory", "cards"),
    ("topk_mems", 0),
    ("mem_chunk_size", 0),
    ("mem_chunks", 0),
    ("window", 0),
    ("num_envs", 0),
    ("vectorize", "magic"),
    ("frame_stack", 0),
    ("time_limit", -1),
    ("promote_at", (math.nan,)),
    ("promote_at", 0.5),
    ("promote_at", ()),
    ("promote_at", (0.5, 0.5)),
    ("rollout", "years"),
    ("steps", 0),
    ("decisions", -1),
    ("action_repeat", 0),
    ("bptt", -1),
    ("start", "tomorrow"),
    ("algorithm", "dqn"),
    ("minibatches", 3),
    ("processes", 3),
    ("epochs", 0),
    ("discount", 1.5),
    ("trace", -0.1),
    ("final_learning_rate", 1.1),
    ("final_entropy", math.nan),
    ("learning_rate", 0.0),
    ("learning_rate", math.inf),
    ("clip", -0.2),
    ("value_clip", -0.1),
    ("value_weight", math.inf),
    ("entropy_weight", math.nan),
    ("reconstruction_weight", -1.0),
    ("max_grad_norm", math.nan),
    ("frames", 0),
    ("stop_at", math.nan),
    ("average_over", 0),
    ("checkpoint_every", 0),
    ("eval_every", -1),
    ("eval_episodes", 0),
    ("seed", -1),
    ("seed", 99999999999999999999),
    ("seeds", 0),
    ("env_args", "x"),
    ("env_args", (1,)),
    ("observe", ["kind"]),
    ("dim", "64"),
    ("dim", 64.0),
    ("dim", True),
    ("learning_rate", "1e-3"),
    ("resume", 1),
    ("memory", None),
    ("env", 3),
    ("run_dir", 7),
    ("init_from", 7),
    ("budget", None),
    ("stop_at", -math.inf),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value))
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as refused:
        TrainConfig().replace(**{name: value})
    assert "\n" not in str(refused.value)


def test_a_wrong_type_is_told_with_what_came() -> None:
    with pytest.raises(ValueError, match=r"^env_args: expected a tuple, .* text, got 'x'$"):
        TrainConfig().replace(env_args="x")
    with pytest.raises(ValueError, match=r"^dim: expected an integer, got 64.0 of type float$"):
        TrainConfig().replace(dim=64.0)


def test_folders_may_be_text() -> None:
    config = TrainConfig(run_dir="runs/mine", init_from="runs/other")  # pyright: ignore[reportArgumentType]
    assert (config.run_dir, config.init_from) == (Path("runs/mine"), Path("runs/other"))


def test_the_record_has_no_infinity() -> None:
    text = to_json(TrainConfig())
    assert "Infinity" not in text
    record = json.loads(text)
    assert record.pop("stop_at") is None
    for same in (text, json.dumps(record), text.replace('"stop_at": null', '"stop_at": Infinity')):
        assert from_json(same) == TrainConfig()


def test_a_bar_of_every_stage_survives_the_record() -> None:
    config = TrainConfig().replace(curriculum=("{}", "{}", "{}"), promote_at=(0.5, math.inf))
    text = to_json(config)
    assert "Infinity" not in text and from_json(text) == config
    record = json.loads(to_json(TrainConfig()))
    assert record["promote_at"] == [0.9]
    before = from_json(json.dumps({**record, "promote_at": 0.9}))
    assert before == TrainConfig(), "a run from before had one number"
    before = from_json(json.dumps({**record, "promote_at": None}))
    assert before.environments.promote_at == (math.inf,)


def test_every_number_has_a_range() -> None:
    """NaN is in none of them."""
    for name, value in TrainConfig().options().items():
        if isinstance(value, float):
            with pytest.raises(ValueError, match=f"^{name}: expected "):
                TrainConfig().replace(**{name: math.nan})


def test_rollouts_of_episodes_begin_with_nothing() -> None:
    with pytest.raises(ValueError, match=r"^start: expected 'stored' .*, got 'refreshed'"):
        TrainConfig().replace(rollout="episodes", start="refreshed")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^colour: expected the name of an option$"):
        TrainConfig().replace(colour=3)
    with pytest.raises(ValueError, match=r"^num_env: .*; did you mean num_envs\?$"):
        TrainConfig().replace(num_env=3, zebra=3, dim=8)


def test_config_survives_its_record(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path, init_from=tmp_path / "other").replace(
        seed=3, env_args=("a=1", '{"b": 2}'), stop_at=math.inf, detach_memories=True
    )
    assert from_json(to_json(config), run_dir=tmp_path) == config
    record = json.loads(to_json(config))
    same = from_json(to_json(config))
    assert differs_in(config, same) == []
    assert differs_in(config, config.replace(resume=True, frames=1, processes=2)) == []
    assert differs_in(config, config.replace(init_from=None)) == []
    assert differs_in(config, config.replace(seed=4, dim=32)) == ["seed", "dim"]
    falling = config.replace(final_learning_rate=0.0)
    assert differs_in(falling, falling.replace(frames=1)) == ["frames"]
    for other in ({**record, "colour": 1}, {k: v for k, v in record.items() if k != "dim"}, []):
        with pytest.raises(ValueError, match="expected the options of this version"):
            from_json(json.dumps(other))


def test_options_have_one_name_each_and_a_sentence() -> None:
    names: list[str] = []
    for field in dataclasses.fields(TrainConfig):
        group = getattr(TrainConfig(), field.name)
        names += (
            [f.name for f in dataclasses.fields(group)]
            if dataclasses.is_dataclass(group)
            else [field.name]
        )
    assert len(names) == len(set(names))
    assert set(names) == set(TrainConfig().options())


def test_config_needs_neither_torch_nor_gymnasium() -> None:
    code = (
        "import sys; from htm_pytorch.rl import TrainConfig; from htm_pytorch import tasks;"
        "tasks.find('ballet'); print({'torch', 'gymnasium', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()", done.stderr
