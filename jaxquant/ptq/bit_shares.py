"""Shares: how many bits above the average a matrix deserves, read off its statistics."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.magnitude import ratios, unit
from jaxquant.core.paths import matches, path_leaves
from jaxquant.recipes.recipe import layout_of
from jaxquant.rounding import Moments, Waterfill
from jaxquant.rounding.moments import believed, feedback_energies, living

CORRELATION = 0.5  # as `entropy_coded(two_sided=True)` believes of G
ROUNDER = Waterfill(0.02, CORRELATION)
_TINY = 1e-30


def shares(params: PyTree, stats: Stats, paths: Sequence[str] = ("*",)) -> dict[str, float]:
    """Bits per weight above the average, by path, at which a last bit is worth the same everywhere.

    A code with feedback on both sides that spends R bits a weight leaves a loss per weight of
    about s 4^-R, with s the geometric mean of D_i F_j sigma_ij^2 (`rounding.waterfill`). Where H is
    weighted by loss gradients, losses of different weights add up to the model's; so the best rates
    are R + log4(s / its mean), their average over weights R.

    Args:
      params: tree in which each weight is one matrix (see `unstack`).
      stats: of the same tree, with the outputs' moments, gradients weighting the inputs'.
      paths: globs of the weights that share.
    Raises:
      ValueError: no weight matches; one is a stack; a moment is missing.
    Source: reverse water-filling (Cover and Thomas, section 10.3.3), across matrices.

    >>> import jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (2, 32, 32))
    >>> fn = lambda p, x: jnp.concatenate([x @ p["a"], 16 * x @ p["b"]], -1)
    >>> params, x = {"a": w[0], "b": w[0]}, jnp.eye(32)
    >>> stats = jq.calibrate(fn, params, [x], loss=lambda y, x: jnp.sum(y), output=["*"])
    >>> {path: round(bits, 2) for path, bits in shares(params, stats).items()}
    {'a': -2.0, 'b': 2.0}
    """
    check_arguments(shares, locals())
    named = lambda path: any(matches(path, glob) for glob in paths)
    found = [(p, w) for p, w in path_leaves(params) if p in stats.holder and named(p)]
    if not found:
        raise ValueError(f"no weight with statistics matches {', '.join(paths)}")
    logs, sizes = [], []
    for path, w in found:
        view, order = layout_of(tuple(w.shape), stats.sites[path])
        if len(order) > len(view.k) + len(view.n):
            raise ValueError(f"{path} is a stack of matrices, which share a rate; `unstack` it")
        matrix = jnp.transpose(jnp.asarray(w), order).reshape(int(np.prod(view.k)), -1)
        logs.append(float(_log4(matrix, Moments(stats.gram(path), stats.output_gram(path)))))
        sizes.append(w.size)
    mean = np.average(logs, weights=sizes)
    return {path: float(log - mean) for (path, _), log in zip(found, logs, strict=True)}


@jax.jit
def _log4(w: Float[Array, "k n"], moments: Moments) -> Float[Array, ""]:
    """Log to base 4 of the loss per weight at 0 bits of a fine code."""
    w, of_w = unit(w)  # whose squares might leave float32
    (h, of_h), g = unit(living(moments.input)[0]), ratios(living(moments.output)[0])
    g = believed(g, CORRELATION) / jnp.trace(g)
    mean_log = lambda a: jnp.mean(jnp.log2(jnp.maximum(a, _TINY)))
    rows, columns = (mean_log(jnp.mean(w**2, axis)) for axis in (1, 0))
    energy = rows + columns - jnp.log2(jnp.mean(w**2) + _TINY)
    left = mean_log(feedback_energies(h, ROUNDER.damping)[0])
    right = mean_log(feedback_energies(g, ROUNDER.output_damping)[0])
    return (left + right + energy + of_h + 2 * of_w) / 2
