"""The share of a text that occurs once, and what it says about the unseen: Good and Turing.

Of the n-grams of a text, let N_x be the number of occurrences of x, and M their sum. In a random
split, the share of n-grams that occur once among h has exactly the same expectation as the share of
unseen n-grams after h - 1:

    sum_x N_x binomial(M - N_x, h - 1) / (h binomial(M, h)).

No independence is needed for this, since the split is random. It fails in the natural order: texts
are bursty, so that a second half holds many more unseen n-grams than the first half suggests. The
monofact rate of the tokens of a text is therefore a description of the text. It is no bound on
hallucination: such bounds speak of facts of the training data, at most one in each document.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import gammaln

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.random_numbers import generator

SPLITS = 32
DEVIATIONS = 4.0  # standard errors within which a mean over random splits must lie


@dataclasses.dataclass(frozen=True)
class Monofacts:
    """Good and Turing's estimate on the n-grams of a text.

    Attributes:
      n: length of the n-grams.
      count: number of n-grams, repetitions included.
      rate: share of them that occur once.
      expected: exact expectation, over random halves, of the share that occurs once in a half.
      once: that share in each random half.
      expected_unseen: exact expectation of the share of the rest that the half has not seen.
      unseen: that share for each random half.
      natural_once: share of the first half, in natural order, that occurs once in it.
      natural_unseen: share of the second half that the first has not seen.
    """

    n: int
    count: int
    rate: float
    expected: float
    once: tuple[float, ...]
    expected_unseen: float
    unseen: tuple[float, ...]
    natural_once: float
    natural_unseen: float

    def limits(self) -> tuple[Limit, ...]:
        """Return the exact expectations and the burstiness of the text as rows of a suite."""
        what = f"{self.n}-grams" if self.n > 1 else "tokens"
        once = (
            f"In random halves of the text's {what}, the share that occurs once is on average its "
            "exact expectation."
        )
        unseen = (
            f"The share of the text's {what} that a random half of them does not hold is on "
            "average its exact expectation, which is nearly the same."
        )
        half = self.count // 2
        near = lambda name, text, found, exact: Limit(
            f"{what} {name}",
            text,
            "theorem",
            float(np.mean(found)),
            exact,
            _near(found, exact, half),
        )
        rows = (
            near("once", once, self.once, self.expected),
            near("unseen", unseen, self.unseen, self.expected_unseen),
        )
        natural = (
            f"Share of the {what} of the second half of the text that the first half does not "
            "hold; the bound is Good and Turing's estimate of it, the share of those that occur "
            "once in the first half."
        )
        note = (
            f"{self.rate:.1%} of all {what} occur once. A share above the estimate shows that the "
            "text changes its subject."
        )
        burst = Limit(
            f"{what} burstiness",
            natural,
            "description",
            self.natural_unseen,
            self.natural_once,
            None,
            note=note,
        )
        return (*rows, burst)


def ngrams(tokens: Int[Array | np.ndarray, "t"], n: int) -> Int[np.ndarray, "n"]:
    """Return the n-grams of a text in order, each as the index of its type.

    Args:
      tokens: the text, integers [t].
      n: length of the n-grams, 1 to t.
    Returns:
      Indices [t - n + 1], from 0, without gaps.
    Raises:
      ValueError: the tokens are not integers [t], or n is out of range.

    >>> ngrams(np.array([5, 7, 5, 7]), 2).tolist()
    [0, 1, 0]
    """
    check_arguments(ngrams, locals())
    x = np.asarray(tokens)
    if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer) or not 1 <= n <= x.size:
        raise ValueError(
            f"expected integer tokens [t] and n from 1 to t, got an array {x.dtype}"
            f"{list(x.shape)} and n = {n}"
        )
    index = np.unique(x, return_inverse=True)[1].ravel()
    # One index for pairs (n-gram of one token less, next token), made dense again each time.
    found, size = index, int(index.max()) + 1
    for k in range(1, n):
        found = np.unique(found[:-1] * np.int64(size) + index[k:], return_inverse=True)[1].ravel()
    return found


def monofact_rate(counts: Int[Array | np.ndarray, "k"]) -> float:
    """Return the share of occurrences whose type occurs once: n_1 / n.

    Args:
      counts: occurrences of each type, 0 or more.
    Returns:
      The rate, Good and Turing's estimate of the probability that the next one is unseen.
    Raises:
      ValueError: the counts are not integers, are negative, or sum to 0.
    Source:
      Good 1953, The population frequencies of species and the estimation of population parameters.

    >>> monofact_rate(np.array([1, 1, 2]))
    0.5
    """
    check_arguments(monofact_rate, locals())
    x = _counts(counts)
    return float((x == 1).sum() / x.sum())


def expected_once(counts: Int[Array | np.ndarray, "k"], size: int) -> float:
    """Return the exact expectation, over random samples, of the share that occurs once in them.

    It equals the expected share of a further draw that `size` - 1 draws have not seen.

    Args:
      counts: occurrences of each type in the whole, 0 or more.
      size: number h of occurrences that are drawn without replacement, 1 to the sum of the counts.
    Returns:
      E[n_1(h) / h].
    Raises:
      ValueError: the counts are not integers, are negative or sum to 0, or the size is out of
        range.

    >>> round(expected_once(np.array([1, 2]), 2), 6)  # {a, b} in two of three samples
    0.666667
    """
    check_arguments(expected_once, locals())
    x = _counts(counts)
    total = int(x.sum())
    if not 1 <= size <= total:
        raise ValueError(f"size must be 1 to {total}, the sum of the counts, got {size}")
    values, types = np.unique(x[x > 0], return_counts=True)
    log_choose = lambda a, b: gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
    some = total - values >= size - 1
    values, types = values[some].astype(np.float64), types[some]
    ratio = log_choose(total - values, size - 1) - log_choose(total, size)
    return float(np.sum(types * values * np.exp(ratio)) / size)


def monofacts(
    tokens: Int[Array | np.ndarray, "t"], n: int, key: Array, splits: int = SPLITS
) -> Monofacts:
    """Measure Good and Turing's estimate on random halves of the n-grams of a text.

    Args:
      tokens: the text, integers [t].
      n: length of the n-grams; the text holds two n-grams or more.
      key: of the random halves.
      splits: number of random halves, 2 or more.
    Returns:
      Measured and expected shares.
    Raises:
      ValueError: the tokens are not integers [t], there are too few, or `splits` is below 2.

    >>> import jax
    >>> monofacts(np.arange(100) % 50, 1, jax.random.key(0)).rate
    0.0
    """
    check_arguments(monofacts, locals())
    index, random = ngrams(tokens, n), generator(key)
    if splits < 2:
        raise ValueError(f"splits must be 2 or more, got {splits}")
    return split_monofacts(index, (random.permutation(index) for _ in range(splits)), n)


def split_monofacts(
    index: Int[Array | np.ndarray, "n"], orders: Iterable[Int[np.ndarray, "n"]], n: int = 1
) -> Monofacts:
    """Do the same for given orders of given n-grams, each of which is split in the middle.

    Args:
      index: n-grams in natural order, as `ngrams` returns them; two or more.
      orders: random permutations of them.
      n: their length, for the report.
    Returns:
      Measured and expected shares.
    Raises:
      ValueError: there are fewer than two n-grams, or no orders.

    >>> split_monofacts(np.array([0, 1, 0, 1]), [np.array([0, 0, 1, 1])]).once
    (0.0,)
    """
    check_arguments(split_monofacts, locals())
    natural = np.asarray(index)
    if natural.ndim != 1 or natural.size < 2:
        raise ValueError(f"expected two n-grams or more, got shape {list(natural.shape)}")
    counts = np.bincount(natural)
    half = natural.size // 2
    shares = [_halves(np.asarray(order), half, counts.size) for order in orders]
    if not shares:
        raise ValueError("expected one order or more, got none")
    once, unseen = zip(*shares, strict=True)
    natural_once, natural_unseen = _halves(natural, half, counts.size)
    return Monofacts(
        n=n,
        count=natural.size,
        rate=monofact_rate(counts),
        expected=expected_once(counts, half),
        once=once,
        expected_unseen=expected_once(counts, half + 1),
        unseen=unseen,
        natural_once=natural_once,
        natural_unseen=natural_unseen,
    )


def _halves(order: Int[np.ndarray, "n"], half: int, types: int) -> tuple[float, float]:
    """Return the share of the first half that occurs once, and of the second that is unseen."""
    seen = np.bincount(order[:half], minlength=types)
    return float((seen == 1).sum() / half), float((seen[order[half:]] == 0).mean())


def _near(found: tuple[float, ...], exact: float, half: int) -> bool:
    """Return whether a mean over random splits is near its expectation.

    The deviation of a share is at least that of rare events (Poisson), of which a few splits may
    show none.
    """
    sample = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
    error = max(sample, (exact / half) ** 0.5) / len(found) ** 0.5
    return abs(float(np.mean(found)) - exact) <= DEVIATIONS * error + 1e-9


def _counts(value: Int[Array | np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    x = np.asarray(value)
    if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer) or (x < 0).any() or x.sum() == 0:
        raise ValueError(
            f"expected counts [k], integers of 0 or more of a positive sum, got an array {x.dtype}"
            f"{list(x.shape)}"
        )
    return x
