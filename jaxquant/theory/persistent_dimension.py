"""Intrinsic dimension from the growth of minimum spanning trees (persistent homology, degree 0)."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.dimension import Points
from jaxquant.theory.neighbors import distinct

SIZES = tuple(range(50, 512, 40))


@dataclasses.dataclass(frozen=True, eq=False)
class PersistentDimension:
    """The result of `persistent_dimension`.

    Attributes:
      value: the dimension.
      slope: the slope of the logarithm of the energy against that of the size, mean of all reruns.
      slopes: the slope of each rerun.
      points: number of distinct points that samples were drawn from.
      duplicates: number of points that were dropped because they equal an earlier one.
    """

    value: float
    slope: float
    slopes: tuple[float, ...]
    points: int
    duplicates: int


def spanning_tree_energy(x: Points, alpha: float = 1.0) -> float:
    """Return the sum of the edges' lengths, each raised to a power, of the minimum spanning tree.

    Args:
      x: points [n, d], two or more, finite. Memory holds the distances of all pairs, 4 n^2 bytes.
      alpha: the exponent a, positive. Default: 1, the total length.
    Returns:
      The sum, in the unit of x to the power a. The edges of the tree are the lifetimes of the
      connected components in the Vietoris-Rips filtration.
    Raises:
      ValueError: x is not a matrix of two or more finite points, or `alpha` is not positive.

    >>> spanning_tree_energy(np.array([[0.0], [1.0], [5.0], [2.0]]))
    5.0
    """
    check_arguments(spanning_tree_energy, locals())
    if len(distinct(x)) < 2:
        raise ValueError(f"expected two or more distinct points, got {len(x)} equal points")
    _check_alpha(alpha)
    points = np.asarray(x, np.float64)
    unit = _extent(points)  # squares of very small or large distances are no float64 numbers
    return unit**alpha * _energy(points / unit, alpha)


def persistent_dimension(
    x: Points,
    key: Array,
    *,
    alpha: float = 1.0,
    sizes: Sequence[int] = SIZES,
    samples: int = 7,
    samples_of_half: int = 3,
    reruns: int = 3,
) -> PersistentDimension:
    """Estimate the dimension from how spanning trees of samples grow with the sample (PHD).

    The energy of the minimum spanning tree of n random points of a set of dimension d, the sum of
    its edges to the power a, grows as E_a(n) ~ n^((d - a) / d) for a < d. With m the slope of
    ln E_a(n) against ln n,

        d = a / (1 - m)

    For each size, the energy is the median over random samples without repetition; m is the mean of
    the slopes of the reruns.

    Args:
      x: points [n, d], at least as many as the largest of `sizes`; duplicates are dropped.
      key: PRNG key of the samples.
      alpha: the exponent a, positive and below the dimension. Default: 1.
      sizes: sizes of the samples, at least two, each 2 or more. Default: 50, 90, ..., 490.
      samples: number of samples of each size. Default: 7.
      samples_of_half: number of samples of sizes of at least half of the points. Default: 3.
      reruns: number of slopes to average. Default: 3.
    Returns:
      The dimension; infinite if the slope is 1 or more.
    Raises:
      ValueError: an argument is out of its range, a size exceeds the number of distinct points, or
        x is not a matrix of finite numbers.
    Source:
      Schweinhart 2021, arXiv:1808.02196; Tulchinskii et al. 2023, arXiv:2306.04723, whose program
      has the defaults here, but returns 1 / (1 - m) for every a, which is correct for a = 1
      only. This implementation divides a by 1 - m.

    >>> plane = np.random.default_rng(0).uniform(size=(1000, 2))
    >>> found = persistent_dimension(plane, jax.random.key(0))
    >>> 1.8 < found.value < 2.2
    True
    """
    check_arguments(persistent_dimension, locals())
    points = distinct(x)
    points /= _extent(points)  # which leaves the slope as it is
    _check_alpha(alpha)
    _check_sizes(points, len(x), sizes)
    for name, count in (
        ("samples", samples), ("samples_of_half", samples_of_half), ("reruns", reruns),
    ):  # fmt: skip
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())

    def median_energy(size: int) -> float:
        count = samples_of_half if len(points) <= 2 * size else samples
        drawn = (random.choice(len(points), size, replace=False) for _ in range(count))
        found = float(np.median([_energy(points[rows], alpha) for rows in drawn]))
        if found == 0:
            raise ValueError(f"the energy underflows for alpha = {alpha:g}; give a smaller alpha")
        return found

    def slope() -> float:
        energies = [median_energy(size) for size in sizes]
        return float(np.polyfit(np.log(sizes), np.log(energies), 1)[0])

    slopes = tuple(slope() for _ in range(reruns))
    mean = float(np.mean(slopes))
    value = alpha / (1 - mean) if mean < 1 else float("inf")
    return PersistentDimension(value, mean, slopes, len(points), len(x) - len(points))


def _extent(points: Float[np.ndarray, "n d"]) -> float:
    """Return the largest extent of the points along a coordinate, or 1 if there is but one."""
    return float(np.max(np.ptp(points, axis=0))) or 1.0


def _energy(points: Float[np.ndarray, "n d"], alpha: float) -> float:
    """Return the energy; the heights of single linkage are the edges of a spanning tree."""
    edges = linkage(pdist(points), "single")[:, 2]
    return float(np.sum(edges**alpha))


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")


def _check_sizes(points: np.ndarray, given: int, sizes: Sequence[int]) -> None:
    if len(set(sizes)) < 2 or min(sizes) < 2:
        raise ValueError(f"sizes must be two different sizes or more, each 2 or more, got {sizes}")
    if max(sizes) > len(points):
        raise ValueError(
            f"the largest sample has {max(sizes)} points, but there are {len(points)} distinct "
            f"ones (of {given}); give more points or smaller sizes"
        )
