"""The part of a matrix that a step decodes, and its words."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import activations as forms
from pallas_kernels.gpu import triton

LEAST_DEPTH = {
    "float": 16,
    "int8": 32,
    "int8/256": 32,
    "codes": 32,
}  # channels of one tensor core instruction


def depth(unit: int, group_size: int, k: int, activations: str, most: int = 128) -> int:
    """Return the number of channels of a tile, or 0 if none is possible.

    It is a power of two, such that every tile lies within one group.

    Args:
      unit: number of codes in the smallest run of whole words.
      group_size: number of channels that share a scale.
      k: number of channels.
      activations: how x is rounded.
      most: maximum number of channels.

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
    """Return the reason why there is no `depth`.

    Args:
      unit, group_size, activations: as in `depth`.
    """
    return f"on a GPU, {max(unit, LEAST_DEPTH[activations])} must divide group_size = {group_size}"


def units(
    ref, whole: tuple[int, int], tile: Array, start: Array, count: int, words: int = 1
) -> list[Int32[Array, "count columns"]]:
    """Return the words of this program's columns in units start ... start + count - 1.

    Args:
      ref: words down the program's columns.
      whole: shape of the array; entries outside are read as zero.
      tile: index of the program along the columns.
      start: first unit.
      count: number of units.
      words: number of words per unit; each has an array of its own in the result.
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
    """Return the words of the given rows.

    Args:
      ref: words down the program's columns.
      whole: shape of the array; entries outside are read as zero.
      tile: index of the program along the columns.
      row: row indices.
      step: a divisor of all ranges of rows. If it also divides the length, no row is outside.
      start: if given, the rows are contiguous from there on.
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
