"""Which part of a matrix a step decodes, and its words."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import activations as forms
from pallas_kernels.gpu import triton

LEAST_DEPTH = {
    "float": 16,
    "int8": 32,
    "int8/256": 32,
    "codes": 32,
}  # of one tensor core instruction


def depth(unit: int, group_size: int, k: int, activations: str, most: int = 128) -> int:
    """Channels of a tile: a power of two, so many that it lies in one group; 0 if there is none.

    >>> depth(16, 128, 4096, "float"), depth(16, 96, 4096, "float"), depth(16, 40, 4096, "int8")
    (128, 32, 0)
    """
    fits = group_size & -group_size if group_size < k else 1 << 30
    if activations == "int8/256":
        fits = min(fits, forms.BLOCK)
    size = min(fits, most, 16 * unit, 1 << (k - 1).bit_length())
    least = max(unit, LEAST_DEPTH[activations])
    return 0 if fits < least else max(size, least)


def unfit(unit: int, group_size: int, activations: str) -> str:
    """Why there is no `depth`."""
    return f"on a GPU, {max(unit, LEAST_DEPTH[activations])} must divide group_size = {group_size}"


def units(
    ref, whole: tuple[int, int], tile: Array, start: Array, count: int, words: int = 1
) -> list[Int32[Array, "count columns"]]:
    """Words of this program's columns, those of units start ... start + count.

    Args:
      ref: words down the program's columns.
      whole: shape of the array, past which is zero.
      tile: the program's place among the columns.
      start, count: units.
      words: of a unit; each has an array of its own.
    """
    if words > 1:
        unit = start + jnp.arange(count)
        return [rows(ref, whole, tile, unit * words + i, count * words) for i in range(words)]
    return [rows(ref, whole, tile, start + jnp.arange(count), count, start)]


def rows(
    ref,
    whole: tuple[int, int],
    tile: Array,
    row: Int32[Array, "r"],
    step: int = 1,
    start: Array | None = None,
) -> Int32[Array, "r columns"]:
    """Words of these rows; if `start` is given, they are rows from there on.

    `step` divides all ranges of rows: where it divides the length too, none lies past it.
    """
    length, n = whole
    shape = (len(row), ref.shape[1])
    place = jnp.arange(shape[1])
    here = None
    if n % shape[1]:
        here = (tile * shape[1] + place < n)[None, :]
    if length % step:
        there = (row < length)[:, None]
        here = there if here is None else here & there
    if here is not None:
        here = jnp.broadcast_to(here, shape)
    if start is not None:
        return triton.load(ref.at[triton.span(start, len(row)), :], here)
    at = (jnp.broadcast_to(t, shape) for t in (row[:, None], place))
    return triton.load(ref.at[tuple(at)], here)
