"""Retrieval with rounded document vectors: recall and certified answers.

Scores are inner products <q, e_j>. If e_j is rounded to e'_j with |e_j - e'_j| = eps_j, no score
changes by more than |q| eps_j, so the best document of a query stays the best whenever

    s_1 - s_j > |q| (eps_1 + eps_j)    for all j

(a theorem). How much of the recall survives is a measurement.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.stats import binomtest

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.random_numbers import generator
from jaxquant.theory.number_checks import finite, nonnegative, places

WIDTHS = (8, 4, 1)
TOLERANCE = 0.95  # share of the recall that must survive
RESAMPLES = 2000
SIGNIFICANCE = 1e-3  # with which fewer bits are found to be better
ROUNDING = 1e-12  # relative error of a score in float64


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What rounded documents answer, beside the documents as they are.

    Attributes:
      name: name of the rounding.
      hits: whether each query finds its document among the first k [queries].
      reference_hits: the same with the documents as they are.
      k: that number.
      agrees: whether each query has the same best document with both.
      certified: whether the errors of rounding are too small to change it.
      survival: a 95 % interval of the ratio of the two recalls (bootstrap over queries); None if
        no query finds its document among the documents as they are.
      tolerance: ratio that must survive.
    """

    name: str
    hits: Bool[np.ndarray, "n"]
    reference_hits: Bool[np.ndarray, "n"]
    k: int
    agrees: Bool[np.ndarray, "n"]
    certified: Bool[np.ndarray, "n"]
    survival: tuple[float, float] | None
    tolerance: float

    @property
    def recall(self) -> float:
        """Share of queries that find their document."""
        return float(self.hits.mean())

    def limits(self) -> tuple[Limit, ...]:
        """Return the certificate and the survival of the recall as rows of a suite."""
        return (self._certificate(), self._survival())

    def _certificate(self) -> Limit:
        share = float(self.certified.mean())
        statement = (
            f"Rounding the document vectors ({self.name}) changes the best document of no query "
            "whose best scores are further apart than the rounding can move them, so at least that "
            "share of the queries keeps it."
        )
        broken = int((self.certified & ~self.agrees).sum())
        note = f"{broken} certified answers changed." if broken else ""
        holds = broken == 0 if share > 0 else None
        if share == 0:
            note = "The scores of no query are that far apart, so the bound is vacuous."
        measured = float(self.agrees.mean())
        name = f"retrieval certificate, {self.name}"
        return Limit(name, statement, "theorem", measured, share, holds, note=note)

    def _survival(self) -> Limit:
        base = float(self.reference_hits.mean())
        statement = (
            f"Rounded document vectors ({self.name}) keep at least {self.tolerance:.0%} of the "
            f"share of queries whose document is among the best {self.k}."
        )
        holds, ratio, note = None, None, "No query finds its document at all."
        if self.survival is not None:
            low, high = self.survival
            ratio = self.recall / base
            holds = True if low >= self.tolerance else False if high < self.tolerance else None
            note = f"Recall {self.recall:.3f} of {base:.3f}; 95 % interval {low:.3f} to {high:.3f}."
        name = f"retrieval, {self.name}"
        return Limit(name, statement, "survival", ratio, self.tolerance, holds, note=note)


def rounded_documents(
    documents: Float[Array | np.ndarray, "n d"], bits: int
) -> Float[np.ndarray, "n d"]:
    """Round each vector to symmetric integers at a scale of its own, or to signs at 1 bit.

    Args:
      documents: [n, d], finite.
      bits: 1 to 16. With 2 or more the scale is max |e| / (2^(bits - 1) - 1); with 1 it is the mean
        of |e|, which has the least squared error.
    Returns:
      The rounded vectors [n, d].
    Raises:
      ValueError: the documents are empty or not finite, or `bits` is out of range.

    >>> rounded_documents(np.array([[7.0, -3.4]]), 4).tolist()
    [[7.0, -3.0]]
    """
    check_arguments(rounded_documents, locals())
    e = _vectors(documents, "documents")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    if bits == 1:
        return np.where(e < 0, -1.0, 1.0) * np.abs(e).mean(1, keepdims=True)
    scale = np.abs(e).max(1, keepdims=True) / ((1 << (int(bits) - 1)) - 1)
    return np.round(np.divide(e, scale, out=np.zeros_like(e), where=scale > 0)) * scale


def ranks(
    queries: Float[Array | np.ndarray, "k d"],
    documents: Float[Array | np.ndarray, "n d"],
    gold: Int[Array | np.ndarray, "k"],
) -> Int[np.ndarray, "k"]:
    """Return how many documents score at least as high as the right one, itself not counted.

    Args:
      queries: [k, d].
      documents: [n, d].
      gold: index of the right document of each query [k].
    Returns:
      Ranks [k] from 0; recall at m is the share below m. Ties, up to rounding, count against the
        query.
    Raises:
      ValueError: arrays are empty or not finite, shapes do not match, or an index is out of range.

    >>> ranks(np.eye(2), np.eye(2), np.array([0, 0])).tolist()
    [0, 1]
    """
    check_arguments(ranks, locals())
    q, e = _pair(queries, documents)
    right = places(gold, "an integer", len(q), len(e))
    scores = q @ e.T
    own = scores[np.arange(len(q)), right]
    # Equal documents may differ by the rounding of a sum of d products, which depends on the BLAS.
    longest = np.linalg.norm(q, axis=1).max() * np.linalg.norm(e, axis=1).max()
    rounding = q.shape[1] * np.finfo(scores.dtype).eps * longest
    return (scores >= own[:, None] - rounding).sum(1) - 1


def certified(
    queries: Float[Array | np.ndarray, "k d"],
    documents: Float[Array | np.ndarray, "n d"],
    errors: Float[Array | np.ndarray, "n"],
) -> Bool[np.ndarray, "k"]:
    """Return for which queries no rounding with such errors can change the best document.

    Args:
      queries: [k, d].
      documents: [n, d], two or more, as they were before rounding.
      errors: bound of |e_j - e'_j| of each document [n], as the rounding promises it.
    Returns:
      Answers [k].
    Raises:
      ValueError: arrays are empty or not finite, shapes do not match, there is one document, or an
        error is negative.

    >>> certified(np.array([[1.0, 0.0]]), np.eye(2), np.array([0.4, 0.4])).tolist()
    [True]
    """
    check_arguments(certified, locals())
    q, e = _pair(queries, documents)
    eps = nonnegative(errors, "errors", finite=True)
    if eps.shape != (len(e),) or len(e) < 2:
        raise ValueError(
            f"expected two documents or more and an error for each, got {len(e)} documents and "
            f"errors of shape {list(eps.shape)}"
        )
    scores, norms = q @ e.T, np.linalg.norm(q, axis=1)
    rows, best = np.arange(len(q)), scores.argmax(1)
    size = np.linalg.norm(e, axis=1)
    allowed = eps + eps[best][:, None] + ROUNDING * (size + size[best][:, None])
    gaps = scores[rows, best][:, None] - scores - norms[:, None] * allowed
    gaps[rows, best] = np.inf
    return gaps.min(1) > 0


def retrieval(
    queries: Float[Array | np.ndarray, "k d"],
    documents: Float[Array | np.ndarray, "n d"],
    rounded: Float[Array | np.ndarray, "n d"],
    gold: Int[Array | np.ndarray, "k"],
    key: Array,
    *,
    errors: Float[Array | np.ndarray, "n"] | None = None,
    k: int = 10,
    tolerance: float = TOLERANCE,
    name: str = "rounded",
) -> Retrieval:
    """Compare retrieval from rounded documents with retrieval from the documents as they are.

    Args:
      queries: [k, d], not rounded.
      documents: [n, d].
      rounded: the documents after rounding [n, d].
      gold: index of the right document of each query [k].
      key: of the bootstrap.
      errors: bound of the error of each document [n], which the rounding promises. Default: the
        errors as they are, with which the certificate cannot fail.
      k: number of documents that count as found, 1 or more.
      tolerance: share of the recall that must survive, above 0.
      name: name of the rounding.
    Returns:
      The comparison.
    Raises:
      ValueError: arrays are empty or not finite, shapes do not match, there is one document, or a
        number is out of range.

    >>> import jax
    >>> found = retrieval(np.eye(4), np.eye(4), np.eye(4), np.arange(4), jax.random.key(0), k=1)
    >>> [row.verdict for row in found.limits()]
    ['holds', 'survives']
    """
    check_arguments(retrieval, locals())
    q, e = _pair(queries, documents)
    other = _vectors(rounded, "rounded")
    if other.shape != e.shape or k < 1 or not 0 < tolerance < np.inf:
        raise ValueError(
            f"expected rounded documents {list(e.shape)}, k of 1 or more and a positive tolerance, "
            f"got {list(other.shape)}, {k} and {tolerance}"
        )
    eps = np.linalg.norm(e - other, axis=1) if errors is None else errors
    own, hits = ranks(q, e, gold) < k, ranks(q, other, gold) < k
    return Retrieval(
        name,
        hits,
        own,
        int(k),
        (q @ e.T).argmax(1) == (q @ other.T).argmax(1),
        certified(q, e, eps),
        _ratio(hits, own, generator(key)),
        float(tolerance),
    )


def monotone_limit(fewer: Retrieval, more: Retrieval) -> Limit:
    """Return whether fewer bits find significantly more than more bits, as a row of a suite.

    Args:
      fewer: retrieval at fewer bits.
      more: the same queries at more bits.
    Returns:
      The row: an exact one-sided sign test on the queries that only one of the two answers.
    Raises:
      ValueError: the numbers of queries differ.
    """
    check_arguments(monotone_limit, locals())
    if fewer.hits.shape != more.hits.shape:
        raise ValueError(
            f"expected the same queries, got {fewer.hits.size} and {more.hits.size} of them"
        )
    better, worse = int((fewer.hits & ~more.hits).sum()), int((~fewer.hits & more.hits).sum())
    p = binomtest(better, better + worse, alternative="greater").pvalue if better + worse else 1.0
    statement = (
        f"Document vectors of {more.name} find no fewer documents than those of {fewer.name}."
    )
    note = (
        f"{better} queries are answered by {fewer.name} alone, {worse} by {more.name}; p = {p:.2g}."
    )
    gain, holds = more.recall - fewer.recall, p > SIGNIFICANCE
    name = f"retrieval monotone, {fewer.name}"
    return Limit(name, statement, "expectation", gain, 0.0, holds, note=note)


def _ratio(
    hits: Bool[np.ndarray, "n"], own: Bool[np.ndarray, "n"], random: np.random.Generator
) -> tuple[float, float] | None:
    """Return a 95 % interval of the ratio of two recalls, or None where it is undefined."""
    if not own.any():
        return None
    some = random.integers(0, len(own), (RESAMPLES, len(own)))
    found, base = hits[some].mean(1), own[some].mean(1)
    low, high = np.quantile(found[base > 0] / base[base > 0], (0.025, 0.975))
    return float(low), float(high)


def _vectors(value: Any, name: str) -> Float[np.ndarray, "n d"]:
    x = finite(value, name)
    if x.ndim != 2:
        raise ValueError(f"expected {name} [n, d], got shape {list(x.shape)}")
    return x


def _pair(queries: Any, documents: Any) -> tuple[np.ndarray, np.ndarray]:
    q, e = _vectors(queries, "queries"), _vectors(documents, "documents")
    if q.shape[1] != e.shape[1]:
        raise ValueError(
            f"queries and documents must have one width, got {q.shape[1]} and {e.shape[1]}"
        )
    return q, e
