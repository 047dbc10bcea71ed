"""The three rooms of the visual match, as squares (row, column) and, for a batch, as numbers."""

import numpy as np

# What a square shows; colours follow one another.
FLOOR, WALL, AGENT, APPLE, FIRST_COLOUR = range(5)
NUM_COLOURS = 3

SEES = 2
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
STARTS = np.argwhere(_ROOMS == "+")[:, 1:]
PLACES = np.argwhere(WALLS[0])
SPOTS = np.argwhere(_ROOMS[1] == "a")
DOORS = np.argwhere(_ROOMS[2] == "d")
MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])


def flat(squares: np.ndarray) -> np.ndarray:
    """Return squares as numbers, in rooms that have around them what can be seen of the outside."""
    return (squares + SEES) @ (_ROW, 1)


FLAT_STARTS, FLAT_PLACES, FLAT_SPOTS, FLAT_DOORS = map(flat, (STARTS, PLACES, SPOTS, DOORS))
FLAT_MOVES: np.ndarray = MOVES @ (_ROW, 1)
FLAT_VIEW = np.add.outer(_ROW * np.arange(-SEES, SEES + 1), np.arange(-SEES, SEES + 1)).ravel()
FLAT_WALLS = np.pad(WALLS, ((0, 0), (SEES, SEES), (SEES, SEES))).reshape(len(_MAPS), -1)
