"""Integers with a scale per row and per column, and escapes for those that exceed their bits.

    w = step_i scale_j v_ij

The integer v is a code of `bits` bits (`layout`) plus, if the code cannot represent it, an escape:
a word with the row in its low 16 bits and the remainder of v in its high 16 bits. Escapes are
stored column by column, and `ranges` gives the start and end of those of each column. Escapes
outside every range belong to no column and are ignored.

A product is computed by the packed-code kernels on x times the steps, plus a sum over escapes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import activations as forms
from pallas_kernels.codecs import layout
from pallas_kernels.kernel import Kernel

MOST_ROWS = 1 << 16


def dequantize(
    codes: Int32[Array, "w n"],
    scale: Float[Array, "1 n"],
    step: Float[Array, " k"],
    ranges: Int32[Array, "2 n"],
    escapes: Int32[Array, " e"],
    *,
    bits: int,
    k: int,
) -> Float[Array, "k n"]:
    """Return the float32 weights.

    Args:
      codes: int32 words [w, n], codes packed along k (`layout.pack`).
      scale: [1, n], the scale of each column.
      step: [k], the scale of each row.
      ranges: int32 [2, n], the first escape of each column and the one past its last.
      escapes: int32 [e], column by column.
      bits: number of bits per code, 2, 3, 4 or 8.
      k: number of rows.
    Returns:
      float32 [k, n].

    >>> codes, ranges = layout.pack(jnp.array([[7], [-2]]), 4), jnp.array([[0], [1]])
    >>> parts = jnp.array([[0.5]]), jnp.array([1.0, 4.0]), ranges, jnp.array([3 << 16 | 0])
    >>> dequantize(codes, *parts, bits=4, k=2).ravel().tolist()
    [5.0, -4.0]
    """
    v = layout.unpack(codes, bits, k)
    row, value, column = _escaped(ranges, escapes)
    v = v.at[row, column].add(value, mode="drop")
    return step.astype(jnp.float32)[:, None] * scale.astype(jnp.float32) * v


def _escaped(ranges: Array, escapes: Array) -> tuple[Array, Array, Array]:
    """Return the row, value and column of every escape; column n means that it belongs to none."""
    at, n = jnp.arange(escapes.shape[0]), ranges.shape[1]
    # The last column that begins at or before the escape. Columns without escapes share the start
    # of the next column that has some, and precede it.
    column = jnp.searchsorted(ranges[0], at, side="right", method="compare_all") - 1
    mine = (column >= 0) & (at < ranges[1, jnp.maximum(column, 0)])
    return escapes & 0xFFFF, escapes >> 16, jnp.where(mine, column, n)


def split(
    values: Int[np.ndarray, "k n"], bits: int
) -> tuple[Int[np.ndarray, "k n"], Int32[np.ndarray, "2 n"], Int32[np.ndarray, " e"]]:
    """Return clamped codes, and the ranges and escapes of the integers that exceed them.

    Runs on the host, with NumPy.

    Args:
      values: int16 [k, n].
      bits: number of bits per code.
    Returns:
      codes [k, n], ranges int32 [2, n] and escapes int32 [e].

    >>> codes, ranges, escapes = split(np.array([[1, 9], [-2, -9]], np.int16), 4)
    >>> codes.tolist(), ranges.tolist(), escapes.tolist()
    ([[1, 7], [-2, -8]], [[0, 0], [0, 2]], [131072, -65535])
    """
    codes = np.clip(values, -(1 << bits - 1), (1 << bits - 1) - 1)
    row, column = np.nonzero(codes != values)
    order = np.argsort(column, kind="stable")
    row, column = row[order], column[order]
    rest = values[row, column].astype(np.int32) - codes[row, column]
    ends = np.cumsum(np.bincount(column, minlength=values.shape[1]))
    ranges = np.stack([np.concatenate([[0], ends[:-1]]), ends]).astype(np.int32)
    return codes, ranges, (rest << 16 | row).astype(np.int32)


def by_packed(packed: Callable[..., Array]) -> Callable[..., Array]:
    """Return the dual-scale product built on a packed-code product; XLA adds the escapes.

    Args:
      packed: product with the signature of `reference.packed_matmul`.
    Returns:
      A function with the signature of `ops.dual_scale_matmul`.
    """

    def call(
        x: Float[Array, "m k"],
        codes: Int32[Array, "w n"],
        scale: Float[Array, "1 n"],
        step: Float[Array, " k"],
        ranges: Int32[Array, "2 n"],
        escapes: Int32[Array, " e"],
        *,
        bits: int,
        activations: str = "float",
    ) -> Float[Array, "m n"]:
        x = (forms.rounded(x, activations).astype(jnp.float32) * step).astype(x.dtype)
        y = packed(x, codes, scale, None, bits=bits, group_size=x.shape[1])
        row, value, column = _escaped(ranges, escapes)
        terms = x.astype(jnp.float32).T[row] * value[:, None]
        sums = jax.ops.segment_sum(terms, column, ranges.shape[1] + 1)[:-1]
        return y + sums.T * scale.astype(jnp.float32)

    return call


def over(packed: Kernel) -> Kernel:
    """Return a platform's dual-scale kernel, built on its packed-code kernel.

    Args:
      packed: the platform's kernel of packed codes.
    """

    def serves(x, codes, scale, step, ranges, escapes, *, bits: int, activations: str = "float"):
        return packed.serves(x, codes, scale, None, bits=bits, group_size=x.shape[1])

    return Kernel(by_packed(packed.call), serves)
