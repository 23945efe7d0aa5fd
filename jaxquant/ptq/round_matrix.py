"""Quantization of one matrix: change of variables, rounding, and the resulting loss."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxquant.core.magnitude import unit
from jaxquant.core.protocols import Transform
from jaxquant.core.tensor import Arrays
from jaxquant.methods.method import Method
from jaxquant.rounding import Moments
from jaxquant.rounding.moments import feedback_energies, living
from jaxquant.transforms import Channels


class Report(NamedTuple):
    """Result of rounding one matrix, as arrays.

    Attributes:
      loss: relative proxy loss tr(H E H_out E^T) / tr(H W H_out W^T) without damping; a moment that
        is not known counts as the identity.
      damping: damping added to H, as a fraction of mean(diag H); 0 without error feedback.
      dead: number of input channels that were never active in calibration.
    """

    loss: Float[Array, ""]
    damping: Float[Array, ""]
    dead: Array


class Keys(NamedTuple):
    """PRNG keys: `input` for the input transform, which weights may share; `own` for the rest."""

    input: Array
    own: Array


# Error feedback subtracts nearly equal sums, which the 10-bit mantissa of a GPU's default float32
# matmul precision would ruin.
_exact = jax.default_matmul_precision("highest")


@partial(jax.jit, static_argnames="method")
@_exact
def round_matrix(
    w: Float[Array, "k n"],
    moments: Moments,
    keys: Keys,
    method: Method,
    known: dict[str, Array] | None = None,
) -> tuple[Arrays, Report, Bool[Array, ""]]:
    """Quantize one matrix.

    Args:
      w: the matrix [k, n].
      moments: its input and output second moments, each may be None.
      keys: randomness of the input transform and of everything else.
      method: the method (static).
      known: arrays of the input transform if already fitted (`shared_transforms`); None fits them
        here.
    Returns:
      The arrays of the packed matrix, the report, and whether these arrays and the loss are finite.
    """
    w, moments, e, _ = _unit(w, moments, method)
    w, moments, of_input, of_output = _transformed(w, moments, keys, method, known)
    codes, found = _checked(method.rounder(w, method.format, moments, keys.own), method)
    error = w - method.format.dequantize(codes, w.shape[0])
    loss = _energy(error, moments) / jnp.maximum(_energy(w, moments), 1e-30)
    if e is not None:
        codes = method.format.scaled(codes, e)
    arrays = Arrays(codes, of_input, of_output, {})
    return arrays, Report(loss, found["damping"], found["dead"]), finite((arrays, loss))


@jax.jit
def finite(arrays: PyTree) -> Bool[Array, ""]:
    """Return whether all floating-point values of a tree are finite."""
    floats = [a for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
    wide = [a if a.dtype.itemsize >= 4 else a.astype(jnp.float32) for a in floats]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(a)) for a in wide], bool))


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
    """Return the loss per unit of relative distortion in each block of transformed rows.

    With error feedback the loss is sum_j D_j |n_j|^2, where n_j is the noise that rounding row j
    adds.

    Args:
      w, moments, keys, method, known: as in `round_matrix`.
      block: number of rows per block.
    Returns:
      (x, e): the losses are x 2**e, which may lie outside the range of float32.
    """
    w, moments, own, others = _unit(w, moments, method)
    w, moments, _, _ = _transformed(w, moments, keys, method, known)
    gram, _ = living(moments.input)
    d, _ = feedback_energies(gram, method.rounder.damping)
    blocks = lambda a: a.reshape(-1, block).sum(1)
    e = others if own is None else others + 2 * own
    return blocks(d) * blocks(jnp.mean(w**2, 1)) / block, e


def _checked(result: Any, method: Method) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return what a rounder returned; raise ValueError if it is not what a rounder returns."""
    pair = isinstance(result, tuple) and len(result) == 2
    wanted = (("codes",), ("damping", "dead"))
    if pair and all(
        isinstance(part, dict) and set(names) <= set(part)
        for part, names in zip(result, wanted, strict=True)
    ):
        return result
    kinds = [sorted(r) if isinstance(r, dict) else type(r).__name__ for r in result] if pair else []
    raise ValueError(
        f"a rounder returns packed arrays with 'codes', and a report with 'damping' and 'dead'; "
        f"{type(method.rounder).__name__} with {type(method.format).__name__} returned "
        f"{' and '.join(map(str, kinds)) or type(result).__name__}"
    )


def _unit(
    w: Float[Array, "k n"], moments: Moments, method: Method
) -> tuple[Array, Moments, Array | None, Array]:
    """Return W 2**-e, the moments scaled by powers of two, e, and the sum of their exponents.

    Squares and their sums then stay within the range of float32 at every magnitude. A format that
    stores its scales in float16 sees W unscaled and e is None, because its codes depend on where
    the scales lie in the range of float16.
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
    """Return W and its moments after the method's transforms, and the transforms' arrays."""
    channels = Channels(w.T, moments.input)
    channels, of_input = _side(method.input, channels, keys.input, known)
    gram, w = channels.gram, channels.weights.T
    output_key = jax.random.fold_in(keys.own, 1)
    channels, of_output = _side(method.output, Channels(w, moments.output), output_key)
    return channels.weights, Moments(gram, channels.gram), of_input, of_output


def _side(
    side: Transform | None, channels: Channels, key: Array, known: dict[str, Array] | None = None
) -> tuple[Channels, dict[str, Array]]:
    """Return the channels after the transform of one side, and its arrays."""
    if side is None:
        return channels, {}
    arrays = side.fit(channels, key) if known is None else known
    return channels.through(side, arrays), arrays


def _energy(e: Float[Array, "k n"], moments: Moments) -> Float[Array, ""]:
    """Return tr(H E H_out E^T)."""
    right = e if moments.output is None else e @ moments.output
    # (E^T H)^T is H E, for H is symmetric. XLA's CPU takes thrice as long for H E of 4096 x 4096.
    return jnp.sum(right * (e if moments.input is None else (e.T @ moments.input).T))
