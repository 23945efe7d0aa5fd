"""Activations as rows that the matrix unit multiplies exactly: integers, or bfloat16 parts.

A row of x becomes `planes` rows, of which it is the weighted sum. Where `parts` groups of weights
share a slice of k, each of those becomes `parts` rows that are zero outside their group. All are
stacked along M, which costs little, because products of few rows are limited by loading weights
into the unit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pallas_kernels import activations as forms

INT8, BFLOAT16, FLOAT8 = "int8", "bfloat16", "float8_e4m3fn"
UNITS = (INT8, BFLOAT16, FLOAT8)
# (number of planes, weight of a plane relative to the next, largest code). Base 32 is the largest
# whose digits a float8 with 3 mantissa bits holds exactly; an int8 row has two digits of base 16.
_DIGITS = {
    ("float", INT8): (2, 256, 127 * 256),
    ("float", FLOAT8): (3, 32, 16 * 32 * 32),
    ("float", BFLOAT16): (2, 1, 0),
    ("int8", INT8): (1, 1, 127),
    ("int8", BFLOAT16): (1, 1, 127),
    ("int8", FLOAT8): (2, 16, 127),
}
_DIGITS |= {("codes", unit): _DIGITS["int8", unit] for unit in UNITS}
# [..., k] -> [..., k]: the columns of x in the order in which codes of w are decoded, run by run.
Order = Callable[[Array], Array]


class Rows(NamedTuple):
    """Rows of x for a kernel.

    Attributes:
      rows: [tiles * planes * parts * tile, k] of the unit's dtype, in that order.
      scale: float32 [blocks, m, 1], of each row and run of channels.
    """

    rows: Num[Array, "r k"]
    scale: Float[Array, "b m 1"]


def count(dtype: jnp.dtype, activations: str, unit: str) -> int:
    """Return the number of planes of a row.

    Args:
      dtype: dtype of x.
      activations: how x is rounded.
      unit: dtype of the matrix unit's operands, one of `UNITS`.

    >>> count(jnp.dtype("float32"), "float", "int8"), count(jnp.dtype("float32"), "int8", "int8")
    (2, 1)
    """
    if unit == BFLOAT16 and dtype == jnp.bfloat16:
        return 1
    return _DIGITS[activations.partition("/")[0], unit][0]


def radix(activations: str, unit: str) -> int:
    """Return the weight of a plane relative to that of the next.

    Args:
      activations: how x is rounded.
      unit: dtype of the matrix unit's operands, one of `UNITS`.
    """
    return _DIGITS[activations.partition("/")[0], unit][1]


def split(x: Float[Array, "m k"], activations: str, unit: str) -> tuple[Num[Array, "p m k"], Array]:
    """Return planes of x, and the float32 scale [m, blocks] of their weighted sum.

    For "float", the digits are those of codes of 16 bits (15 for float8); the error is at most half
    a step, absmax / 65024 (32768). Two bfloat16 planes of float32 keep 16 bits of every entry. A
    row that is not finite has planes of zeros and the scale NaN.

    Args:
      x: activations [m, k].
      activations: how x is rounded.
      unit: dtype of the matrix unit's operands, one of `UNITS`.

    >>> planes, scale = split(jnp.array([[1.0, -0.5]]), "float", "int8")
    >>> planes[:, 0].tolist(), round(float(1 / scale[0, 0]))
    ([[127, -63], [0, -128]], 32512)
    """
    planes, base, largest = _DIGITS[activations.partition("/")[0], unit]
    if activations != "float":
        q, scale = forms.quantize(x, activations)
        return _digits(q.astype(jnp.int32), planes, base).astype(unit), scale
    x, factor = forms.finite_rows(x)
    if unit == BFLOAT16:
        if x.dtype == jnp.bfloat16:
            return x[None], factor
        x = x.astype(jnp.float32)
        # Not a cast to bfloat16 and back, which XLA may eliminate.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return jnp.stack([high, x - high]).astype(jnp.bfloat16), factor
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = absmax / largest
    scale = jnp.where(scale >= forms.LEAST, scale, 1.0)
    code = jnp.clip(jnp.round(x / scale), -largest, largest).astype(jnp.int32)
    return _digits(code, planes, base).astype(unit), scale * factor


def _digits(code: Array, planes: int, base: int) -> Array:
    """Return signed digits [planes, ...], highest first, each in [-base / 2, base / 2)."""
    digits: list[Array] = []
    for _ in range(planes - 1):
        low = (code + base // 2) % base - base // 2
        digits.insert(0, low)
        code = (code - low) // base
    return jnp.stack([code, *digits])


def stack(
    planes: Num[Array, "p m k"], *, tile: int, k: int, size: int, parts: int, order: Order | None
) -> Num[Array, "r k"]:
    """Return rows for a kernel that takes `tile` rows of x at a time, zero-padded to k columns.

    Args:
      planes: [planes, m, columns].
      tile: number of rows of x at a time.
      k: number of columns.
      size: number of columns of a slice.
      parts: number of groups of equal size that share a slice.
      order: order of the columns, or None.
    """
    p, m, columns = planes.shape
    tiles = -(-m // tile)
    planes = jnp.pad(planes, ((0, 0), (0, tiles * tile - m), (0, k - columns)))
    rows = jnp.moveaxis(planes.reshape(p, tiles, tile, k), 1, 0)
    if parts > 1:
        owner = jnp.arange(k) % size // (size // parts)
        mask = (owner == jnp.arange(parts)[:, None])[:, None]  # [parts, 1, k]
        rows = jnp.where(mask, rows[:, :, None], jnp.zeros((), rows.dtype))
    rows = rows.reshape(-1, k)
    return order(rows) if order else rows
