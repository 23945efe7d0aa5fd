"""Starts of training: floats that round to given codes."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

SAFE = 0.45  # of a step: how far a start may be from the value of its code


def in_bin(
    w: Float[Array, "k n"],
    value: Float[Array, "k n"],
    step: Float[Array, "k n"],
    rounded: Callable[[Array], Array],
) -> Float[Array, "k n"]:
    """Return w where it has the given code; elsewhere the nearest point safely in that code's bin.

    The point is at most 0.45 steps from the code's value. If it has another code as well, the value
    itself is returned.

    Args:
      w: the floats.
      value: the values of the codes.
      step: the step of the grid at every weight.
      rounded: function from floats to the values of their codes.
    """
    same = lambda a: rounded(a) == value
    nearer = value + jnp.clip(w - value, -SAFE * step, SAFE * step)
    return jnp.where(same(w), w, jnp.where(same(nearer), nearer, value))
