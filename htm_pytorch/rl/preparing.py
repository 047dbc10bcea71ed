"""From a config to a fresh agent, or to what is wrong with it: before anything is written."""

import torch

from htm_pytorch.rl.agent import Agent, Parts, make_agent
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.cores import count_parameters
from htm_pytorch.rl.making import make_environments
from htm_pytorch.rl.run import CHECKPOINT, Checkpoint, check_free


def describe_sizes(config: TrainConfig) -> str:
    """Return how many parameters the memory has, beside that of the paper at the same sizes."""
    memories = config.memories
    count = count_parameters(memories)
    paper = count_parameters(config.replace(memory="htm").memories)
    return f"memory {memories.memory}: {count:,} parameters ({count / paper:.2f} of htm's)"


def prepare(config: TrainConfig, parts: Parts | None = None) -> Agent:
    """Return a fresh agent, if the config can be trained; nothing is written.

    Raises:
        ValueError: names the option that cannot work.
    """
    check_free(config)
    torch.manual_seed(config.seed)
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one of this machine, got {config.device!r}") from error
    agent = _fresh_agent(config, 0, parts).to(device)
    for stage in range(1, len(config.environments.curriculum)):
        try:
            agent.load_state_dict(_fresh_agent(config, stage, parts).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"curriculum: expected stages that look alike, stage {stage} differs"
            ) from error
    if config.init_from is not None:
        source = Checkpoint(config.init_from / CHECKPOINT)
        source.restore_agent(agent, strict=False)
    try:
        agent.initial_state(config.environments.num_envs)
    except RuntimeError as error:
        sizes = config.memories
        raise ValueError(
            f"mem_chunks: expected a memory that fits, got {sizes.mem_chunks} chunks of "
            f"{sizes.mem_chunk_size} steps of width {sizes.dim} in {config.environments.num_envs} "
            "environments"
        ) from error
    return agent


def _fresh_agent(config: TrainConfig, stage: int, parts: Parts | None) -> Agent:
    environments = make_environments(config, 1, stage)
    agent = make_agent(config, environments.observation_space, environments.action_space, parts)
    environments.close()
    return agent
