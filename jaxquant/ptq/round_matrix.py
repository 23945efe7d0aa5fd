"""One matrix: change of variables, rounding, and how much of the output was lost."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.core.magnitude import unit
from jaxquant.core.protocols import Transform
from jaxquant.core.tensor import Arrays
from jaxquant.methods.method import Method
from jaxquant.rounding import Moments
from jaxquant.rounding.moments import feedback_energies, living
from jaxquant.transforms import Channels


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
    w: Float[Array, "k n"],
    moments: Moments,
    keys: Keys,
    method: Method,
    known: dict[str, Array] | None = None,
) -> tuple[Arrays, Report]:
    """The arrays of a matrix, and a report.

    `known`: the arrays of the input transform, if they have been fitted (`shared_transforms`).
    """
    w, moments, e, _ = _unit(w, moments, method)
    w, moments, of_input, of_output = _transformed(w, moments, keys, method, known)
    codes, found = method.rounder(w, method.format, moments, keys.own)
    error = w - method.format.dequantize(codes, w.shape[0])
    loss = _energy(error, moments) / jnp.maximum(_energy(w, moments), 1e-30)
    if e is not None:
        codes = method.format.scaled(codes, e)
    return Arrays(codes, of_input, of_output, {}), Report(loss, found["damping"], found["dead"])


@partial(jax.jit, static_argnames=("method", "block"))
@_exact
def block_importance(
    w: Float[Array, "k n"],
    moments: Moments,
    keys: Keys,
    method: Method,
    block: int,
    known: dict[str, Array] | None = None,
) -> tuple[Float[Array, "k/block"], Int[Array, ""]]:
    """(x, e): loss per unit of relative distortion in each block of (transformed) rows is x 2**e.

    With error feedback the loss is sum_j D_j |n_j|^2 for the noise n_j that rounding row j adds.
    """
    w, moments, own, others = _unit(w, moments, method)
    w, moments, _, _ = _transformed(w, moments, keys, method, known)
    gram, _ = living(moments.input)
    d, _ = feedback_energies(gram, method.rounder.damping)
    blocks = lambda a: a.reshape(-1, block).sum(1)
    e = others if own is None else others + 2 * own
    return blocks(d) * blocks(jnp.mean(w**2, 1)) / block, e


def _unit(
    w: Float[Array, "k n"], moments: Moments, method: Method
) -> tuple[Array, Moments, Array | None, Array]:
    """W 2**-e, the moments up to powers of two; e, and the sum of the exponents of these.

    So squares and their sums stay within float32, whatever the magnitudes. A format whose scales
    float16 stores sees W as it is: where they lie in its range decides the codes; e is None then.
    """
    w, exponents = w.astype(jnp.float32), jnp.int32(0)
    parts = {}
    for side, gram in moments._asdict().items():
        if gram is not None:
            gram, e = unit(gram)
            exponents += e
        parts[side] = gram
    if not method.format.wide:
        return w, Moments(**parts), None, exponents
    w, e = unit(w)
    return w, Moments(**parts), e, exponents


def _transformed(
    w: Array, moments: Moments, keys: Keys, method: Method, known: dict[str, Array] | None
) -> tuple[Array, Moments, dict[str, Array], dict[str, Array]]:
    """W and its moments after the method's changes of variables, and the arrays of these."""
    channels = Channels(w.T, moments.input)
    channels, of_input = _side(method.input, channels, keys.input, known)
    gram, w = channels.gram, channels.weights.T
    output_key = jax.random.fold_in(keys.own, 1)
    channels, of_output = _side(method.output, Channels(w, moments.output), output_key)
    return channels.weights, Moments(gram, channels.gram), of_input, of_output


def _side(
    side: Transform | None, channels: Channels, key: Array, known: dict[str, Array] | None = None
) -> tuple[Channels, dict[str, Array]]:
    """The channels after the change on one side, and its arrays."""
    if side is None:
        return channels, {}
    arrays = side.fit(channels, key) if known is None else known
    return channels.through(side, arrays), arrays


def _energy(e: Float[Array, "k n"], moments: Moments) -> Float[Array, ""]:
    """tr(H E H_out E^T)."""
    right = e if moments.output is None else e @ moments.output
    return jnp.sum(right * (e if moments.input is None else moments.input @ e))
