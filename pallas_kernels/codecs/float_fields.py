"""The bits of floats as exponents, and signs above mantissas; both packed into words.

Rests, as sign and mantissa are called together, are packed along the rows of a matrix (`layout`).
Those wider than 8 bits are cut into planes, low bits first (`DTYPES`), one after another.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt

from pallas_kernels.codecs import layout

# dtype -> number of exponent bits, widths of the planes of the rest.
DTYPES: dict[str, tuple[int, tuple[int, ...]]] = {
    "bfloat16": (8, (8,)),
    "float16": (5, (8, 3)),
    "float32": (8, (8, 8, 8)),
    "float8_e4m3fn": (4, (4,)),
    "float8_e5m2": (5, (3,)),
}


def unsigned(dtype: str) -> jnp.dtype:
    """Return the unsigned integer dtype with the bits of a float dtype.

    Args:
      dtype: a key of `DTYPES`.

    >>> unsigned("bfloat16").name
    'uint16'
    """
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def fields(bits: UInt[Array, "*s"], dtype: str) -> tuple[Int32[Array, "*s"], Int32[Array, "*s"]]:
    """Return the exponents of floats, and their other bits: the sign above the mantissa.

    Args:
      bits: the bits of the floats, of `unsigned(dtype)`.
      dtype: a key of `DTYPES`.

    >>> one = jax.lax.bitcast_convert_type(jnp.array([-1.5], jnp.bfloat16), jnp.uint16)
    >>> [a.tolist() for a in fields(one, "bfloat16")]
    [[127], [192]]
    """
    width, mantissa = _widths(dtype)
    u = bits.astype(jnp.uint32)
    sign = u >> (width + mantissa) << mantissa
    exponent = u >> mantissa & ((1 << width) - 1)
    return exponent.astype(jnp.int32), (sign | u & ((1 << mantissa) - 1)).astype(jnp.int32)


def joined(exponent: Int32[Array, "*s"], rest: Int32[Array, "*s"], dtype: str) -> UInt[Array, "*s"]:
    """Return the bits of floats with these fields; the inverse of `fields`.

    Args:
      exponent, rest: the fields.
      dtype: a key of `DTYPES`.
    """
    width, mantissa = _widths(dtype)
    e, r = exponent.astype(jnp.uint32), rest.astype(jnp.uint32)
    sign = r >> mantissa << (width + mantissa)
    return (sign | e << mantissa | r & ((1 << mantissa) - 1)).astype(unsigned(dtype))


def _widths(dtype: str) -> tuple[int, int]:
    """Return the numbers of exponent and mantissa bits."""
    width, rest = DTYPES[dtype]
    return width, sum(rest) - 1


def floats(u: UInt[Array, "*s"], dtype: str) -> Float[Array, "*s"]:
    """Return the floats that have these bits, in their dtype.

    Args:
      u: the bits, of `unsigned(dtype)`.
      dtype: a key of `DTYPES`.
    """
    return jax.lax.bitcast_convert_type(u, jnp.dtype(dtype))


def check_size(k: int, n: int) -> None:
    """Raise ValueError if a matrix has too many floats for places of 31 bits.

    Args:
      k, n: number of rows and columns.
    """
    if k * n >= (1 << 31) - 1:
        raise ValueError(f"a matrix must have fewer than 2^31 - 1 floats, got {k} x {n}; split it")


# --- words of rests ---------------------------------------------------------------------------


def rest_words(k: int, dtype: str) -> int:
    """Return the number of words of `rest` for a column of k floats.

    Args:
      k: number of rows.
      dtype: a key of `DTYPES`.

    >>> rest_words(128, "bfloat16"), rest_words(128, "float16")
    (32, 44)
    """
    return sum(layout.words(k, width) for width in DTYPES[dtype][1])


def packed_rests(rest: Int32[Array, "k n"], dtype: str) -> Int32[Array, "r n"]:
    """Return the words of signs and mantissas; the inverse of `rests`.

    Args:
      rest: signs and mantissas, as `fields` returns them.
      dtype: a key of `DTYPES`.
    """
    planes, low = [], 0
    for width in DTYPES[dtype][1]:
        planes.append(layout.pack(rest >> low, width))
        low += width
    return jnp.concatenate(planes)


def rests(rest: Int32[Array, "r n"], dtype: str, k: int) -> Int32[Array, "k n"]:
    """Return sign and mantissa of every float, as `fields` does.

    Args:
      rest: the packed words.
      dtype: a key of `DTYPES`.
      k: number of rows.
    """
    total, at, low = jnp.zeros((k, rest.shape[1]), jnp.int32), 0, 0
    for width in DTYPES[dtype][1]:
        size = layout.words(k, width)
        part = layout.unpack(rest[at : at + size], width, k) & ((1 << width) - 1)
        total, at, low = total | part << low, at + size, low + width
    return total


def rests_at(
    rest: Int32[Array, "r n"],
    row: Int32[Array, " e"],
    column: Int32[Array, " e"],
    dtype: str,
    k: int,
) -> Int32[Array, " e"]:
    """Return sign and mantissa of single floats.

    Args:
      rest: the packed words.
      row, column: where the floats are.
      dtype: a key of `DTYPES`.
      k: number of rows.
    """
    total, at, low = jnp.zeros(len(row), jnp.int32), 0, 0
    for width in DTYPES[dtype][1]:
        run, per = layout.unit(width)
        first = at + row // run * per
        words = jnp.stack([rest[first + i, column] for i in range(per)])
        codes = layout.unpack(words, width, run) & ((1 << width) - 1)
        total |= codes[row % run, jnp.arange(len(row))] << low
        at, low = at + layout.words(k, width), low + width
    return total
