"""One matrix: change of variables, rounding, and how much of the output was lost."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.methods import Method
from jaxquant.rounding import Moments


class Report(NamedTuple):
    """What rounding one matrix met, as arrays.

    Attributes:
      loss: tr(H E H_out E^T) over the same of W: the relative proxy loss, undamped, with the
        identity for a moment that is not known.
      damping: fraction of mean(diag H) that was added; 0 without feedback.
      dead: input channels that calibration never saw active.
    """

    loss: Float[Array, ""]
    damping: Float[Array, ""]
    dead: Array


class Keys(NamedTuple):
    """Randomness of the input transform (shared by weights that share an input) and the rest."""

    input: Array
    own: Array


@partial(jax.jit, static_argnames="method")
def round_matrix(
    w: Float[Array, "k n"], moments: Moments, keys: Keys, method: Method
) -> tuple[dict[str, Array], Report]:
    """Packed data of a matrix, the transforms' arrays among them, and a report."""
    w = w.astype(jnp.float32)
    own, output_key = jax.random.split(keys.own)
    data = {}
    if (side := method.input) is not None:
        seen = 1.0 if moments.input is None else jnp.diagonal(moments.input)
        arrays = side.fit(seen * jnp.mean(w**2, 1), keys.input)
        data |= {f"input.{name}": a for name, a in arrays.items()}
        w = side.apply(w.T, arrays).T
        moments = moments._replace(input=_rotated(moments.input, side, arrays))
    if (side := method.output) is not None:
        seen = 1.0 if moments.output is None else jnp.diagonal(moments.output)
        arrays = side.fit(seen * jnp.mean(w**2, 0), output_key)
        data |= {f"output.{name}": a for name, a in arrays.items()}
        w = side.apply(w, arrays)
        moments = moments._replace(output=_rotated(moments.output, side, arrays))
    codes, found = method.rounder(w, method.format, moments, own)
    error = w - method.format.dequantize(codes, w.shape[0])
    loss = _energy(error, moments) / jnp.maximum(_energy(w, moments), 1e-30)
    return codes | data, Report(loss, found["damping"], found["dead"])


def _rotated(gram: Array | None, side: Any, arrays: dict[str, Array]) -> Array | None:
    """A^T H A."""
    return None if gram is None else side.apply(side.apply(gram, arrays).T, arrays)


def _energy(e: Float[Array, "k n"], moments: Moments) -> Float[Array, ""]:
    """tr(H E H_out E^T)."""
    right = e if moments.output is None else e @ moments.output
    return jnp.sum(right * (e if moments.input is None else moments.input @ e))
