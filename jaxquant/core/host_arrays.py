"""NumPy arrays that JAX takes over without a copy, so that large ones are in memory only once."""

import math

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

ALIGNED = 64  # bytes; at a multiple of these begins every array of JAX on a CPU


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Return an array with arbitrary contents, which `taken` takes over without a copy on a CPU.

    Args:
      shape: its shape.
      dtype: its dtype, of at least one byte.

    >>> a = aligned((3, 2), np.float32)
    >>> a.shape, a.ctypes.data % ALIGNED
    ((3, 2), 0)
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


def taken(a: np.ndarray) -> Array:
    """Return the array of JAX with these contents; nothing may write to them from now on.

    Args:
      a: the array; one from `aligned` is copied only to devices other than a CPU.

    >>> a = aligned((4,), np.float32)
    >>> a[:] = 1
    >>> taken(a)
    Array([1., 1., 1., 1.], dtype=float32)
    """
    return jax.device_put(a, may_alias=True)
