"""Activations as the kernels read them: rows of float16 or int8.

Rows of float16 are scaled by powers of two so that the largest entry is in [2**14, 2**15). Neither
bfloat16's range nor the fields' factors 2**-p (`lanes`) then lose significant bits: an entry keeps
eight bits down to 2**-20 of the largest. One row represents bfloat16 or float16 exactly enough;
float32 takes two, the rounded value and the remainder, 22 bits together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import activations as forms

TOP = 14  # exponent of a row's largest entry
ONE = 2.0**-24  # the value of a float16 whose bits are 1


class Rows(NamedTuple):
    """Rows of activations in `parts` blocks of m.

    Attributes:
      codes: float16 or int8 [parts m, k].
      unit: float32 [m, 1]; x is unit times the sum over parts. NaN where a row is not finite.
      scale: float32 [parts m, runs], further factors of runs of channels; None if all are 1.
    """

    codes: Float[Array, "rows k"]
    unit: Float32[Array, "m 1"]
    scale: Float32[Array, "rows runs"] | None


def parts(dtype: jnp.dtype, activations: str) -> int:
    """Return the number of rows that one row of x becomes.

    Args:
      dtype: dtype of x.
      activations: how x is rounded.

    >>> parts(jnp.dtype("float32"), "float"), parts(jnp.dtype("float32"), "int8")
    (2, 1)
    """
    return 2 if activations == "float" and dtype == jnp.float32 else 1


def make(x: Float[Array, "m k"], activations: str, integer: bool = False) -> Rows:
    """Return the rows of x in one of `activations.FORMS`.

    Args:
      x: activations [m, k].
      activations: how x is rounded.
      integer: whether integer codes are int8; otherwise they are float16.

    >>> rows = make(jnp.array([[3.0, 2.0**-22]]), "float")
    >>> (rows.codes.sum(0) * rows.unit).tolist()
    [[3.0, 2.384185791015625e-07]]
    """
    if activations != "float":
        q, s = forms.quantize(x, activations)
        q = q if integer else q.astype(jnp.float16)
        return (
            Rows(q, jnp.ones_like(s[:, :1]), s) if activations == "int8/256" else Rows(q, s, None)
        )
    count = parts(x.dtype, activations)
    x, factor = forms.finite_rows(x.astype(jnp.float32))
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    exponent = jnp.clip(_exponent(largest), -100, 127)  # -100 for a row of zeros
    x = x * _power(TOP - exponent)
    first = x.astype(jnp.float16)
    rest = [(x - first.astype(jnp.float32)).astype(jnp.float16)][: count - 1]
    return Rows(jnp.concatenate([first, *rest]), _power(exponent - TOP) * factor, None)


def _exponent(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def _power(exponent: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """Return 2**exponent, exactly."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
