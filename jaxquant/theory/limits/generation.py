"""Whether generation survives quantization: loops, gibberish, and intervals of paired differences.

Perplexity on natural text hides two kinds of collapse. A model may fall into loops, or it may write
gibberish, which has no loops and many distinct n-grams; the likelihood of its text under the float
model shows that. No absolute threshold is justified, since small float models loop as well, so both
are judged relative to the float model, on the same prompts and with the same random key.
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import binom

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import finite

DRAWS = 2000  # of the bootstrap
SIGNIFICANT = 0.01  # p-value of McNemar's test
EXCESS, TOLERATED = 0.1, 0.15  # shares of texts that loop, beyond the reference's
GIBBERISH, FLUENT = 1.0, 0.5  # nats per token, beyond the reference's


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean of paired differences and its intervals.

    Attributes:
      mean: mean over prompts of the model's value minus the reference's.
      low, high: ends of the 95 % interval.
      low99: lower end of the one-sided 99 % interval.
    """

    mean: float
    low: float
    high: float
    low99: float


def paired_difference(
    model: Float[Array | np.ndarray, " p"],
    reference: Float[Array | np.ndarray, " p"],
    seed: int = 0,
    draws: int = DRAWS,
) -> Difference:
    """Return the mean difference over prompts with bootstrap intervals.

    Prompts are resampled, never tokens, which depend on each other.

    Args:
      model: a value for each prompt.
      reference: the value of the reference for the same prompt.
      seed: seed of the resampling.
      draws: number of resamplings.
    Raises:
      ValueError: the lengths differ, there are fewer than 2 prompts, or a value is not finite.

    >>> paired_difference(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    Difference(mean=1.0, low=1.0, high=1.0, low99=1.0)
    """
    check_arguments(paired_difference, locals())
    a, b = finite(model, "model"), finite(reference, "reference")
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(
            "expected values of the same 2 or more prompts, got shapes "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    d = a - b
    picked = np.random.default_rng(seed).integers(len(d), size=(draws, len(d)))
    low99, low, high = np.percentile(d[picked].mean(1), [1, 2.5, 97.5])
    return Difference(float(d.mean()), float(low), float(high), float(low99))


def mcnemar(
    model: Bool[Array | np.ndarray, " p"], reference: Bool[Array | np.ndarray, " p"]
) -> float:
    """Return the exact one-sided p-value that events are more frequent with the model.

    Only prompts count for which the two differ; each is equally likely to go either way if the
    models are alike.

    Args:
      model: whether the event occurred, for each prompt.
      reference: the same for the reference.
    Source:
      McNemar 1947, Psychometrika 12, with the exact binomial distribution.

    >>> mcnemar(np.ones(7, bool), np.zeros(7, bool)) == 2**-7
    True
    """
    check_arguments(mcnemar, locals())
    a, b = np.asarray(model, bool), np.asarray(reference, bool)
    more, fewer = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binom.sf(more - 1, more + fewer, 0.5))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether something survives.

    Attributes:
      holds: True: survives; False: collapsed; None: undecided.
      difference: by how much the model exceeds the reference.
      note: the numbers that decided.
    """

    holds: bool | None
    difference: Difference
    note: str


def loops_survive(
    model: Bool[Array | np.ndarray, " p"], reference: Bool[Array | np.ndarray, " p"], seed: int = 0
) -> Verdict:
    """Judge the loops of sampled texts.

    Collapsed: McNemar's p-value is below .01, and the excess is .1 or more. Survives: the upper end
    of the excess's 95 % interval is at most .15. It is put at 3 / p at least, since an event that
    none of p prompts showed may have that rate (the rule of three), so that at least 20 prompts are
    needed to survive.

    Args:
      model: whether the model's sampled text loops, for each prompt.
      reference: the same for the reference, sampled with the same random key.
      seed: seed of the bootstrap.
    Raises:
      ValueError: as in `paired_difference`.

    >>> loops_survive(np.zeros(32, bool), np.zeros(32, bool)).holds
    True
    """
    check_arguments(loops_survive, locals())
    a, b = np.asarray(model, bool), np.asarray(reference, bool)
    d = paired_difference(a.astype(float), b.astype(float), seed)
    p = mcnemar(a, b)
    high = max(d.high, 3 / len(a))
    survives = True if high <= TOLERATED else None
    holds = False if p < SIGNIFICANT and d.mean >= EXCESS else survives
    note = (
        f"{a.sum()} of {len(a)} texts loop, and {b.sum()} of the reference's; excess at most "
        f"{high:.2f}, McNemar's p = {p:.2g}"
    )
    return Verdict(holds, d, note)


def judge_survives(
    model: Float[Array | np.ndarray, " p"],
    reference: Float[Array | np.ndarray, " p"],
    seed: int = 0,
) -> Verdict:
    """Judge the likelihood of sampled texts under the float model.

    For the model's distribution q and the float model's f, the expectation is H(q) + KL(q | f).
    Collapsed: the lower end of the difference's 99 % interval is above 1 nat per token. Survives:
    the upper end of its 95 % interval is below .5.

    Args:
      model: mean negative log-likelihood of the model's text, in nats per token, by prompt.
      reference: the same of the float model's own text.
      seed: seed of the bootstrap.
    Raises:
      ValueError: as in `paired_difference`.

    >>> judge_survives(np.full(8, 4.5), np.full(8, 3.0)).holds
    False
    """
    check_arguments(judge_survives, locals())
    d = paired_difference(model, reference, seed)
    survives = True if d.high < FLUENT else None
    holds = False if d.low99 > GIBBERISH else survives
    note = f"{d.mean:+.2f} nats per token, 95 % interval [{d.low:+.2f}, {d.high:+.2f}]"
    if d.high < -FLUENT:
        note += "; more predictable than the reference's own texts"
    return Verdict(holds, d, note)


def all_hold(*holds: bool | None) -> bool | None:
    """Return False if one is False, True if all are True, else None.

    >>> all_hold(True, None), all_hold(True, False), all_hold(True, True)
    (None, False, True)
    """
    if False in holds:
        return False
    return None if None in holds else True
