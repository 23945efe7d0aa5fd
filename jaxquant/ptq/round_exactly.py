"""Storing matrices in a format that keeps their bits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.tensor import Arrays
from jaxquant.methods.method import Method
from jaxquant.ptq.round_matrix import Report


def settled(method: Method, matrices: Float[Array, "l k n"], path: str) -> Method:
    """Return a method whose format has the sizes that these matrices need.

    Args:
      method: the method, whose format is `exact`.
      matrices: the matrices that are stored together.
      path: path of their leaf, for messages.
    Raises:
      ValueError: the method has transforms, or the format cannot hold weights of this dtype.
    """
    if method.input is not None or method.output is not None:
        raise ValueError(
            f"{path}: {method.name} has a transform, but a format that keeps the bits of the "
            "weights cannot be combined with one; use a method without transforms"
        )
    try:
        return dataclasses.replace(method, format=method.format.settled(matrices))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def unchanged(w: Float[Array, "k n"], method: Method) -> tuple[Arrays, Report]:
    """Return the arrays of one matrix in an `exact` format, and the report of no loss.

    Args:
      w: the matrix.
      method: the method, with its format settled.
    """
    u = jax.lax.bitcast_convert_type(w, jnp.dtype(f"uint{8 * w.dtype.itemsize}"))
    nothing = Report(jnp.float32(0), jnp.float32(0), jnp.int32(0))
    return Arrays(method.format.encode_bits(u), {}, {}, {}), nothing
