"""The number of bytes that the arrays of a program take on each device of a slice."""

import itertools
import math
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from jaxquant_models.runs.pod_programs import Program

LANES, SUBLANES = 128, 8  # of a TPU's vector register; arrays are padded to tiles of its shape


def device_bytes(program: Program) -> dict[str, int]:
    """Return the bytes that each argument of a program takes on one device, with padding.

    Args:
      program: the program.
    Returns:
      The bytes by the name of the argument.
    """
    return {
        name: tree_device_bytes(tree, program.shardings[name])
        for name, tree in program.arguments.items()
    }


def tree_device_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Return the bytes that a tree of arrays takes on one device, with padding.

    Args:
      tree: tree of `jax.ShapeDtypeStruct`s.
      shardings: a tree of the same structure, of `Sharding`s or of `Format`s (a layout and a
        sharding).
    """
    leaves, at = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    total = 0
    for a, s in zip(leaves, at, strict=True):
        shape = getattr(s, "sharding", s).shard_shape(a.shape)
        total += padded_bytes(shape, a.dtype.itemsize)
    return total


def padded_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the number of bytes that an array takes in the memory of a TPU.

    The array is stored in tiles. A tile has 128 elements along the minor axis and 8 along the next
    axis, or fewer if that axis is shorter: a power of two that fills at least one 32-bit word. The
    compiler is assumed to order the axes in the way that takes the fewest bytes.

    Args:
      shape: shape of the array.
      itemsize: bytes of one element.

    >>> padded_bytes((80, 16, 1024), 4) == 80 * 16 * 1024 * 4
    True
    >>> padded_bytes((3, 130), 4) == 4 * 256 * 4
    True
    """
    if len(shape) < 2:
        return max(1, math.prod(shape)) * itemsize
    pack = max(1, 4 // itemsize)

    def size(minor: int, second: int) -> int:
        rows = shape[second]
        tile = min(SUBLANES, max(pack, 1 << (rows - 1).bit_length())) if rows else 1
        others = math.prod(n for i, n in enumerate(shape) if i not in (minor, second))
        return others * _up(rows, tile) * _up(shape[minor], LANES) * itemsize

    return min(size(*pair) for pair in itertools.permutations(range(len(shape)), 2))


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
