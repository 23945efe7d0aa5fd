"""Rows sorted by expert, divided into tiles of equal size, each of which has a single expert.

The number of rows of an expert is known only when the program runs. The number of tiles has a
static bound, so a grid of that many tiles, each with the index of its expert, serves every division
of the rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

LEAST, MOST = 8, 128  # smallest and largest number of rows of a tile


class RowTiles(NamedTuple):
    """A division of m rows, sorted by expert, into t tiles of r rows.

    Attributes:
      experts: index of the expert of each tile, int32 [t]; a tile without rows has the expert of
        the last tile that has rows.
      rows: index of the row at each place of a tile, int32 [t, r], or m for an empty place.
      places: place of each row, counted over all t * r places, int32 [m], or t * r if the row
        belongs to no expert.
      used: number of tiles that have rows, int32 [1]; the tiles without rows come last.
    """

    experts: Int32[Array, "t"]
    rows: Int32[Array, "t r"]
    places: Int32[Array, " m"]
    used: Int32[Array, "1"]

    def gathered(self, x: Float[Array, "m k"]) -> Float[Array, "t r k"]:
        """Return the rows of x tile by tile, with zeros in empty places.

        Args:
          x: the rows.
        """
        return x.at[self.rows].get(mode="fill", fill_value=0)

    def scattered(self, y: Float[Array, "t r n"]) -> Float[Array, "m n"]:
        """Return the results in the order of the rows, with zeros for rows of no expert.

        Args:
          y: the results tile by tile.
        """
        flat = y.reshape(-1, y.shape[-1])
        return flat.at[self.places].get(mode="fill", fill_value=0)


def size(m: int, experts: int) -> int:
    """Return the number of rows of a tile, a power of two from 8 to 128.

    Within this range, it is the mean number of rows of an expert, rounded up to a power of two.

    Args:
      m: number of rows.
      experts: number of experts.

    >>> size(8, 128), size(4096, 128), size(1 << 16, 8)
    (8, 32, 128)
    """
    mean = -(-m // max(1, experts))
    return min(MOST, max(LEAST, 1 << (mean - 1).bit_length()))


def count(m: int, experts: int, rows: int) -> int:
    """Return the largest number of tiles that any division of the rows can need.

    Args:
      m: number of rows.
      experts: number of experts.
      rows: number of rows of a tile.

    >>> count(8, 128, 8), count(16, 2, 8)
    (8, 3)
    """
    return (m + min(m, experts) * (rows - 1)) // rows


def cut(group_sizes: Int[Array, "e"], m: int, rows: int) -> RowTiles:
    """Divide m rows into tiles; the first group_sizes[0] rows belong to expert 0, and so on.

    Sizes below zero count as zero, and the part of the sizes that exceeds m is ignored.

    Args:
      group_sizes: number of rows of each expert [e], integers.
      m: number of rows.
      rows: number of rows of a tile.

    >>> tiles = cut(jnp.array([1, 0, 3]), 5, 2)
    >>> tiles.experts.tolist(), tiles.rows.tolist(), tiles.places.tolist(), tiles.used.tolist()
    ([0, 2, 2, 2], [[0, 5], [1, 2], [3, 5], [5, 5]], [0, 2, 3, 4, 8], [3])
    """
    experts = len(group_sizes)
    tiles = count(m, experts, rows)
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), m)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    last = jnp.cumsum(-(-(ends - starts) // rows))  # end of the tiles of each expert
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), last[:-1]])
    owner = lambda ends, i: jnp.minimum(jnp.sum(i[:, None] >= ends, axis=1), experts - 1)
    tile, row = jnp.arange(tiles), jnp.arange(m)
    of_tile = owner(last, jnp.minimum(tile, last[-1] - 1)).astype(jnp.int32)
    place = (tile - first[of_tile])[:, None] * rows + jnp.arange(rows) + starts[of_tile][:, None]
    held = (tile < last[-1])[:, None] & (place < ends[of_tile][:, None])
    of_row = owner(ends, row)
    places = first[of_row] * rows + row - starts[of_row]
    return RowTiles(
        of_tile,
        jnp.where(held, place, m).astype(jnp.int32),
        jnp.where(row < ends[-1], places, tiles * rows).astype(jnp.int32),
        last[-1:],
    )


def one(stacks: tuple) -> list[jax.ShapeDtypeStruct | None]:
    """Return the shapes and dtypes of the arrays of one matrix of stacks.

    Args:
      stacks: arrays with a leading axis of experts, or None for absent ones.
    """
    drop = lambda a: None if a is None else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
    return [drop(a) for a in stacks]


def over(op: Callable[..., Array], x: Float[Array, "m k"], *arrays: Any, **static: Any) -> Array:
    """Return the products of the rows of x with the matrices of their experts, tile by tile.

    The words of one expert are decoded at a time, and decoded again in the backward pass.

    Args:
      op: the product with one matrix, a function of rows [m, k], the arrays of a matrix, and
        static arguments.
      x: rows sorted by expert [m, k].
      *arrays: the arrays of `op` after x, each with a leading axis of experts (None for absent
        ones), followed by the number of rows of each expert.
      **static: the static arguments of `op`.
    Returns:
      float32 [m, n].
    """
    *stacks, group_sizes = arrays
    (m, k), experts = x.shape, len(group_sizes)
    rows = size(m, experts)
    if m == 0 or experts == 0:
        tile = jax.ShapeDtypeStruct((rows, k), x.dtype)
        shape = jax.eval_shape(lambda x, *a: op(x, *a, **static), tile, *one(tuple(stacks)))
        return jnp.zeros((m, shape.shape[1]), shape.dtype)
    tiles = cut(group_sizes, m, rows)

    @jax.checkpoint
    def product(x: Array, expert: Array, stacks: list) -> Array:
        take = lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False)
        return op(x, *(None if a is None else take(a) for a in stacks), **static)

    y = jax.lax.map(lambda tile: product(*tile, stacks), (tiles.gathered(x), tiles.experts))
    return tiles.scattered(y)
