"""Scalar quantizers of a fixed number of levels: Lloyd-Max, and the best uniform one.

The Gaussian's are the yardstick of the formats: at 2 bits, Lloyd-Max has 0.117482 of the variance,
the best uniform quantizer 0.118846, and Shannon's bound is 0.0625. Entropy-coded ones, which come
nearer to it, are in `theory.entropy_constrained`.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar, root

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.entropy import entropy
from jaxquant.theory.number_checks import finite
from jaxquant.theory.scalar_sources import Source, high_rate_levels, source_of

LLOYD = 50  # iterations before Newton's method takes over, for a density
PRECISION = 1e-12  # relative decrease of D that ends Lloyd's iterations over samples
MOST = 100_000  # of those iterations
RATIO = 1.035  # of steps tried before the best uniform step is refined


@dataclasses.dataclass(frozen=True)
class ScalarQuantizer:
    """A scalar quantizer and its performance on a source.

    Attributes:
      levels: reproduction levels [n], ascending, in the unit of the source.
      thresholds: boundaries between adjacent cells [n - 1], ascending.
      probabilities: probabilities of the cells [n].
      distortion: mean squared error.
    """

    levels: Float[np.ndarray, "n"]
    thresholds: Float[np.ndarray, "n-1"]
    probabilities: Float[np.ndarray, "n"]
    distortion: float

    @property
    def entropy(self) -> float:
        """The entropy of the codes, in bits per symbol: the rate under ideal entropy coding."""
        return float(entropy(self.probabilities))

    @property
    def rate(self) -> float:
        """The rate of codes of equal length, log2 n, in bits per symbol."""
        return float(np.log2(len(self.levels)))


def scalar_quantizer(
    source: Any,
    *,
    levels: Float[Array, "n"] | None = None,
    thresholds: Float[Array, "n-1"] | None = None,
) -> ScalarQuantizer:
    """Return the performance of a given quantizer on a source.

    What is not given follows from Lloyd's two conditions: thresholds halfway between levels
    (nearest neighbor), levels at the centroids of the cells. A cell without probability has its
    level at the middle of its part within the range of the source.

    Args:
      source: a continuous SciPy distribution with its parameters, such as `norm(0, 1)`, of
        finite variance, or an array of samples of any shape, not all equal.
      levels: reproduction levels [n], strictly ascending and finite, in the unit of the source.
        Default: centroids.
      thresholds: boundaries of the cells [n - 1], likewise. Default: halfway between levels.
    Returns:
      The `ScalarQuantizer`.
    Raises:
      ValueError: neither levels nor thresholds are given, their shapes do not match, they do not
        ascend, or the source is not accepted.

    >>> from scipy.stats import norm
    >>> sign = scalar_quantizer(norm(0, 1), thresholds=np.array([0.0]))
    >>> sign.levels.round(4).tolist(), round(sign.distortion, 6), sign.entropy
    ([-0.7979, 0.7979], 0.36338, 1.0)
    """
    check_arguments(scalar_quantizer, locals())
    z = source_of(source)
    y = None if levels is None else _ascending(levels, "levels", z)
    if thresholds is not None:
        t = _ascending(thresholds, "thresholds", z)
    elif y is not None:
        t = midpoints(y)
    else:
        raise ValueError("expected levels, thresholds or both, got neither")
    if y is not None and len(y) != len(t) + 1:
        raise ValueError(f"expected one level more than thresholds, got {len(y)} and {len(t)}")
    return quantizer_of(z, t, y)


def lloyd_max(source: Any, levels: int) -> ScalarQuantizer:
    """Return the scalar quantizer of a number of levels with the least mean squared error.

    It meets Lloyd's two conditions, so that E[Q(X)^2] = E[X^2] - D. For a log-concave density, such
    as the Gaussian and Laplace ones, only the optimum does. Other sources, and samples, may have
    several local optima. The search starts from Panter and Dite's density of levels.

    Args:
      source: a continuous SciPy distribution with its parameters, such as `norm(0, 1)`, of
        finite variance, or an array of samples of any shape, not all equal.
      levels: number of levels, 1 or more. If there are no more distinct samples than this, the
        levels are those samples, and D = 0.
    Returns:
      The `ScalarQuantizer`.
    Raises:
      ValueError: `levels` is below 1, the source is not accepted, or the search does not converge.
    Source:
      Lloyd 1982, Least squares quantization in PCM; Max 1960, Quantizing for minimum distortion.

    >>> from scipy.stats import norm
    >>> best = lloyd_max(norm(0, 1), 4)
    >>> round(best.distortion, 6), round(best.entropy, 4), best.levels.round(4).tolist()
    (0.117482, 1.9111, [-1.5104, -0.4528, 0.4528, 1.5104])
    """
    check_arguments(lloyd_max, locals())
    if levels < 1:
        raise ValueError(f"levels must be 1 or more, got {levels}")
    z = source_of(source)
    if not z.smooth:
        y = (np.unique(np.asarray(source, np.float64)) - z.mean) / z.std
        if len(y) <= levels:
            return quantizer_of(z, midpoints(y), y)
    y = high_rate_levels(z, levels)
    return quantizer_of(z, midpoints(_stationary(z, y) if z.smooth else _lloyd(z, y)))


def best_uniform(source: Any, levels: int) -> tuple[ScalarQuantizer, float]:
    """Return the uniform quantizer of a number of levels with the least mean squared error.

    Its levels are equally spaced around the mean, its thresholds halfway between them.
    For a log-concave symmetric density the mean is the best center; for others, such as one with
    three peaks, which two levels cannot share evenly, another center can be better.

    Args:
      source: a continuous SciPy distribution with its parameters, such as `norm(0, 1)`, of
        finite variance, or an array of samples of any shape, not all equal.
      levels: number of levels, 2 or more.
    Returns:
      The `ScalarQuantizer`, and the step between its levels in the unit of the source.
    Raises:
      ValueError: `levels` is below 2, or the source is not accepted.
    Source:
      Max 1960, Quantizing for minimum distortion, table 2.

    >>> from scipy.stats import norm
    >>> best, step = best_uniform(norm(0, 1), 4)
    >>> round(best.distortion, 6), round(step, 4)
    (0.118846, 0.9957)
    """
    check_arguments(best_uniform, locals())
    if levels < 2:
        raise ValueError(f"levels must be 2 or more, got {levels}")
    z = source_of(source)
    offsets = np.arange(levels) - (levels - 1) / 2
    at = lambda step: quantizer_of(z, midpoints(offsets * step), offsets * step)
    distortion = lambda step: at(step).distortion
    tried = _steps(z, levels)
    best = int(np.argmin([distortion(step) for step in tried]))
    around = (tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)])
    step = float(minimize_scalar(distortion, bounds=around, options={"xatol": 1e-10}).x)
    return at(step), step * z.std


def _steps(z: Source, levels: int) -> Float[np.ndarray, "n"]:
    """Return standardized steps, from below the best uniform one to above it.

    There can be local minima between. With y = o * step for the level of Z, D falls with the step
    as long as step * E[o^2] < E[o Z]. As |o| is at least 1/2, or 0 where |Z| < step / 2, and at
    most (levels - 1) / 2, this holds below 2 E|Z| / (levels - 1)^2. Above 2 max|Z| all levels but
    one in the middle are out of range, and D falls no more.
    """
    first = z.moments(np.array([-np.inf, 0.0, np.inf]))[1]
    narrowest = 2 * (first[1] - first[0]) / (levels - 1) ** 2 / RATIO
    widest = 2 * max(-z.low, z.high) * RATIO
    return np.geomspace(narrowest, widest, 2 + int(np.log(widest / narrowest) / np.log(RATIO)))


def midpoints(levels: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n-1"]:
    """Return the thresholds halfway between levels."""
    return (levels[1:] + levels[:-1]) / 2


def quantizer_of(
    z: Source, thresholds: Float[np.ndarray, "n-1"], levels: Float[np.ndarray, "n"] | None = None
) -> ScalarQuantizer:
    """Return the quantizer with these standardized thresholds and levels (default: centroids)."""
    edges = np.concatenate([[-np.inf], thresholds, [np.inf]])
    mass, first, second = z.moments(edges)
    mass = np.maximum(mass, 0.0)  # of an empty cell, a difference of rounded sums
    y = _centroids(z, edges, mass, first) if levels is None else levels
    distortion = float(np.sum(second - 2 * y * first + y * y * mass))
    unit = lambda a: a * z.std + z.mean
    return ScalarQuantizer(unit(y), unit(thresholds), mass, max(distortion, 0.0) * z.std**2)


def _centroids(
    z: Source,
    edges: Float[np.ndarray, "n+1"],
    mass: Float[np.ndarray, "n"],
    first: Float[np.ndarray, "n"],
) -> Float[np.ndarray, "n"]:
    """Return the centroid of each cell, or its middle if it has no probability."""
    low, high = np.clip(edges[:-1], z.low, z.high), np.clip(edges[1:], z.low, z.high)
    found = np.divide(first, mass, out=(low + high) / 2, where=mass > 0)
    return np.clip(found, edges[:-1], edges[1:])  # rounding can leave a small cell in the tail


def _update(z: Source, y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return the centroids of the points nearest to each level; it stays if there are none."""
    edges = np.concatenate([[-np.inf], midpoints(y), [np.inf]])
    mass, first, _ = z.moments(edges)
    return np.where(mass > 0, _centroids(z, edges, mass, first), y)


def _stationary(z: Source, y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return levels that are the centroids of their cells, for a density."""
    for _ in range(LLOYD):
        y = _update(z, y)
    # A centroid depends on its two thresholds, so on the levels next to it: the Jacobian is banded.
    found = root(lambda y: _update(z, y) - y, y, options={"band": (1, 1), "xtol": 1e-12})
    residual = np.abs(_update(z, found.x) - found.x).max()
    if residual > 1e-8 or np.any(np.diff(found.x) <= 0):
        raise ValueError(
            f"Lloyd's conditions for {len(y)} levels were not met: the largest distance of a level "
            f"from its centroid is {residual:.2g} standard deviations; use fewer levels"
        )
    return found.x


def _lloyd(z: Source, y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return levels at which Lloyd's iterations decrease the distortion of samples no more."""
    last = np.inf
    for _ in range(MOST):
        distortion = quantizer_of(z, midpoints(y)).distortion
        if last - distortion <= PRECISION * distortion:
            return y
        last, y = distortion, _update(z, y)
    raise ValueError(f"Lloyd's iterations did not converge in {MOST} steps; use fewer levels")


def _ascending(value: Any, name: str, z: Source) -> Float[np.ndarray, "n"]:
    """Return the standardized numbers."""
    x = finite(value, name) if np.size(value) else np.zeros(np.shape(value))
    if x.ndim != 1 or np.any(np.diff(x) <= 0):
        raise ValueError(f"{name} must be one axis of strictly ascending numbers, got {x}")
    return (x - z.mean) / z.std
