"""Decoding of scalar codebook formats: a scale times the value of a code in a fixed table."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.codecs import layout


def values(codes: Int[Array, "..."], table: tuple[float, ...] | str) -> Float[Array, "..."]:
    """Return the float32 value of every code.

    Args:
      codes: integers of which only the low bits are used.
      table: 4, 8 or 16 values in code order, or the name of the float8 dtype whose bit patterns the
        codes are.

    >>> values(jnp.array([0, 3, -1]), (0.0, 1.0, 2.0, 5.0)).tolist()
    [0.0, 5.0, 5.0]
    >>> values(jnp.array([56, -72]), "float8_e4m3fn").tolist()
    [1.0, -1.0]
    """
    if isinstance(table, str):
        floats = jax.lax.bitcast_convert_type(codes.astype(jnp.int8), jnp.dtype(table))
        return floats.astype(jnp.float32)
    # Selects, bit by bit, because they fuse with the unpacking; a gather would not, and is slow on
    # a TPU.
    found = [jnp.float32(v) for v in table]
    for bit in range(len(table).bit_length() - 1):
        high = (codes >> bit) & 1 == 1
        found = [jnp.where(high, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def dequantize(
    codes: Int32[Array, "... w n"],
    scale: Float[Array, "... g n"],
    *,
    table: tuple[float, ...] | str,
    bits: int,
    group_size: int,
    k: int,
) -> Float[Array, "... k n"]:
    """Return the float32 weights of packed codes: scale * table[code].

    Args:
      codes: int32 words [..., words(k, bits), n], packed along k (`layout.pack`).
      scale: [..., groups, n], or [..., 1, 1] if one scale serves the matrix.
      table: as in `values`.
      bits: number of bits per code, 2, 3, 4 or 8.
      group_size: number of rows that share a scale; groups = ceil(k / group_size).
      k: number of rows, given because the packed axis may be padded.
    Returns:
      [..., k, n].

    >>> codes = layout.pack(jnp.array([[1], [3]]), 2)
    >>> table = (0.0, 1.0, 2.0, 5.0)
    >>> w = dequantize(codes, jnp.array([[2.0]]), table=table, bits=2, group_size=2, k=2)
    >>> w.ravel().tolist()
    [2.0, 10.0]
    """
    v = values(layout.unpack(codes, bits, k), table)
    *batch, groups, _ = scale.shape
    full = groups * group_size
    v = jnp.pad(v, [*[(0, 0)] * len(batch), (0, full - k), (0, 0)])  # a short last group
    v = v.reshape(*batch, groups, group_size, -1)
    w = v * scale.astype(jnp.float32)[..., None, :]
    return w.reshape(*batch, full, -1)[..., :k, :]
