"""Straight-through estimators: values with the gradient of what they were rounded from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def through(x: Float[Array, "..."], value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `value` with the gradient of `x` (Bengio et al. 2013, arXiv:1308.3432).

    Args:
      x: the array that receives the gradient.
      value: the rounded array, same shape.

    >>> jax.grad(lambda x: 3 * through(x, jnp.round(x)))(1.4).item()
    3.0
    """
    return value


@through.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return through(*primals), tangents[0]


def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round to the nearest integers, halves to even, with a straight-through gradient.

    >>> rounded(jnp.array([0.5, 1.5, -0.6])).tolist()
    [0.0, 2.0, -1.0]
    """
    return through(x, jnp.round(x))


def nearest_codes(
    v: Float[Array, "..."], zero: Float[Array, "..."], limits: tuple[int, int]
) -> Float[Array, "..."]:
    """Round to the nearest codes and clamp, with a straight-through gradient inside the limits.

    Beyond the limits the gradient is 0. At a code equal to a limit it is one half, which is how
    `jnp.clip` splits it at a tie.

    Args:
      v: values in steps from the zero point.
      zero: the zero points, which are added after rounding.
      limits: the lowest and the highest code.

    >>> total = lambda v: jnp.sum(nearest_codes(v, 0.0, (-2, 1)))
    >>> jax.grad(total)(jnp.array([-3.0, -2.2, 0.3, 1.4])).tolist()
    [0.0, 0.5, 1.0, 0.5]
    """
    return jnp.clip(rounded(v) + zero, *limits)
