"""Retrieval under a budget of length, and attention to what was retrieved.

If a first stage retrieves the right document (R) and a second one attends to it (A), then

    P(fail) = 1 - P(R) P(A | R) >= 1 - min(P(R), P(A)).

The product 1 - P(R) P(A) is no bound, since the events may depend on each other.
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.number_checks import finite, nonnegative, places

ROUNDING = 1e-12  # of differences of shares in float64


@dataclasses.dataclass(frozen=True)
class TwoStages:
    """Failures of retrieval under a budget, followed by a choice among what was retrieved.

    Attributes:
      retrieved: P(R), share of queries whose document is retrieved.
      attended: P(A), share whose document would be chosen if it were retrieved.
      attended_if_retrieved: P(A | R); None if nothing is retrieved.
      failed: share that fail.
      bound: 1 - min(P(R), P(A)).
      product: 1 - P(R) P(A), which is no bound.
    """

    retrieved: float
    attended: float
    attended_if_retrieved: float | None
    failed: float
    bound: float
    product: float

    def limits(self) -> tuple[Limit, ...]:
        """Return the bound as a row of a suite."""
        statement = (
            "A search that retrieves candidates and then chooses one of them fails no less often "
            "than the worse of its two stages."
        )
        note = (
            f"The right document is retrieved for {self.retrieved:.3f} of the queries, and chosen "
            f"for {self.attended:.3f} if retrieved or added. The product of both would give "
            f"{self.product:.3f}, which is no bound."
        )
        holds = self.failed >= self.bound - ROUNDING
        name = "retrieval in two stages"
        return (Limit(name, statement, "theorem", self.failed, self.bound, holds, note=note),)


def two_stages(
    retrieved: Bool[Array | np.ndarray, "k"], attended: Bool[Array | np.ndarray, "k"]
) -> TwoStages:
    """Combine retrieval and attention, query by query.

    Args:
      retrieved: whether the right document is retrieved [k].
      attended: whether it is, or would be, chosen among the retrieved ones [k].
    Returns:
      The rates and the bound.
    Raises:
      ValueError: the arrays are not booleans [k] of one size of 1 or more.
    Source:
      arXiv:2511.12869 states the product of P(R) and P(A), which needs P(A | R) instead.

    >>> both = np.array([True, False])
    >>> found = two_stages(both, both)
    >>> found.failed, found.bound, found.product
    (0.5, 0.5, 0.75)
    """
    check_arguments(two_stages, locals())
    r, a = np.asarray(retrieved), np.asarray(attended)
    if r.ndim != 1 or r.shape != a.shape or not r.size or {r.dtype, a.dtype} != {np.dtype(bool)}:
        raise ValueError(
            f"expected two arrays of booleans [k], got {r.dtype}{list(r.shape)} and "
            f"{a.dtype}{list(a.shape)}"
        )
    p_r, p_a = float(r.mean()), float(a.mean())
    given = float(a[r].mean()) if r.any() else None
    return TwoStages(p_r, p_a, given, float(1 - (r & a).mean()), 1 - min(p_r, p_a), 1 - p_r * p_a)


def chosen(
    exact: Float[Array | np.ndarray, "k n"],
    rough: Float[Array | np.ndarray, "k n"],
    gold: Int[Array | np.ndarray, "k"],
    count: int,
) -> Bool[np.ndarray, "k"]:
    """Return whether the right document would be chosen among those that rough scores retrieve.

    Args:
      exact: scores by which one document is chosen [k, n].
      rough: scores whose `count` largest retrieve documents [k, n].
      gold: index of the right document of each query [k]; it is added to the retrieved ones.
      count: number of documents that are retrieved, 1 or more.
    Returns:
      Answers [k]; a tie counts against the right document.
    Raises:
      ValueError: arrays are empty or not finite, shapes do not match, or a number is out of range.

    >>> rough = np.array([[3.0, 2.0, 1.0]])
    >>> exact = np.array([[1.0, 2.0, 3.0]])  # the third would win, but is not retrieved
    >>> chosen(exact, rough, np.array([1]), 2).tolist()
    [True]
    """
    check_arguments(chosen, locals())
    s, r = finite(exact, "exact"), finite(rough, "rough")
    if s.ndim != 2 or r.shape != s.shape or count < 1:
        raise ValueError(
            f"expected two arrays of scores [k, n] and a count of 1 or more, got shapes "
            f"{list(s.shape)} and {list(r.shape)}, and {count}"
        )
    right = places(gold, "a document", *s.shape)
    found = np.argsort(-r, axis=1, kind="stable")[:, :count]
    own = np.take_along_axis(s, right[:, None], axis=1)
    better = (np.take_along_axis(s, found, axis=1) >= own) & (found != right[:, None])
    return ~better.any(1)


def within_budget(
    ranks: Int[Array | np.ndarray, "k"],
    scores: Float[Array | np.ndarray, "k n"],
    lengths: Float[Array | np.ndarray, "n"],
    budget: float,
) -> Bool[np.ndarray, "k"]:
    """Return whether the right document is retrieved before the total length exceeds a budget.

    Args:
      ranks: rank of the right document of each query [k], from 0.
      scores: of all documents [k, n]; they are retrieved by falling score.
      lengths: of the documents [n], 0 or more.
      budget: largest total length of what is retrieved.
    Returns:
      Answers [k].
    Raises:
      ValueError: arrays are empty or not finite, shapes do not match, or a rank is out of range.

    >>> scores = np.array([[3.0, 2.0, 1.0]])
    >>> within_budget(np.array([1]), scores, np.array([5.0, 5.0, 5.0]), 10.0).tolist()
    [True]
    """
    check_arguments(within_budget, locals())
    s, size = finite(scores, "scores"), nonnegative(lengths, "lengths", finite=True)
    if s.ndim != 2 or size.shape != s.shape[1:] or not 0 <= budget < np.inf:
        raise ValueError(
            f"expected scores [k, n], lengths [n] and a budget of 0 or more, got {list(s.shape)}, "
            f"{list(size.shape)} and {budget}"
        )
    place = places(ranks, "a rank", *s.shape)
    total = np.cumsum(size[np.argsort(-s, axis=1, kind="stable")], axis=1)
    return total[np.arange(len(s)), place] <= budget
