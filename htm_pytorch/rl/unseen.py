"""Unseen episodes: their seeds, how many at once, and a player that begins them."""

from htm_pytorch.rl.agent import Agent
from htm_pytorch.rl.config import TrainConfig
from htm_pytorch.rl.making import is_batched, make_environments, seeds_of
from htm_pytorch.rl.player import Player

UNSEEN = 2**62
"""Stands in seeds where trainings have the number of a batch, which never is as large."""
MOST_ROWS = 500
"""Episodes that are played at once."""


def most_rows(config: TrainConfig) -> int:
    """Return how many episodes may be played at once."""
    # Others than a batch of its own may cost a lot each.
    return MOST_ROWS if is_batched(config) else min(MOST_ROWS, config.environments.num_envs)


def begin(
    agent: Agent,
    config: TrainConfig,
    rows: int,
    stage: int,
    *,
    batch: int = UNSEEN,
    render_mode: str | None = None,
) -> Player:
    """Begin unseen episodes in so many rows; `batch` stands in their seeds."""
    environments = make_environments(config, rows, stage, render_mode)
    player = Player(environments, agent, config.rollouts.action_repeat)
    try:
        player.begin(seeds_of(config, batch, range(rows)))
    except BaseException:
        player.close()
        raise
    return player
