"""Bit shares: bits above the average that each matrix deserves, computed from its statistics."""

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

CORRELATION = 0.5  # share of the off-diagonal of G, as in `entropy_coded(two_sided=True)`
ROUNDER = Waterfill(0.02, CORRELATION)
_TINY = 1e-30


def shares(params: PyTree, stats: Stats, paths: Sequence[str] = ("*",)) -> dict[str, float]:
    """Return, by path, the bits per weight above the average at which the rates are optimal.

    At these rates one more bit reduces the loss by the same amount in every weight. A code with
    error feedback on both sides at R bits per weight leaves a loss per weight of about s 4^-R,
    where s is the geometric mean of D_i F_j sigma_ij^2 (`rounding.waterfill`). If H is weighted by
    loss gradients, the losses of all weights add up to that of the model. The best rates are then
    R + log4(s / mean s), with R the average over all weights and mean s the geometric mean weighted
    by size.

    Args:
      params: tree in which each weight is one matrix (see `unstack`).
      stats: statistics of the same tree, with input second moments weighted by loss gradients and
        with output second moments.
      paths: globs of the weights that share the bits. Default: all weights with statistics.
    Returns:
      Bits relative to the average, by path; negative values are below it.
    Raises:
      ValueError: no weight matches, a weight is a stack, or a second moment is missing.
    Source:
      Reverse water-filling (Cover and Thomas, section 10.3.3), applied across matrices.

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
            raise ValueError(
                f"{path} is a stack of matrices, which can only share one rate: use `unstack` first"
            )
        matrix = jnp.transpose(jnp.asarray(w), order).reshape(int(np.prod(view.k)), -1)
        logs.append(float(_log4(matrix, Moments(stats.gram(path), stats.output_gram(path)))))
        sizes.append(w.size)
    mean = np.average(logs, weights=sizes)
    return {path: float(log - mean) for (path, _), log in zip(found, logs, strict=True)}


@jax.jit
def _log4(w: Float[Array, "k n"], moments: Moments) -> Float[Array, ""]:
    """Return log4 of the loss per weight of a high-rate code, extrapolated to 0 bits."""
    w, of_w = unit(w)  # the squares of unscaled weights may overflow float32
    (h, of_h), g = unit(living(moments.input)[0]), ratios(living(moments.output)[0])
    g = believed(g, CORRELATION) / jnp.trace(g)
    mean_log = lambda a: jnp.mean(jnp.log2(jnp.maximum(a, _TINY)))
    rows, columns = (mean_log(jnp.mean(w**2, axis)) for axis in (1, 0))
    energy = rows + columns - jnp.log2(jnp.mean(w**2) + _TINY)
    left = mean_log(feedback_energies(h, ROUNDER.damping)[0])
    right = mean_log(feedback_energies(g, ROUNDER.output_damping)[0])
    return (left + right + energy + of_h + 2 * of_w) / 2
