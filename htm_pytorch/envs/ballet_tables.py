"""What the Ballet is made of: dances, colours, shapes, and the tables that move and draw them.

The order of `DANCES`, `COLOURS`, `SHAPES` and `DANCER_SQUARES` is part of the task: levels are
drawn by shuffling lists that begin in this order.
"""

import numpy as np

BOARD = 11
"""Squares along one side of the board, and of the agent's view of it."""

TILE = 9
"""Pixels along one side of a square."""

AGENT_START = (5, 5)
DANCER_SQUARES = ((2, 2), (2, 5), (2, 8), (5, 2), (5, 8), (8, 2), (8, 5), (8, 8))
"""Where dancers may stand, as (row, column) of the board."""
DANCE_LENGTH = 16

DIRECTIONS = {
    "N": (-1, 0),
    "NE": (-1, 1),
    "E": (0, 1),
    "SE": (1, 1),
    "S": (1, 0),
    "SW": (1, -1),
    "W": (0, -1),
    "NW": (-1, -1),
}
"""The king's moves as (row, column), in the order of the actions."""

STAY = len(DIRECTIONS)
"""The action after the last one: `step` takes it and moves nobody, but it is not in the space."""

DANCES = {
    "circle_cw": "N E S S W W N N E E S S W W N E",
    "circle_ccw": "N W S S E E N N W W S S E E N W",
    "up_and_down": "N S S N N S S N N S S N N S S N",
    "left_and_right": "E W W E E W W E E W W E E W W E",
    "diagonal_uldr": "NW SE SE NW NW SE SE NW NW SE SE NW NW SE SE NW",
    "diagonal_urdl": "NE SW SW NE NE SW SW NE NE SW SW NE NE SW SW NE",
    "plus_cw": "N S E W S N W E N S E W S N W E",
    "plus_ccw": "N S W E S N E W N S W E S N E W",
    "times_cw": "NE SW SE NW SW NE NW SE NE SW SE NW SW NE NW SE",
    "times_ccw": "NW SE SW NE SE NW NE SW NW SE SW NE SE NW NE SW",
    "zee": "NE W W E E SW NE SW SW E E W W NE SW NE",
    "chevron_down": "NW S SE NE N SW NE SW NE S SW NW N SE NW SE",
    "chevron_up": "SE N NW SW S NE SW NE SW N NE SE S NW SE NW",
}
"""The moves of each dance, by its name."""

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "brown": (128, 64, 0),
    "pink": (255, 64, 255),
    "cyan": (0, 255, 255),
    "dark_green": (0, 100, 0),
    "dark_red": (100, 0, 0),
    "dark_blue": (0, 0, 100),
    "olive": (100, 100, 0),
    "teal": (0, 100, 100),
    "lavender": (215, 200, 255),
    "peach": (255, 210, 170),
    "rose": (255, 205, 230),
    "light_green": (200, 255, 200),
    "light_yellow": (255, 255, 200),
}
"""The colour of a dancer, as (red, green, blue), by its name."""

_BITMAPS = """
triangle empty_square plus inverse_plus ex
....#.... ######### ...###... ###...### ##.....##
....#.... ######### ...###... ###...### ###...###
...###... ##.....## ...###... ###...### .###.###.
...###... ##.....## ######### ......... ..#####..
..#####.. ##.....## ######### ......... ...###...
..#####.. ##.....## ######### ......... ..#####..
.#######. ##.....## ...###... ###...### .###.###.
.#######. ######### ...###... ###...### ###...###
######### ######### ...###... ###...### ##.....##
inverse_ex circle empty_circle tee upside_down_tee
..#####.. ....#.... ..#####.. ######### ...###...
...###... ..#####.. .##...##. ######### ...###...
#...#...# .#######. ##.....## ######### ...###...
##.....## .#######. #.......# ...###... ...###...
###...### ######### #.......# ...###... ...###...
##.....## .#######. #.......# ...###... ...###...
#...#...# .#######. ##.....## ...###... #########
...###... ..#####.. .##...##. ...###... #########
..#####.. ....#.... ..#####.. ...###... #########
h u upside_down_u vertical_stripes horizontal_stripes
###...### ###...### ######### #.#.#.#.# #########
###...### ###...### ######### #.#.#.#.# .........
###...### ###...### ######### #.#.#.#.# #########
######### ###...### ###...### #.#.#.#.# .........
######### ###...### ###...### #.#.#.#.# #########
######### ###...### ###...### #.#.#.#.# .........
###...### ######### ###...### #.#.#.#.# #########
###...### ######### ###...### #.#.#.#.# .........
###...### ######### ###...### #.#.#.#.# #########
"""


def _read_bitmaps(text: str) -> dict[str, np.ndarray]:
    """Cut the drawing into named boolean bitmaps: a line of names, then the lines of their rows."""
    lines = [line.split() for line in text.strip().splitlines()]
    bitmaps = {}
    for top in range(0, len(lines), TILE + 1):
        columns = zip(*lines[top + 1 : top + 1 + TILE], strict=True)
        for name, rows in zip(lines[top], columns, strict=True):
            bitmaps[name] = np.array([[pixel == "#" for pixel in row] for row in rows])
    return bitmaps


SHAPES = _read_bitmaps(_BITMAPS)
"""The bitmap of each shape, bool [9, 9], by its name."""
INSTRUCTIONS = ("watch", *DANCES)
"""What the instruction of an observation can be, by its number."""

EMPTY, WALL, AGENT, FIRST_DANCER = range(4)
"""Symbols of the view. A dancer is `FIRST_DANCER + shape * len(COLOURS) + colour`."""

NUM_SYMBOLS = FIRST_DANCER + len(SHAPES) * len(COLOURS)


def _tiles() -> np.ndarray:
    tiles = np.zeros((NUM_SYMBOLS, TILE, TILE, 3), np.uint8)
    tiles[WALL] = 40
    tiles[AGENT] = 255
    bitmaps = np.stack(list(SHAPES.values()))[:, None, :, :, None]
    colours = np.array(list(COLOURS.values()), np.uint8)[None, :, None, None, :]
    tiles[FIRST_DANCER:] = (bitmaps * colours).reshape(-1, TILE, TILE, 3)
    return tiles


def _dance_offsets() -> np.ndarray:
    moves = np.array([[DIRECTIONS[move] for move in dance.split()] for dance in DANCES.values()])
    return np.pad(moves.cumsum(axis=1), ((0, 0), (1, 0), (0, 0)))


def _rooms() -> np.ndarray:
    """See the room without dancers from every square: symbols [row, column, 11, 11]."""
    margin = BOARD // 2
    board = np.full((BOARD, BOARD), WALL)
    board[1:-1, 1:-1] = EMPTY
    views = np.lib.stride_tricks.sliding_window_view(np.pad(board, margin), (BOARD, BOARD))
    rooms = views.astype(np.int16)
    rooms[:, :, margin, margin] = AGENT
    return rooms


TILES = _tiles()
"""The picture of each symbol, uint8 [symbol, 9, 9, 3]."""

DANCE_OFFSETS = _dance_offsets()
"""Where a dancer stands after each number of moves, from its own square: [dance, 17, 2]."""

ROOMS = _rooms()


def draw(symbols: np.ndarray) -> np.ndarray:
    """Draw one view, symbols [11, 11], as a picture [99, 99, 3]."""
    side = BOARD * TILE
    return TILES[symbols].swapaxes(1, 2).reshape(side, side, 3)
