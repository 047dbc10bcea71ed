"""CartPole whose velocities are hidden: to balance the pole, one has to remember where it was."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv


class CartPolePositionsEnv(gymnasium.ObservationWrapper):
    """Gymnasium's `CartPole-v1`, of which only positions are seen.

    ## Observation space
    `Box`, float32 [2]: the position of the cart and the angle of the pole, the entries 0 and 2 of
    what CartPole shows. Velocities, its entries 1 and 3, follow from one position and the next.

    All else, actions, rewards, ends and arguments, are CartPole's.

    ## Version history
    - v0: First version.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(CartPoleEnv(**arguments))
        shown = self.env.observation_space
        if not isinstance(shown, spaces.Box):
            raise TypeError(f"expected CartPole to show a Box, got {shown}")
        self.observation_space = spaces.Box(shown.low[_POSITIONS], shown.high[_POSITIONS])

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Return the positions alone."""
        return observation[_POSITIONS]


_POSITIONS = slice(None, None, 2)
