"""Exact scaling by powers of two, to keep intermediate results in the range of float32.

The square of a float32 overflows above about 1e19 and underflows below about 1e-19; sums and
products of squares do so earlier. Computations that depend on ratios alone are therefore done on
arrays scaled so that the largest entry lies in [1/2, 1). One program then serves every magnitude,
and gives the same codes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.core.hosts import on_host


def exponent(
    x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Int[Array, "..."]:
    """Return the e with 2**(e - 1) <= max |x| < 2**e, or 0 if x is zero.

    Args:
      x: the values.
      axis: axes over which the maximum is taken; they are kept with size 1. None: all axes, giving
        a scalar.

    Returns:
      int32 exponents.

    >>> exponent(jnp.array([3.0, -4.0])).tolist(), exponent(jnp.zeros(2)).tolist()
    (3, 0)
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis, initial=0, keepdims=axis is not None)
    e = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    return jnp.where(largest > 0, e - 126, 0)


def shifted(x: Float[Array, "..."], e: Int[Array, "..."] | int) -> Float[Array, "..."]:
    """Return x 2**e in float32, exact wherever the result is a normal number.

    Args:
      x: the values.
      e: the exponent, |e| <= 252.

    >>> shifted(jnp.array([3.0]), 2).tolist(), shifted(jnp.array([2.0**120]), -150).tolist()
    ([12.0], [9.313225746154785e-10])
    """
    first = jnp.asarray(e, jnp.int32) >> 1  # 2**e itself may be out of float32's range
    return x.astype(jnp.float32) * _power(first) * _power(e - first)


def _power(e: Int[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def unit(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Int[Array, ""]]:
    """Return (x 2**-e, e) such that the largest |x| 2**-e lies in [1/2, 1).

    >>> unit(jnp.array([3.0, -4.0]))[0].tolist()
    [0.375, -0.5]
    """
    e = exponent(x)
    # The barrier keeps compilers from fusing this with later code, which could reorder sums.
    return jax.lax.optimization_barrier(shifted(x, -e)), e


def ratios(x: Float[Array, "..."] | None) -> PyTree:
    """Return `unit(x)[0]`, for quantities that matter only up to a factor; None if x is None."""
    return None if x is None else unit(x)[0]


def sizes(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Return max |x| as float64 on the host; subnormal float32 numbers count too.

    Args:
      x: the values.
      axis: axes over which the maximum is taken; None: all.

    >>> sizes(jnp.array([[1.0, -2.0], [0.0, 2.0**-140]]), 1) == [2, 2.0**-140]
    array([ True,  True])
    """
    return on_host(largest_bits(x, axis)).view(np.float32).astype(np.float64)


@partial(jax.jit, static_argnums=1)
def largest_bits(x: Float[Array, "..."], axis: int | tuple[int, ...] | None) -> Int[Array, "..."]:
    """Return the bits of max |x|; see `sizes`.

    Bits are compared, because arithmetic may flush subnormal numbers to zero.

    Args:
      x, axis: as in `sizes`.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return jnp.max(bits, axis, initial=0)
