"""Blocks of a product, by closed form: what one step of the grid holds and multiplies."""

import math
from typing import NamedTuple

STACKED = 256  # rows for the matrix unit at a time, planes and parts of x counted
STEP = 1 << 21  # weights of a step: its fixed cost, some 200 cycles, must be small beside them
LANES = 128
TILE = 32  # rows of 8-bit operands in a tile
DEPTH = 512  # of which a block of k is a multiple: whole tiles of words at any number of bits
WIDTH = 1024  # columns of a step at most
ROWS = 1 << 21  # bytes of x in a step at most: of 16 MiB, two blocks, beside words


class Blocks(NamedTuple):
    """Rows of x, rows of w and columns of w in a step."""

    m: int
    k: int
    n: int

    def steps(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        """The grid of a product [m, k] x [k, n]: along m, n, k."""
        return -(-m // self.m), -(-n // self.n), -(-k // self.k)


def choose(m: int, k: int, n: int, *, stacked: int, size: int = 0) -> Blocks:
    """Blocks of x [m, k] times w [k, n], where the matrix unit sees `stacked` rows for one of x.

    On-chip memory holds two blocks of everything, one of them on its way: the 2M weights of a step
    are 512 KiB at 2 bits, and 2 MiB at 8. Of a narrow w they would be so many rows that x, not w,
    fills the memory, and a step has fewer.

    Args:
      size: bytes that an entry of x takes there, as operands and scales; 0: one for each of
        `stacked`.

    >>> choose(1, 4096, 4096, stacked=2), choose(200, 11008, 576, stacked=2)
    (Blocks(m=8, k=2048, n=1024), Blocks(m=128, k=4096, n=384))
    >>> choose(8, 16384, 128, stacked=2), choose(128, 16384, 128, stacked=2)
    (Blocks(m=8, k=16384, n=128), Blocks(m=128, k=8192, n=128))
    >>> choose(80, 4096, 4096, stacked=3).m, choose(64, 4096, 4096, stacked=3).m
    (64, 64)
    """
    rows = min(whole(STACKED // stacked, stacked), -(-m // 8) * 8)
    columns = _columns(n)
    most = min(STEP // columns, ROWS // (rows * (size or stacked)))
    # Steps of equal depth: the last would else be mostly empty.
    depth = -(-k // DEPTH)
    steps = -(-depth // max(1, most // DEPTH))
    return Blocks(rows, -(-depth // steps) * DEPTH, columns)


def whole(rows: int, stacked: int) -> int:
    """The most rows of x, up to so many, of which a block can be one of several.

    The compiler wants whole tiles of a block, unless it is all there is: 32 rows of 8-bit operands.

    >>> whole(85, 3), whole(128, 2), whole(2, 96)
    (64, 128, 8)
    """
    unit = max(8, TILE // math.gcd(TILE, stacked))
    return max(1, rows // unit) * unit


def _columns(n: int) -> int:
    """Whole registers of lanes; an even number of blocks, for two cores may share them."""
    if n <= 2 * LANES:
        return -(-n // LANES) * LANES
    count = 2 * -(-n // (2 * WIDTH))
    return -(-n // (count * LANES)) * LANES
