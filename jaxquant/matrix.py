"""One matrix: change of variables, rounding, and how much of the output was lost."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.methods import Method
from jaxquant.rounding import Moments
from jaxquant.rounding.moments import feedback_energies, living


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


# Feedback subtracts nearly equal sums; the ten bits that GPUs keep of float32 by default spoil it.
_exact = jax.default_matmul_precision("highest")


@partial(jax.jit, static_argnames="method")
@_exact
def round_matrix(
    w: Float[Array, "k n"], moments: Moments, keys: Keys, method: Method
) -> tuple[dict[str, Array], Report]:
    """Packed data of a matrix, the transforms' arrays among them, and a report."""
    w, moments, arrays = _transformed(w, moments, keys, method)
    codes, found = method.rounder(w, method.format, moments, keys.own)
    error = w - method.format.dequantize(codes, w.shape[0])
    loss = _energy(error, moments) / jnp.maximum(_energy(w, moments), 1e-30)
    return codes | arrays, Report(loss, found["damping"], found["dead"])


@partial(jax.jit, static_argnames=("method", "block"))
@_exact
def block_importance(
    w: Float[Array, "k n"], moments: Moments, keys: Keys, method: Method, block: int
) -> Float[Array, "k/block"]:
    """Loss per unit of relative distortion in each block of (transformed) rows.

    With error feedback the loss is sum_j D_j |n_j|^2 for the noise n_j that rounding row j adds.
    """
    w, moments, _ = _transformed(w, moments, keys, method)
    gram, _ = living(moments.input)
    d, _ = feedback_energies(gram, method.rounder.damping)
    blocks = lambda a: a.reshape(-1, block).sum(1)
    return blocks(d) * blocks(jnp.mean(w**2, 1)) / block


def _transformed(
    w: Array, moments: Moments, keys: Keys, method: Method
) -> tuple[Array, Moments, dict[str, Array]]:
    """W and its moments after the method's changes of variables, and the arrays of these."""
    w = w.astype(jnp.float32)
    change, gram, rows = _side(method.input, "input", w.T, moments.input, keys.input)
    w = change(w.T).T
    output_key = jax.random.fold_in(keys.own, 1)
    change, output, columns = _side(method.output, "output", w, moments.output, output_key)
    return change(w), Moments(gram, output), rows | columns


def _side(
    side: Any, name: str, w: Float[Array, "r c"], gram: Array | None, key: Array
) -> tuple[Callable[[Array], Array], Array | None, dict[str, Array]]:
    """What changes the channels c of the weight's rows, their moment after it, and its arrays."""
    if side is None:
        return lambda x: x, gram, {}
    energy = jnp.mean(w**2, 0)
    arrays = side.fit(energy, jnp.ones_like(energy) if gram is None else jnp.diagonal(gram), key)
    apply = lambda x: side.apply(x, arrays)
    gram = None if gram is None else apply(apply(gram).T)  # A^T H A
    change = lambda x: side.inverse(x, arrays)
    return change, gram, {f"{name}.{part}": a for part, a in arrays.items()}


def _energy(e: Float[Array, "k n"], moments: Moments) -> Float[Array, ""]:
    """tr(H E H_out E^T)."""
    right = e if moments.output is None else e @ moments.output
    return jnp.sum(right * (e if moments.input is None else moments.input @ e))
