"""The Entropy Law as a measurement: rank correlations over subsets, with bootstrap intervals."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments

FEWEST = 4  # subsets
Values = Sequence[Any] | Float[np.ndarray, "n"] | Float[Array, "n"]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two quantities, with a bootstrap interval.

    Attributes:
      rho: the correlation, from -1 to 1.
      low, high: ends of the interval.
      confidence: its nominal coverage, as a fraction.
      count: number of pairs.
    """

    rho: float
    low: float
    high: float
    confidence: float
    count: int

    @property
    def sign(self) -> int:
        """-1 or 1 if the whole interval is below or above 0, else 0."""
        return int(self.high < 0 and -1) or int(self.low > 0)

    def __str__(self) -> str:
        return (
            f"{self.rho:+.2f} ({self.confidence:.0%} interval {self.low:+.2f} to {self.high:+.2f}, "
            f"{self.count} pairs)"
        )


@dataclasses.dataclass(frozen=True)
class EntropyLaw:
    """What subsets of a dataset say of the Entropy Law.

    Attributes:
      ratio: correlation of the performance with the compression ratios.
      loss: that with the losses of the first epoch; None if these were not given.
    """

    ratio: Correlation
    loss: Correlation | None = None

    def __str__(self) -> str:
        parts = [f"performance and compression ratio: {self.ratio}", self.verdict]
        if self.loss is not None:
            parts.insert(1, f"performance and first-epoch loss: {self.loss}")
        return "\n".join(parts)

    @property
    def verdict(self) -> str:
        """One sentence that says whether these subsets show the law."""
        if self.ratio.sign < 0:
            return "These subsets show the law: performance falls as the compression ratio rises."
        if self.ratio.sign > 0:
            return "These subsets contradict the law: performance rises with the compression ratio."
        return "These subsets do not show the law: the interval of its correlation contains 0."


def entropy_law(
    ratios: Values,
    performance: Values,
    losses: Values | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> EntropyLaw:
    """Return how the performance of models depends on the redundancy of what they were trained on.

    The law says that at a fixed model, fixed amount and fixed quality of data the performance falls
    as the compression ratio R of the data rises, and that data of lower R at comparable consistency
    usually has a lower training loss. It is a statement of proportionality without constants, so
    what can be measured are correlations over subsets. A correlation says nothing of causes:
    subsets of equal size that differ in R usually differ in quality, too.

    The interval resamples the subsets with replacement and takes quantiles (percentile bootstrap).
    With few subsets it is too narrow: nominal 95 % cover about 90 % with a dozen. Correlations of
    resamples in which a quantity is constant are undefined, and left out.

    Args:
      ratios: compression ratio of each subset [n], n >= 4.
      performance: performance of a model trained on it [n]; higher is better, so pass the negative
        of a loss on held-out data.
      losses: mean loss of that model during the first epoch of its training [n], or None.
      confidence: nominal coverage of the intervals, between 0 and 1.
      resamples: number of resamples, 100 or more.
      seed: seed of the resampling.

    Returns:
      The correlations; print them for the numbers and the verdict.

    Raises:
      ValueError: lengths differ, there are fewer than four subsets, a value is NaN or infinite, all
        values of a quantity are equal, or an argument is out of range.

    Source: Entropy Law (arXiv:2407.06645), which reports the relation without a test of it.

    >>> found = entropy_law([1.9, 2.1, 2.4, 3.0, 3.6, 4.9], [-3.1, -3.2, -3.2, -3.5, -3.6, -4.0])
    >>> print(f"{found.ratio.rho:.3f}")
    -0.986
    >>> print(found.verdict)
    These subsets show the law: performance falls as the compression ratio rises.
    """
    check_arguments(entropy_law, locals())
    if not 0 < confidence < 1 or resamples < 100:
        raise ValueError(
            "confidence must be between 0 and 1 and resamples at least 100, got "
            f"{confidence} and {resamples}"
        )
    score = _checked("performance", performance)
    of = lambda name, values: _correlation(
        _checked(name, values, len(score)), score, confidence, resamples, seed
    )
    return EntropyLaw(of("ratios", ratios), None if losses is None else of("losses", losses))


def _checked(name: str, values: Values, count: int | None = None) -> Float[np.ndarray, "n"]:
    """Return values in float64; raise ValueError unless they can be correlated."""
    a = np.asarray(values, np.float64)
    if a.ndim != 1 or len(a) < FEWEST or (count is not None and len(a) != count):
        wanted = f"{FEWEST} or more values" if count is None else f"{count} values, as performance"
        raise ValueError(f"{name} must have {wanted}, one per subset, got shape {list(a.shape)}")
    if not np.isfinite(a).all():
        raise ValueError(
            f"{name} must be finite, got {a[~np.isfinite(a)][0]} for subset "
            f"{np.flatnonzero(~np.isfinite(a))[0]}: leave that subset out"
        )
    if (a == a[0]).all():
        raise ValueError(
            f"{name} is {a[0]:g} for every subset, so nothing correlates with it: use subsets "
            "that differ"
        )
    return a


def _correlation(
    x: Float[np.ndarray, "n"],
    y: Float[np.ndarray, "n"],
    confidence: float,
    resamples: int,
    seed: int,
) -> Correlation:
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    found = _rank_correlations(x[draws], y[draws])
    tails = (1 - confidence) / 2
    low, high = np.nanquantile(found, [tails, 1 - tails])
    rho = scipy.stats.spearmanr(x, y).statistic
    return Correlation(float(rho), float(low), float(high), confidence, len(x))


def _rank_correlations(
    x: Float[np.ndarray, "N n"], y: Float[np.ndarray, "N n"]
) -> Float[np.ndarray, "N"]:
    """Return Spearman's correlation of each row, NaN where a row is constant."""
    ranks = [scipy.stats.rankdata(a, axis=1) for a in (x, y)]
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norms, np.full(len(x), np.nan), where=norms > 0)
