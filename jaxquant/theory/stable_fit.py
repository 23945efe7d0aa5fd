"""The symmetric alpha-stable distribution that fits weights best, with its standard error."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.field_counts import FieldCounts, count_fields
from jaxquant.theory.number_checks import finite
from jaxquant.theory.stable_law import LEAST, StableLaw

FIRST = 1.7  # alpha at which the search begins
STEP = 1e-4  # of the numerical derivatives
ROUNDS, CLOSE = 60, 1e-7  # most rounds of the search, and the change that ends it
HALVINGS = 20  # of a step that does not raise the likelihood
FAINT = 1e-15  # probability of a bin that the law does not expect to be filled
FEWEST = 100  # weights


@dataclasses.dataclass(frozen=True)
class StableFit:
    """An alpha-stable distribution that was fitted to weights.

    Attributes:
      law: the distribution.
      alpha_error: standard error of alpha, if the weights are independent draws from such a
        distribution. At alpha = 2, the end of the range, it is a rough number.
      scale_error: standard error of the scale.
      misfit: divergence of the fitted from the counted frequencies of the magnitudes, in bits per
        weight: what a coder loses that trusts the law. Chance alone gives about 150 / N.
      weights: number of weights that took part: those that are finite and not subnormal.
    """

    law: StableLaw
    alpha_error: float
    scale_error: float
    misfit: float
    weights: int


def fit_stable(w: Float[Any, "..."]) -> StableFit:
    """Return the symmetric alpha-stable distribution about 0 of greatest likelihood.

    The likelihood is that of the magnitudes, counted in bins of an eighth of an octave, given that
    they are normal numbers of float32. So one number far out weighs no more than its bin, and
    weights that were set to 0 do not take part.

    Args:
      w: the weights, of any shape, at least 100 that are not 0. Their signs do not matter.
    Returns:
      The fit; alpha is searched from 0.5 to 2.
    Raises:
      ValueError: there are too few weights, a weight is not finite, or all have one magnitude.

    Source: maximum likelihood of grouped data by Fisher's scoring; the distribution function is
    that of `stable_law`. Compared with McCulloch 1986 (quantiles) and Koutrouvelis 1980
    (characteristic function), it has the smaller error, and needs no tables.

    >>> w = np.random.default_rng(0).standard_cauchy(20_000) * 0.02
    >>> found = fit_stable(w)
    >>> abs(found.law.alpha - 1) < 3 * found.alpha_error < 0.04
    True
    """
    check_arguments(fit_stable, locals())
    weights = np.asarray(w)
    if weights.dtype.kind not in "fV":
        raise ValueError(f"w must be floating-point, got {weights.dtype}")
    weights = finite(weights, "w")
    unit = float(np.median(np.abs(weights))) or float(np.max(np.abs(weights))) or 1.0
    top = np.finfo(np.float32).max
    found = fit_stable_counts(count_fields(np.clip(weights / unit, -top, top), "float32"))
    law = StableLaw(found.law.alpha, found.law.scale * unit)
    return dataclasses.replace(found, law=law, scale_error=found.scale_error * unit)


def fit_stable_counts(counts: FieldCounts) -> StableFit:
    """Return the fit to counted weights, as `fit_stable` does; it takes a fraction of a second.

    Rounding to the dtype of the weights is taken into account: a number stands for all that round
    to it. Infinities, NaN, zeros and subnormal numbers are left out.

    Args:
      counts: the counts of `count_fields`.
    Returns:
      The fit.
    Raises:
      ValueError: there are fewer than 100 such weights, or all have one magnitude.

    >>> w = np.random.default_rng(0).normal(0, 0.02, 20_000).astype(np.float32)
    >>> found = fit_stable_counts(count_fields(w, "bfloat16"))
    >>> found.law.alpha > 1.98, abs(found.law.scale * 2**0.5 / 0.02 - 1) < 0.02
    (True, True)
    """
    check_arguments(fit_stable_counts, locals())
    edges, seen = _bins(counts)
    total = int(seen.sum())
    if total < FEWEST or np.count_nonzero(seen) < 2:
        raise ValueError(
            f"expected at least {FEWEST} normal numbers of several magnitudes, got {total} in "
            f"{np.count_nonzero(seen)} bins; a stable distribution cannot be fitted"
        )
    unit = float(edges[np.searchsorted(np.cumsum(seen), total / 2)])
    alpha, log_scale = _likeliest(edges / unit, seen)
    scale = unit * math.exp(log_scale)
    p, slopes = _slopes(edges / unit, min(alpha, 2 - 10 * STEP), log_scale)
    errors = np.sqrt(np.diag(np.linalg.pinv(total * (slopes / p) @ slopes.T)))
    share = seen / total
    at = share > 0
    p = _probabilities(edges / unit, alpha, log_scale)
    misfit = float(np.sum(share[at] * np.log2(share[at] / p[at])))
    return StableFit(
        StableLaw(alpha, scale), float(errors[0]), float(errors[1]) * scale, misfit, total
    )


def _bins(counts: FieldCounts) -> tuple[Float[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Return the lower ends of the bins of magnitudes, and the counts; the last has no upper end.

    The ends lie half a step of the dtype below the smallest number of a bin.
    """
    kind = jnp.finfo(counts.dtype)
    merged = 1 << max(0, 3 - kind.nmant)  # a dtype of two bits has no more magnitudes
    first = int(np.float32(kind.tiny).view(np.uint32)) >> 20
    starts = np.arange(first, 2040, merged)
    seen = np.add.reduceat(counts.magnitudes[:2040], starts)
    present = np.flatnonzero(seen)
    if not len(present):
        return np.ones(1), np.zeros(1, np.int64)
    low = (starts.astype(np.uint32) << 20).view(np.float32).astype(np.float64)
    step = np.ldexp(1.0, np.frexp(low)[1] - 1 - kind.nmant - (starts % 8 == 0))
    edges = low - step / 2
    kept = slice(present[0], present[-1] + 1)
    return np.append(edges[0], edges[kept][1:]), seen[kept]


def _likeliest(edges: Float[np.ndarray, " m"], seen: Int[np.ndarray, " m"]) -> tuple[float, float]:
    """Return alpha and the logarithm of the scale of greatest likelihood."""
    at = np.array([FIRST, 0.0])
    gain = lambda at: float(seen @ np.log(_probabilities(edges, *at)))
    best = gain(at)
    for _ in range(ROUNDS):
        p, slopes = _slopes(edges, *at)
        information = seen.sum() * (slopes / p) @ slopes.T
        move = np.linalg.pinv(information) @ (slopes @ (seen / p))
        if at[0] >= 2 and move[0] > 0:  # at the end of the range, only the scale moves
            move = np.array([0.0, (slopes[1] @ (seen / p)) / information[1, 1]])
        for part in 0.5 ** np.arange(HALVINGS) * min(1.0, 0.5 / (np.abs(move).max() + CLOSE)):
            new = at + part * move
            new[0] = np.clip(new[0], LEAST, 2.0)
            if gain(new) > best:
                break
        else:
            break  # no step is better
        moved, at, best = np.abs(new - at).max(), new, gain(new)
        if moved < CLOSE:
            break
    return float(at[0]), float(at[1])


def _slopes(
    edges: Float[np.ndarray, " m"], alpha: float, log_scale: float
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "2 m"]]:
    """Return the probabilities of the bins, and their derivatives by alpha and log scale."""
    p = _probabilities(edges, alpha, log_scale)
    step = -STEP if alpha + STEP > 2 else STEP
    by_alpha = (_probabilities(edges, alpha + step, log_scale) - p) / step
    by_scale = (_probabilities(edges, alpha, log_scale + STEP) - p) / STEP
    return p, np.stack([by_alpha, by_scale])


def _probabilities(
    edges: Float[np.ndarray, " m"], alpha: float, log_scale: float
) -> Float[np.ndarray, " m"]:
    """Return the probabilities of the bins, given a magnitude above the first edge."""
    above = StableLaw(alpha).sf(edges * math.exp(-log_scale))
    return np.maximum(-np.diff(np.append(above, 0)), FAINT) / above[0]
