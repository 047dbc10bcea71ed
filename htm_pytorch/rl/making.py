"""From a config to its environments."""

import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import FrameStackObservation, TimeLimit

from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.environments import Environments


def make_environments(
    config: TrainConfig, num_envs: int, stage: int = 0, render_mode: str | None = None
) -> Environments:
    """Return environments of the config.

    Args:
        config: which, and how.
        num_envs: how many.
        stage: of the curriculum.
        render_mode: of the environments.

    Raises:
        ValueError: there is no such environment, or it does not take its arguments.
    """
    options = config.environments
    _find(config.env)
    arguments = parse_arguments("env_args", options.env_args)
    blamed = "env_args"
    if options.curriculum:
        arguments |= parse_arguments("curriculum", [options.curriculum[stage]])
        blamed = f"curriculum, stage {stage}"
    if render_mode is not None:
        arguments["render_mode"] = render_mode
    wrappers: list[Callable[[gymnasium.Env], gymnasium.Wrapper]] = []
    if options.frame_stack > 1:
        wrappers.append(lambda env: FrameStackObservation(env, options.frame_stack))
    mode = options.vectorize
    if mode == "auto":
        batched = is_batched(config) and render_mode is None
        mode = "vector_entry_point" if batched else "sync"
    if options.time_limit:
        wrappers.append(lambda env: TimeLimit(env, options.time_limit))
    more: dict[str, Any] = {}
    if mode != "vector_entry_point":
        more["disable_env_checker"] = True
    if mode == "async":
        # Threads of torch, and of a store, do not survive a fork.
        more["vector_kwargs"] = {"context": "spawn"}
    try:
        vector = gymnasium.make_vec(
            config.env,
            num_envs=num_envs,
            vectorization_mode=mode,
            wrappers=wrappers,
            **more,
            **arguments,
        )
    except ImportError as error:
        raise ValueError(f"env: {config.env} could not import what it needs: {error}") from error
    except Exception as error:
        # Whatever somebody else's code, or Gymnasium's, makes of arguments that it did not expect.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"{blamed}: {config.env} is not made with {arguments}: {kind}{error}"
        ) from error
    return Environments(vector, options.observe, options.see_previous, options.see_time)


def is_batched(config: TrainConfig) -> bool:
    """Say whether all rows are one environment of the config's, with an entry point for vectors."""
    options = config.environments
    wrapped = options.frame_stack > 1 or options.time_limit
    own = _find(config.env).vector_entry_point is not None
    return options.vectorize == "auto" and own and not wrapped


def most_steps(config: TrainConfig) -> int:
    """Return the steps after which an episode ends in any case; 0: nobody says."""
    return config.environments.time_limit or _find(config.env).max_episode_steps or 0


def seeds_of(config: TrainConfig, batch: int, rows: range) -> list[int]:
    """Return a seed for each row, the same in whichever process it is."""
    drawn = np.random.SeedSequence((config.seed, batch)).generate_state(rows.stop)
    return drawn[rows.start :].tolist()


def parse_arguments(name: str, given: Sequence[str]) -> dict[str, Any]:
    """Return arguments given as `name=value` or as JSON objects."""
    arguments: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                arguments |= json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{name}: expected a JSON object, got {text!r}: {error}"
                ) from error
        elif equals and key.isidentifier():
            try:
                arguments[key] = json.loads(value)
            except json.JSONDecodeError:
                arguments[key] = value
        else:
            raise ValueError(f"{name}: expected name=value or a JSON object, got {text!r}")
    return arguments


def _find(name: str) -> Any:
    module, _, bare = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(bare)
    except ImportError as error:
        lacking = error.name or ""
        if module != lacking and not module.startswith(f"{lacking}."):
            raise ValueError(f"env: importing the module {module!r} failed: {error}") from error
        raise ValueError(
            f"env: expected module:id of a module that can be imported, got {name!r}: {error}"
        ) from error
    except gymnasium.error.Error as error:
        raise ValueError(
            f"env: expected the id of an environment, or module:id of one that the module "
            f"registers, got {name!r}: {error}"
        ) from error
