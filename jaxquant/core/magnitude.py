"""Magnitudes: powers of two that are taken out of arrays, and given back, without rounding.

Squares of float32 leave its range beyond 1e19 and below 1e-19, and their sums and products sooner.
What depends on ratios alone is computed of arrays whose largest entry lies in [1/2, 1): so one
program, and the same codes, serve every magnitude.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree


def exponent(
    x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> Int[Array, "..."]:
    """The e of 2**(e - 1) <= max |x| < 2**e, along axes that stay, with one entry; 0 of zeros.

    >>> exponent(jnp.array([3.0, -4.0])).tolist(), exponent(jnp.zeros(2)).tolist()
    (3, 0)
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis, initial=0, keepdims=axis is not None)
    e = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    return jnp.where(largest > 0, e - 126, 0)


def shifted(x: Float[Array, "..."], e: Int[Array, "..."] | int) -> Float[Array, "..."]:
    """x 2**e in float32, exact wherever that is a normal number; |e| up to 252.

    >>> shifted(jnp.array([3.0]), 2).tolist(), shifted(jnp.array([2.0**120]), -150).tolist()
    ([12.0], [9.313225746154785e-10])
    """
    first = jnp.asarray(e, jnp.int32) >> 1  # 2**e itself may have no float32
    return x.astype(jnp.float32) * _power(first) * _power(e - first)


def _power(e: Int[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def unit(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Int[Array, ""]]:
    """(x 2**-e, e): the largest |x| comes to lie in [1/2, 1).

    >>> unit(jnp.array([3.0, -4.0]))[0].tolist()
    [0.375, -0.5]
    """
    e = exponent(x)
    # The barrier keeps compilers from merging this with what follows, in sums of another order.
    return jax.lax.optimization_barrier(shifted(x, -e)), e


def ratios(x: Float[Array, "..."] | None) -> PyTree:
    """x up to a power of two, the largest in [1/2, 1): of what is known up to a factor."""
    return None if x is None else unit(x)[0]


def sizes(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """max |x| in float64, on the host; numbers below float32's normal ones count too.

    >>> sizes(jnp.array([[1.0, -2.0], [0.0, 2.0**-140]]), 1) == [2, 2.0**-140]
    array([ True,  True])
    """
    return np.asarray(_largest_bits(x, axis)).view(np.float32).astype(np.float64)


@partial(jax.jit, static_argnums=1)
def _largest_bits(x: Float[Array, "..."], axis: int | tuple[int, ...] | None) -> Int[Array, "..."]:
    """Of floats that are not negative the order is that of their bits, which nothing flushes."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return jnp.max(bits, axis, initial=0)
