"""Intrinsic dimension of points from the distances to their nearest neighbors.

With r_j the distance of a point to its j-th neighbor, and d the dimension:

    P(r_2 / r_1 > m) = m^-d                             TwoNN
    E[sum_{j<k} ln(r_k / r_j)] = (k - 1) / d            Levina-Bickel

where the density is constant up to r_k.
All estimators underestimate dimensions above 5 or so, since no sample is dense enough: a uniform
cube of dimension 10 gets 8.0 to 8.5 at 2,000 points. Compare the values of one estimator at one
number of points, and not one with another.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.neighbors import Neighbors, distinct, neighbor_distances

Points = Float[Array, "n d"] | Float[np.ndarray, "n d"]

_MEANS: dict[str, Callable[[np.ndarray], float]] = {
    "harmonic": lambda m: float(1 / np.mean(1 / m)),
    "mean": lambda m: _mean(m),
    "median": lambda m: float(np.median(m)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Dimension:
    """An estimate of an intrinsic dimension.

    Attributes:
      value: the dimension; infinite if every point has its neighbors at one and the same distance.
        Such points are left out of a mean if there are others.
      points: number of distinct points that it was estimated from.
      duplicates: number of points that were dropped because they equal an earlier one.
      pointwise: the estimate at every distinct point, float64 [m], or None for a global estimator.
    """

    value: float
    points: int
    duplicates: int
    pointwise: Float[np.ndarray, " m"] | None = None

    def __repr__(self) -> str:
        return f"Dimension({self.value:.5g}, points={self.points}, duplicates={self.duplicates})"


def levina_bickel(
    x: Points | Neighbors,
    k: int = 20,
    *,
    combine: Literal["harmonic", "mean", "median"] = "harmonic",
    unbiased: bool = False,
) -> Dimension:
    """Estimate the dimension by maximum likelihood from k neighbors of every point.

    The estimate at a point is m = (k - 1) / sum_{j<k} ln(r_k / r_j). The harmonic mean of these is
    the maximum-likelihood estimate of a dimension that all points share (MacKay and Ghahramani);
    the arithmetic mean, which Levina and Bickel took, is too large by the factor
    (k - 1) / (k - 2), which `unbiased` removes. Since the harmonic mean is not biased in this
    way, `unbiased` is for the mean; it makes the harmonic mean too small by that factor.

    Args:
      x: points [n, d], or their `Neighbors`, at least k of them; duplicates are dropped.
      k: number of neighbors, 2 or more; 3 or more if `unbiased`. Default: 20.
      combine: how the estimates at the points are combined: "harmonic" (the default), "mean" or
        "median".
      unbiased: whether the factor k - 1 is k - 2, with which every estimate at a point has the
        expectation d where the density is constant. Default: False.
    Returns:
      The dimension, with its value at every point.
    Raises:
      ValueError: k or `combine` is out of range, or `neighbor_distances` raises.
    Source:
      Levina and Bickel 2004; MacKay and Ghahramani 2005 (a comment on it). The values are those of
      the class MLE of scikit-dimension 0.5.0, whose `comb="mle"` is "harmonic" here.

    >>> line = np.random.default_rng(0).uniform(size=(1000, 1)) * np.ones(3)
    >>> round(levina_bickel(line).value, 1)
    1.0
    """
    check_arguments(levina_bickel, locals())
    if combine not in _MEANS:
        raise ValueError(f"combine must be one of {', '.join(_MEANS)}, got {combine!r}")
    if k < 2 + unbiased:
        raise ValueError(f"k must be at least {2 + unbiased}, got {k}")
    found = _neighbors(x, k)
    r = found.distances[:, :k]
    with np.errstate(divide="ignore"):  # equal distances give an infinite dimension
        logs = _clean(np.log(r[:, -1:] / r[:, :-1])).sum(1)
        pointwise = (k - 1 - unbiased) / logs
        value = _MEANS[combine](pointwise)
    return Dimension(value, len(r), found.duplicates, pointwise)


def two_nn(
    x: Points | Neighbors, *, discard: float = 0.1, method: Literal["fit", "mle"] = "fit"
) -> Dimension:
    """Estimate the dimension from the two nearest neighbors of every point (TwoNN).

    The ratios mu = r_2 / r_1 of n points are sorted. By "fit", d is the slope through the origin of
    -ln(1 - i / n) against ln mu_i, for the smallest n (1 - discard) ratios. By "mle",

        d = (m - 1) / (sum_{i<=m} ln mu_i + (n - m) ln mu_m),    m = floor(n (1 - discard)),

    the estimate of maximum likelihood, without bias, that knows of the n - m largest ratios only
    that they are larger; for discard = 0 it is (n - 1) / sum ln mu.

    TwoNN looks at the smallest scale, so that noise, such as that of rounding, raises it first.

    Args:
      x: points [n, d], or their `Neighbors`, at least 2 of them; duplicates are dropped.
      discard: fraction of the largest ratios to leave out, from 0 to below 1; "fit" needs it
        positive, since -ln(1 - n / n) is infinite. Default: 0.1.
      method: "fit" (the default, as in the paper) or "mle".
    Returns:
      The dimension.
    Raises:
      ValueError: an argument is out of range, fewer than 2 ratios are left, or
        `neighbor_distances` raises.
    Source:
      Facco et al. 2017, doi:10.1038/s41598-017-11873-y. The values are those of TwoNN of
      scikit-dimension 0.5.0, whose `method="linear"` is "fit" here.

    >>> rng = np.random.default_rng(0)
    >>> plane = rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 5))
    >>> round(two_nn(plane).value, 1), round(two_nn(plane, method="mle").value, 1)
    (2.0, 2.0)
    """
    check_arguments(two_nn, locals())
    _check_two_nn(discard, method)
    found = _neighbors(x, 2)
    value = _of_ratios(found.distances[:, 1] / found.distances[:, 0], discard, method)
    return Dimension(value, len(found.points), found.duplicates)


def local_two_nn(
    x: Points | Neighbors,
    neighborhood: int = 128,
    *,
    discard: float = 0.1,
    method: Literal["fit", "mle"] = "fit",
) -> Dimension:
    """Estimate the dimension at every point by TwoNN among its nearest neighbors (local TwoNN).

    At each point, the two nearest neighbors of every neighbor are looked for among the
    `neighborhood` points alone, without the point itself. The value is the mean over the points.

    Args:
      x: points [n, d], or their `Neighbors`, at least `neighborhood` of them; duplicates are
        dropped.
      neighborhood: number of neighbors L of each point, 4 or more. Default: 128.
      discard, method: as in `two_nn`.
    Returns:
      The mean, and the dimension at every point.
    Raises:
      ValueError: as in `two_nn`.
    Source:
      Ruppik et al. 2025, arXiv:2506.01034, use it for hidden states of language models, with 3,000
      to 60,000 tokens, and L of 64 or 128. The values at the points are those
      of TwoNN().fit_transform_pw(x, n_neighbors=L) of scikit-dimension 0.5.0.

    >>> rng = np.random.default_rng(0)
    >>> found = local_two_nn(rng.uniform(size=(500, 2)), 64)
    >>> len(found.pointwise), round(found.value)
    (500, 2)
    """
    check_arguments(local_two_nn, locals())
    _check_two_nn(discard, method)
    if neighborhood < 4:
        raise ValueError(f"neighborhood must be at least 4, got {neighborhood}")
    found = _neighbors(x, neighborhood)
    ratios = (_ratios_around(found, i, neighborhood) for i in range(len(found.points)))
    pointwise = np.array([_of_ratios(mu, discard, method) for mu in ratios])
    return Dimension(_mean(pointwise), len(pointwise), found.duplicates, pointwise)


def participation_ratio(x: Points) -> float:
    """Return the number of principal directions that the variance of the points is spread over.

        (sum_i l_i)^2 / sum_i l_i^2,    l_i the eigenvalues of the covariance matrix

    This is the linear contrast to an intrinsic dimension: a curved surface of dimension 2 that
    fills a room has a participation ratio of nearly 3.

    Args:
      x: points [n, d], finite, at least two of which differ. Duplicates count.
    Returns:
      The ratio, from 1 to min(n - 1, d).
    Raises:
      ValueError: x is not a matrix of finite numbers, or all points are equal.

    >>> participation_ratio(np.array([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]]))
    2.0
    """
    check_arguments(participation_ratio, locals())
    if len(distinct(x)) < 2:
        raise ValueError(f"expected points that differ, got {len(x)} equal points")
    points = np.asarray(x, np.float64)
    points = points - points.mean(0)
    points /= np.abs(points).max()
    gram = points.T @ points if points.shape[0] > points.shape[1] else points @ points.T
    return float(np.trace(gram) ** 2 / np.sum(gram**2))


def _neighbors(x: Points | Neighbors, k: int) -> Neighbors:
    if not isinstance(x, Neighbors):
        return neighbor_distances(x, k)
    if x.distances.shape[1] < k:
        raise ValueError(
            f"expected the neighbors of every point up to the {k}th, got "
            f"{x.distances.shape[1]}; call neighbor_distances with k = {k} or more"
        )
    return x


def _clean(logs: np.ndarray) -> np.ndarray:
    """Return 0 for the logarithm of two distances that differ by rounding only."""
    return np.where(logs < 16 * np.finfo(np.float64).eps, 0.0, logs)


def _mean(pointwise: np.ndarray) -> float:
    """Return the mean of the finite values; a regular neighborhood alone decides nothing."""
    finite = np.isfinite(pointwise)
    return float(np.mean(pointwise[finite])) if finite.any() else math.inf


def _check_two_nn(discard: float, method: str) -> None:
    if method not in ("fit", "mle"):
        raise ValueError(f"method must be 'fit' or 'mle', got {method!r}")
    if not 0 <= discard < 1 or (method == "fit" and not discard):
        low = "above 0" if method == "fit" else "from 0"
        raise ValueError(f"discard must be {low} and below 1 for {method!r}, got {discard}")


def _of_ratios(mu: np.ndarray, discard: float, method: str) -> float:
    """Return the dimension that fits the ratios of the distances to two neighbors."""
    n = len(mu)
    kept = math.floor(n * (1 - discard))
    if kept < 2:
        raise ValueError(
            f"expected at least 2 ratios after discarding {discard:.0%} of {n}, got {kept}; give "
            "more points or a smaller discard"
        )
    logs = _clean(np.log(np.sort(mu)[:kept]))
    if not logs[-1]:  # each point has both neighbors at one distance
        return math.inf
    if method == "mle":
        return float((kept - 1) / (logs.sum() + (n - kept) * logs[-1]))
    heights = -np.log1p(-np.arange(1, kept + 1) / n)
    return float(logs @ heights / (logs @ logs))


def _ratios_around(found: Neighbors, i: int, size: int) -> np.ndarray:
    """Return r_2 / r_1 of the neighbors of point i, among these neighbors alone.

    The neighbors of a neighbor are sorted by distance, so the first two that are neighbors of i
    as well are the nearest; only where its list has fewer are distances computed again.
    """
    around = found.indices[i, :size]
    member = np.zeros(len(found.points), bool)
    member[around] = True
    common = member[found.indices[around]]
    rows, first = np.arange(size), common.argmax(1)
    enough = common.sum(1) >= 2
    common[rows, first] = False
    of = found.distances[around]
    ratios = of[rows, common.argmax(1)] / of[rows, first]
    for j in np.flatnonzero(~enough):
        others = found.points[around] - found.points[around[j]]
        squares = np.sort(np.einsum("ld,ld->l", others, others))
        ratios[j] = math.sqrt(squares[2] / squares[1])  # squares[0] is the neighbor itself
    return ratios
