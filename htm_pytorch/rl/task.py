"""From a config: its environments and its agent."""

from typing import Any

import gymnasium

from htm_pytorch.rl.agent import Agent
from htm_pytorch.rl.config import TrainConfig


def make_env(config: TrainConfig, num_envs: int) -> Any:
    """Return a batch of the config's environments.

    Raises:
        ValueError: the show is so long that no agent ever gets to choose.
    """
    env: Any = gymnasium.make_vec(
        "htm_pytorch.envs:htm_pytorch/Ballet-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        num_dancers=config.num_dancers,
        dance_delay=config.dance_delay,
        observation=config.observation,
    )
    choice, end = env.unwrapped.choice_step, env.unwrapped.max_steps
    if choice >= end:
        raise ValueError(
            f"dance_delay: expected a choice before the time-out at step {end}, "
            f"got one at step {choice} with num_dancers = {config.num_dancers}"
        )
    return env


def make_agent(config: TrainConfig) -> Agent:
    """Return the config's agent, with fresh weights."""
    return Agent(
        config.observation,
        actions=8,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        topk_mems=config.topk_mems,
        mem_chunk_size=config.mem_chunk_size,
        mem_chunks=config.mem_chunks,
        window=config.window,
        detach_memories=config.detach_memories,
    )
