"""How many points a linear threshold can label at will: Cover's function-counting theorem.

Of the 2^m ways to label m points in general position in N dimensions, a plane through the origin
separates C(m, N) = 2 sum_{k < N} binomial(m - 1, k). The share is exactly 1/2 at m = 2 N, which is
the capacity of two facts per weight. On hidden states of a model this checks that the states are in
general position; it is not the capacity of the model.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import linprog
from scipy.stats import binomtest

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.random_numbers import generator
from jaxquant.theory.number_checks import finite

MOST_POINTS = 10_000  # beyond which the exact integers take seconds
ROUNDING = 1e-6  # relative differences of states that float32 makes of equal ones
MARGIN = 1e-6  # of points of length 1, above the tolerance of the linear program
SIGNIFICANCE = 1e-3  # probability with which an experiment that is as expected is refused


@dataclasses.dataclass(frozen=True)
class Separability:
    """How many of several random labelings of points a plane separated.

    Attributes:
      points: number m of points.
      dimension: number N of dimensions.
      trials: number of labelings.
      separable: number of those that a plane through the origin separates.
      expected: Cover's share.
      p_value: probability of a count that is at most as likely as this one (exact binomial test).
    """

    points: int
    dimension: int
    trials: int
    separable: int
    expected: float
    p_value: float

    def limits(self, name: str = "Cover", what: str = "random points") -> tuple[Limit, ...]:
        """Return the comparison with Cover's share as a row of a suite.

        Args:
          name: name of the row, such as "representations in general position".
          what: the points, in the plural.
        """
        statement = (
            f"Of random labelings of {self.points} {what} in {self.dimension} dimensions, a plane "
            "separates the share that Cover's theorem gives for points in general position."
        )
        share, holds = self.separable / self.trials, self.p_value > SIGNIFICANCE
        note = f"{self.separable} of {self.trials} labelings; p = {self.p_value:.2g}."
        return (Limit(name, statement, "expectation", share, self.expected, holds, note=note),)


def cover_share(points: int, dimension: int) -> float:
    """Return the share of labelings of points in general position that a plane separates.

    The share is 2^(1 - m) sum_{k < N} binomial(m - 1, k), for planes through the origin. A plane
    with an offset has one more dimension.

    Args:
      points: number m of points, 1 to 10,000.
      dimension: number N of dimensions, 1 or more.
    Returns:
      The share, correctly rounded.
    Raises:
      ValueError: a number is out of range.
    Source:
      Cover 1965, Geometrical and statistical properties of systems of linear inequalities, theorem
      1; in exact integers.

    >>> cover_share(60, 30), cover_share(10, 30)
    (0.5, 1.0)
    """
    check_arguments(cover_share, locals())
    m, dimensions = int(points), int(dimension)
    if not 1 <= m <= MOST_POINTS or dimensions < 1:
        raise ValueError(
            f"points must be 1 to {MOST_POINTS:,} and dimension 1 or more, got {m} and {dimensions}"
        )
    term = total = 1
    for k in range(1, min(dimensions, m)):
        term = term * (m - k) // k
        total += term
    return total / (1 << (m - 1))


def is_separable(
    points: Float[Array | np.ndarray, "n d"], labels: Float[Array | np.ndarray, "n"]
) -> bool:
    """Return whether a plane through the origin has each point on the side of its label.

    It is, if y_i <w, x_i> >= t |x_i| has a solution w of bounded size with t > 0, which a linear
    program finds.

    Args:
      points: x [n, d].
      labels: y [n], each -1 or 1.
    Returns:
      Whether it exists.
    Raises:
      ValueError: there are no points, a number is not finite, a label is not -1 or 1, shapes do
        not match, or the linear program could not be decided.

    >>> xor = np.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> is_separable(xor, np.array([1, 1, -1, -1]))
    False
    """
    check_arguments(is_separable, locals())
    x, y = _points(points), np.asarray(labels)
    if y.shape != x.shape[:1] or not np.isin(y, (-1, 1)).all():
        raise ValueError(
            f"expected a label, -1 or 1, for each of {len(x)} points, got an array "
            f"{y.dtype}{list(y.shape)}"
        )
    # The largest margin t of points of length 1 and a bounded w is the linear program: unlike the
    # inequalities alone, it always has a solution, and badly scaled points do not stall the solver.
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        return False
    n = x.shape[1]
    found = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-y[:, None] * (x / length), np.ones((len(x), 1))]),
        b_ub=np.zeros(len(x)),
        bounds=[(-1.0, 1.0)] * n + [(0.0, 1.0)],
        method="highs",
    )
    if found.status != 0:
        raise ValueError(f"the linear program was not decided: {found.message}")
    return bool(found.x[-1] > MARGIN)


def projected(
    states: Float[Array | np.ndarray, "n d"], dimension: int, key: Array
) -> Float[np.ndarray, "n dimension"]:
    """Return standardized states under one random Gaussian projection.

    States in general position stay so with probability 1; states that coincide, or lie in fewer
    dimensions than are asked for, do not.

    Args:
      states: [n, d], such as one hidden state of each of n distinct contexts.
      dimension: number of dimensions of the result, 1 or more.
      key: of the projection.
    Returns:
      Points [n, dimension]. A coordinate that is constant over the states, up to the rounding of
      float32, is left out.
    Raises:
      ValueError: there are no states, a number is not finite, or the dimension is below 1.

    >>> import jax
    >>> projected(np.eye(5), 3, jax.random.key(0)).shape
    (5, 3)
    """
    check_arguments(projected, locals())
    x = _points(states)
    if dimension < 1:
        raise ValueError(f"dimension must be 1 or more, got {dimension}")
    centered = x - x.mean(0)
    spread = centered.std(0)
    varies = spread > ROUNDING * np.abs(x).max(0)
    scaled = np.divide(centered, spread, out=np.zeros_like(x), where=varies)
    return scaled @ generator(key).normal(size=(x.shape[1], int(dimension)))


def separability(points: Float[Array | np.ndarray, "n d"], trials: int, key: Array) -> Separability:
    """Label points at random, and count the labelings that a plane through the origin separates.

    For points in general position the count is binomial with Cover's share.

    Args:
      points: x [n, d].
      trials: number of labelings, 1 or more. A linear program takes about 5 ms for 60 points in 30
        dimensions.
      key: of the labels.
    Returns:
      The count and Cover's share.
    Raises:
      ValueError: the points are empty or not finite, or `trials` is below 1.

    >>> import jax
    >>> separability(np.ones((8, 4)), 20, jax.random.key(0)).separable  # one point, not eight
    0
    """
    check_arguments(separability, locals())
    x, random = _points(points), generator(key)
    return _counted(lambda: x, x.shape, trials, random)


def random_separability(points: int, dimension: int, trials: int, key: Array) -> Separability:
    """Do the same with new Gaussian points for each labeling.

    Args:
      points: number of points, 1 to 10,000.
      dimension: number of dimensions, 1 or more.
      trials: number of labelings, 1 or more.
      key: of points and labels.
    Returns:
      The count and Cover's share.
    Raises:
      ValueError: a number is out of range.

    >>> import jax
    >>> random_separability(3, 8, 5, jax.random.key(0)).separable
    5
    """
    check_arguments(random_separability, locals())
    random, shape = generator(key), (int(points), int(dimension))
    cover_share(*shape)  # refuses sizes that are out of range before points are drawn
    return _counted(lambda: random.normal(size=shape), shape, trials, random)


def _counted(
    draw: Any, shape: tuple[int, ...], trials: int, random: np.random.Generator
) -> Separability:
    if trials < 1:
        raise ValueError(f"trials must be 1 or more, got {trials}")
    expected = cover_share(*shape)
    count = sum(is_separable(draw(), random.choice((-1, 1), shape[0])) for _ in range(trials))
    p_value = float(binomtest(count, int(trials), expected).pvalue)
    return Separability(shape[0], shape[1], int(trials), count, expected, p_value)


def _points(value: Any) -> Float[np.ndarray, "n d"]:
    x = finite(value, "points")
    if x.ndim != 2:
        raise ValueError(f"expected points [n, d], got shape {list(x.shape)}")
    return x
