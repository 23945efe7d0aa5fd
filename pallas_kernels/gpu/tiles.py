"""Which part of a matrix a step decodes, and its words."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import activations as forms
from pallas_kernels.gpu import adapter

LEAST_DEPTH = {"float": 16, "int8": 32, "int8/256": 32}  # of one tensor core instruction


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


def units(
    ref, whole: tuple[int, int], start: Array, count: int, words: int = 1
) -> list[Int32[Array, "count columns"]]:
    """Words of this program's columns, those of units start ... start + count.

    Args:
      ref: words down the program's columns.
      whole: shape of the array, past which is zero.
      start, count: units.
      words: of a unit; each has an array of its own.
    """
    shape = (count, ref.shape[1])
    length, n = whole
    mask = None
    if n % shape[1]:
        mask = adapter.program(0) * shape[1] + jnp.arange(shape[1]) < n
    found = []
    for i in range(words):
        row = ((start + jnp.arange(count)) * words + i)[:, None]
        here = row < length if length % (count * words) else None
        if mask is not None:
            here = mask[None, :] if here is None else here & mask[None, :]
        if here is not None:
            here = jnp.broadcast_to(here, shape)
        at = (adapter.span(start, count), slice(None))
        if words > 1:
            at = tuple(jnp.broadcast_to(t, shape) for t in (row, jnp.arange(shape[1])))
        found.append(adapter.load(ref.at[at], here))
    return found
