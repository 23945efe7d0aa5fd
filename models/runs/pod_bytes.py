"""Bytes that the arrays of a program take on every device of a slice."""

import itertools
import math
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from jaxquant_models.runs.pod_programs import Program

LANES, SUBLANES = 128, 8  # of a TPU's vector registers, whose tiles arrays are padded to


def device_bytes(program: Program) -> dict[str, int]:
    """Return the bytes of a device's part of each argument of a program, with padding.

    Args:
      program: the program.
    """
    return {
        name: tree_device_bytes(tree, program.shardings[name])
        for name, tree in program.arguments.items()
    }


def tree_device_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Return the bytes of a device's part of a tree of shapes, with padding.

    Args:
      tree: tree of shapes.
      shardings: the same tree with shardings, or layouts with shardings.
    """
    leaves, at = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    total = 0
    for a, s in zip(leaves, at, strict=True):
        shape = getattr(s, "sharding", s).shard_shape(a.shape)
        total += padded_bytes(shape, a.dtype.itemsize)
    return total


def padded_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of an array in the memory of a TPU.

    It consists of tiles of 128 numbers along the minor axis, and of 8 along the next, or fewer
    where that axis is shorter: a power of two, and at least one 32-bit word. The compiler lays out
    the axes in the order that takes the fewest bytes.

    Args:
      shape: the shape.
      itemsize: bytes of a number.

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
