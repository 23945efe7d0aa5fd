"""Exact distances to the nearest neighbors of points, in float64 and in bounded memory."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial import KDTree

from jaxquant.core.arguments import check_arguments

BLOCK = 1 << 23  # numbers per temporary array: 64 MiB in float64
TREE_DIMENSION = 10  # up to which a k-d tree was faster than matrix products, at 20,000 points
SPARE = 4  # candidates beyond the k that are wanted
SMALLEST, LARGEST = 1e-140, 1e140  # extent of the points whose squared distances are exact enough


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest neighbors of every distinct point.

    Attributes:
      points: the distinct points, float64 [m, d], in the order in which they first occur.
      distances: distances to the k nearest other points, float64 [m, k], increasing and positive.
      indices: the indices of these neighbors in `points`, int [m, k].
      duplicates: the number n - m of points that equal an earlier one and were dropped.
    """

    points: Float[np.ndarray, "m d"]
    distances: Float[np.ndarray, "m k"]
    indices: Int[np.ndarray, "m k"]
    duplicates: int


def neighbor_distances(
    x: Float[Array, "n d"] | Float[np.ndarray, "n d"],
    k: int,
    *,
    progress: Callable[[int], None] | None = None,
) -> Neighbors:
    """Return the exact distances of every distinct point to its k nearest neighbors.

    Distances are computed from differences of coordinates, since |x|^2 + |y|^2 - 2 x y loses the
    smallest distances to cancellation. That formula, in float64 on centered points, only selects
    k + 4 candidates for each point. The selection is then proved from its rounding error: where
    the proof fails, the point is compared with every other point instead.

    The time is O(n^2 d), and O(n log n) in at most 10 dimensions, where a k-d tree is used.
    Besides the argument, memory holds the points two times in float64, the result, and at most 4
    temporary arrays of `BLOCK` numbers, 64 MiB each (of n or (k + 4) d numbers, if these are more).

    Args:
      x: points [n, d], finite, of any dtype that float64 can represent. Of equal points all but
        the first are dropped.
      k: number of neighbors, at least 1 and less than the number of distinct points.
      progress: called with the number of points that are done, after each block of points.
        Default: not called.
    Returns:
      The distances, in the unit of x, with the neighbors' indices and the number of duplicates.
    Raises:
      ValueError: x is not a matrix of finite numbers, has k distinct points or fewer, or holds
        numbers so large or differences so small that their squares are no float64 numbers.

    >>> found = neighbor_distances(np.array([[0.0], [1.0], [3.0], [1.0]]), 2)
    >>> found.distances.tolist(), found.duplicates
    ([[1.0, 3.0], [1.0, 2.0], [2.0, 3.0]], 1)
    """
    check_arguments(neighbor_distances, locals())
    points = distinct(x)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(points) <= k:
        raise ValueError(
            f"expected more than k = {k} distinct points, got {len(points)} (of {len(x)}, "
            f"{len(x) - len(points)} of which repeat another); give more points or a smaller k"
        )
    distances, indices = nearest(points, k, progress)
    return Neighbors(points, distances, indices, len(x) - len(points))


def distinct(x: Float[Array, "n d"] | Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m d"]:
    """Return the distinct points in float64, in the order in which they first occur.

    Args:
      x: points [n, d], finite.
    Returns:
      The points that equal no earlier point [m, d]; zeros of either sign are equal.
    Raises:
      ValueError: x is not a matrix of finite numbers, or is empty.

    >>> distinct(np.array([[1.0, 2.0], [0.0, 1.0], [1.0, 2.0]])).tolist()
    [[1.0, 2.0], [0.0, 1.0]]
    """
    if np.ndim(x) != 2 or not np.size(x):
        raise ValueError(f"expected points [n, d], got shape {list(np.shape(x))}")
    if np.iscomplexobj(x):
        raise ValueError("expected real points, got complex ones; stack real and imaginary parts")
    points = np.array(x, np.float64, order="C")
    points += 0.0  # turns -0 into 0, whose bytes differ
    if not np.isfinite(points).all():
        bad = np.flatnonzero(~np.isfinite(points).all(1))
        raise ValueError(
            f"expected finite points, but {len(bad)} of {len(points)} contain NaN or infinity, "
            f"the first of which is point {bad[0]}; remove them"
        )
    first: dict[bytes, int] = {}
    for i, row in enumerate(points):
        first.setdefault(hashlib.sha256(row).digest(), i)
    return points if len(first) == len(points) else points[list(first.values())]


def nearest(
    points: Float[np.ndarray, "n d"], k: int, progress: Callable[[int], None] | None = None
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """Return distances and indices of the k nearest neighbors of points that are all distinct.

    Args:
      points: distinct points in float64, more than k.
      k: number of neighbors.
      progress: as in `neighbor_distances`.
    Returns:
      Distances and indices, both [n, k].
    Raises:
      ValueError: as in `neighbor_distances`.
    """
    extent = float(np.max(np.ptp(points, axis=0)))
    if SMALLEST < extent < LARGEST:
        search = _by_tree if points.shape[1] <= TREE_DIMENSION else _by_products
        distances, indices = search(points, k, progress or (lambda done: None))
        if distances[:, 0].all():
            return distances, indices
    raise ValueError(
        f"points whose coordinates extend over {extent:.3g} have squared distances that float64 "
        "cannot represent; rescale them (the intrinsic dimension does not depend on the scale)"
    )


def _by_tree(
    points: np.ndarray, k: int, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Search a k-d tree, which is fast in few dimensions."""
    n, tree = len(points), KDTree(points)
    distances, indices = np.empty((n, k)), np.empty((n, k), np.intp)
    rows = max(1, BLOCK // (k + 1))
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        found = tree.query(points[here], k + 1)  # the nearest point is the point itself
        distances[here], indices[here] = (a[:, 1:] for a in found)
        progress(min(n, start + rows))
    return distances, indices


def _by_products(
    points: np.ndarray, k: int, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Select candidates by matrix products, then compare them by differences."""
    n, d = points.shape
    centered = points - points.mean(0)
    squares = np.einsum("nd,nd->n", centered, centered)
    candidates = min(n - 1, k + SPARE)
    # Bound on the error of |x|^2 + |y|^2 - 2 x y: Higham 2002, section 3.1, for d + 4 operations.
    slack = 4 * (d + 4) * np.finfo(float).eps * (squares + squares.max())
    distances, indices = np.empty((n, k)), np.empty((n, k), np.intp)
    rows = max(1, BLOCK // max(n, candidates * d))
    for start in range(0, n, rows):
        here = np.arange(start, min(n, start + rows))
        approximate = centered[here] @ centered.T
        approximate *= -2
        approximate += squares  # the square of the point itself is the same in the whole row
        approximate[here - start, here] = np.inf
        found = np.argpartition(approximate, candidates - 1, axis=1)[:, :candidates].copy()
        farthest = np.take_along_axis(approximate, found[:, -1:], 1)[:, 0] + squares[here]
        exact, found = _sorted(points, here, found, k)
        unproved = exact[:, -1] > farthest - slack[here]
        if candidates < n - 1:
            for i in np.flatnonzero(unproved).tolist():
                exact[i], found[i] = _among_all(points, start + i, k)
        distances[here], indices[here] = np.sqrt(exact), found
        progress(len(here) + start)
    return distances, indices


def _sorted(
    points: np.ndarray, here: np.ndarray, found: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k smallest squared distances of points to their candidates, and these."""
    difference = points[found]
    difference -= points[here][:, None]
    exact = np.einsum("icd,icd->ic", difference, difference)
    order = np.argsort(exact, axis=1)[:, :k]
    return np.take_along_axis(exact, order, 1), np.take_along_axis(found, order, 1)


def _among_all(points: np.ndarray, i: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k smallest squared distances of one point to all others, and these."""
    exact, rows = np.empty(len(points)), max(1, BLOCK // points.shape[1])
    for start in range(0, len(points), rows):
        difference = points[start : start + rows] - points[i]
        exact[start : start + rows] = np.einsum("nd,nd->n", difference, difference)
    exact[i] = np.inf
    order = np.argpartition(exact, k - 1)[:k]
    order = order[np.argsort(exact[order])]
    return exact[order], order
