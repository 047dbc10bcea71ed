"""The three rooms of the visual match, as squares (row, column) and, for a batch, as numbers."""

import numpy as np

FLOOR, WALL, AGENT, APPLE, FIRST_COLOUR = range(5)
"""What a square shows; the other colours follow the first one."""

NUM_COLOURS = 3
SEES = 2
"""Squares that the agent sees in each direction."""

SIDE = 2 * SEES + 1
NUM_APPLES = 10
RESPAWN = 20
"""An apple is there again when more than so many steps have passed."""

_MAPS = (
    "           |    ###    |    #+#    |    ###    |           |           |           ",
    "###########|#a a a a a#|# a a a a #|#a a a a a#|# a a a a #|#a a + a a#|###########",
    "###########|# d  d  d #|#         #|#         #|####   ####|   # + #   |   #####   ",
)
_ROOMS = np.array([[list(row) for row in room.split("|")] for room in _MAPS])
_ROW = _ROOMS.shape[2] + 2 * SEES

WALLS = _ROOMS == "#"
"""[3, height, width], where nobody can go."""

STARTS = np.argwhere(_ROOMS == "+")[:, 1:]
"""[3, 2], where the agent begins in each room."""

PLACES = np.argwhere(WALLS[0])
"""[8, 2], where the colour may be in the first room."""

SPOTS = np.argwhere(_ROOMS[1] == "a")
"""[22, 2], where an apple may be in the second room."""

DOORS = np.argwhere(_ROOMS[2] == "d")
"""[3, 2], the doors of the third room from the left to the right."""

MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])
"""What an action adds to a square: north, south, west, east."""


def flat(squares: np.ndarray) -> np.ndarray:
    """Return squares as numbers, in rooms that have around them what can be seen of the outside."""
    return (squares + SEES) @ (_ROW, 1)


# The same, of squares as numbers.
FLAT_STARTS, FLAT_PLACES, FLAT_SPOTS, FLAT_DOORS = map(flat, (STARTS, PLACES, SPOTS, DOORS))
FLAT_MOVES: np.ndarray = MOVES @ (_ROW, 1)
FLAT_VIEW = np.add.outer(_ROW * np.arange(-SEES, SEES + 1), np.arange(-SEES, SEES + 1)).ravel()
FLAT_WALLS = np.pad(WALLS, ((0, 0), (SEES, SEES), (SEES, SEES))).reshape(len(_MAPS), -1)
