"""Block sizes of a product in closed form: what one grid step holds and multiplies."""

import math
from typing import NamedTuple

STACKED = 256  # rows in the matrix unit at a time, including planes and parts of x
STEP = 1 << 21  # weights per step, enough to make its fixed cost of some 200 cycles negligible
LANES = 128
TILE = 32  # rows of 8-bit operands in a tile
DEPTH = 512  # divisor of blocks of k: whole tiles of words at any number of bits
WIDTH = 1024  # maximum number of columns per step
ROWS = 1 << 21  # maximum bytes of x per step; 16 MiB hold two such blocks and the words


class Blocks(NamedTuple):
    """Block sizes.

    Attributes:
      m: number of rows of x in a step.
      k: number of rows of w in a step.
      n: number of columns of w in a step.
    """

    m: int
    k: int
    n: int

    def steps(self, m: int, k: int, n: int) -> tuple[int, int, int]:
        """Return the grid of a product [m, k] x [k, n]: numbers of steps along m, n and k.

        Args:
          m, k, n: shape of the product.
        """
        return -(-m // self.m), -(-n // self.n), -(-k // self.k)


def choose(m: int, k: int, n: int, *, stacked: int, size: int = 0) -> Blocks:
    """Return blocks of x [m, k] times w [k, n].

    On-chip memory holds two blocks of every array, one of them being loaded. The 2M weights of a
    step are 512 KiB at 2 bits and 2 MiB at 8. For a narrow w they would have so many rows that x
    instead of w would fill the memory, so a step has fewer weights.

    Args:
      m, k, n: shape of the product.
      stacked: number of rows in the matrix unit for each row of x.
      size: bytes per entry of x in on-chip memory, as operands and scales; 0 means one byte for
        each of `stacked`.

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
    # Steps have equal depth, because otherwise the last one could be mostly empty.
    depth = -(-k // DEPTH)
    steps = -(-depth // max(1, most // DEPTH))
    return Blocks(rows, -(-depth // steps) * DEPTH, columns)


def whole(rows: int, stacked: int) -> int:
    """Return the largest number of rows of x, at most `rows`, that a block among several can have.

    The compiler requires a block to consist of whole tiles, 32 rows of 8-bit operands, unless it is
    the only one.

    Args:
      rows: upper limit of the rows of x.
      stacked: number of rows in the matrix unit for each row of x.

    >>> whole(85, 3), whole(128, 2), whole(2, 96)
    (64, 128, 8)
    """
    unit = max(8, TILE // math.gcd(TILE, stacked))
    return max(1, rows // unit) * unit


def _columns(n: int) -> int:
    """Return a width in whole registers of lanes.

    The number of blocks is even, because two cores may share them.
    """
    if n <= 2 * LANES:
        return -(-n // LANES) * LANES
    count = 2 * -(-n // (2 * WIDTH))
    return -(-n // (count * LANES)) * LANES
