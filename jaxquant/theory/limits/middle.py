"""Lost in the middle: how much a passage helps when it returns, by how deep it lay in the context.

Each of n passages lies once in each of n contexts, at another depth each time (a Latin square), so
that no depth has the easier passages. The gain is the likelihood of a passage after a context that
contains it, over that after the same context without it, in nats per token.

Source: Liu et al. 2023, arXiv:2307.03172, who ask questions instead. Small models cannot answer
them; the likelihood of a repeated passage is graded and needs no answers.
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.stats import t

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.number_checks import finite

MARGIN = 16  # tokens of filler after the deepest passage
SURVIVES, COLLAPSED = 0.8, 0.5  # shares of the gain that a quantized model retains
WORTH = 0.1  # share of the mean gain that the reference must gain at a depth to lose anything there
DRAWS = 2000  # of the bootstrap


@dataclasses.dataclass(frozen=True, eq=False)
class Planted:
    """Contexts with passages.

    Attributes:
      contexts: token ids [n, t] in which all n passages lie.
      fillers: the same without passages [n, t].
      passages: the passages [n, q].
      at: at[c, j]: which passage lies at depth j of context c.
    """

    contexts: Int[np.ndarray, "n t"]
    fillers: Int[np.ndarray, "n t"]
    passages: Int[np.ndarray, "n q"]
    at: Int[np.ndarray, "n n"]


def planted(
    fillers: Int[Array | np.ndarray, "n t"],
    passages: Int[Array | np.ndarray, "n q"],
    margin: int = MARGIN,
) -> Planted:
    """Return contexts in which every passage lies once at every depth.

    Depths are equidistant, the first at the first token, the last `margin` tokens before the end.

    Args:
      fillers: natural text, as many contexts as there are passages, 2 or more.
      passages: other text.
      margin: tokens of filler after the deepest passage.
    Raises:
      ValueError: their numbers differ or are below 2, or the passages do not fit.

    >>> planted(np.zeros((2, 4), int), np.array([[1], [2]]), margin=1).contexts.tolist()
    [[1, 0, 2, 0], [2, 0, 1, 0]]
    """
    check_arguments(planted, locals())
    filler, passage = np.asarray(fillers), np.asarray(passages)
    (n, length), (count, q) = filler.shape, passage.shape
    if n != count or n < 2:
        raise ValueError(f"expected 2 or more fillers and as many passages, got {n} and {count}")
    if n * q + margin > length:
        raise ValueError(
            f"{n} passages of {q} tokens and a margin of {margin} do not fit in {length} tokens"
        )
    starts = np.linspace(0, length - margin - q, n).astype(int)
    at = (np.arange(n)[:, None] + np.arange(n)) % n
    contexts = filler.copy()
    for c in range(n):
        for j, start in enumerate(starts):
            contexts[c, start : start + q] = passage[at[c, j]]
    return Planted(contexts, filler, passage, at)


def gains(
    at: Int[np.ndarray, "n n"],
    present: Float[Array | np.ndarray, "n n"],
    absent: Float[Array | np.ndarray, "n n"],
) -> Float[np.ndarray, "n n"]:
    """Return the gain in nats per token by context and depth.

    Args:
      at: `Planted.at`.
      present: [c, i]: mean negative log-likelihood of passage i after context c.
      absent: the same after the filler of context c.
    Raises:
      ValueError: a number is not finite.

    >>> at = np.array([[0, 1], [1, 0]])
    >>> gains(at, np.ones((2, 2)), np.array([[3.0, 4.0], [5.0, 6.0]])).tolist()
    [[2.0, 3.0], [5.0, 4.0]]
    """
    check_arguments(gains, locals())
    helped = finite(absent, "absent") - finite(present, "present")
    return np.take_along_axis(helped, np.asarray(at), axis=1)


@dataclasses.dataclass(frozen=True)
class Retention:
    """The gains of a model over those of the reference.

    Attributes:
      share: mean gain of the model over mean gain of the reference, all depths together.
      low, high: ends of the 95 % interval of `share`.
      by_depth: the same share, by depth; None where the reference gains too little to lose any.
      worst_high: the smallest upper end of the 95 % intervals of the other depths.
    """

    share: float
    low: float
    high: float
    by_depth: tuple[float | None, ...]
    worst_high: float

    @property
    def holds(self) -> bool | None:
        """Whether the model retains the gain: True, False, or None if that is undecided."""
        if self.worst_high < COLLAPSED:
            return False
        return True if self.low >= SURVIVES else None


def retention(
    model: Float[Array | np.ndarray, "n n"],
    reference: Float[Array | np.ndarray, "n n"],
    at: Int[np.ndarray, "n n"],
    seed: int = 0,
    draws: int = DRAWS,
) -> Retention | None:
    """Compare the gains of two models; contexts and passages are resampled (bootstrap).

    A depth counts by itself if the lower end of the 95 % interval of the reference's gain there is
    a tenth of its mean gain or more. A reference of limited sight gains nothing from what lies far
    back, and a share of nothing means nothing.

    Args:
      model: its gains by context and depth.
      reference: those of the reference.
      at: `Planted.at`.
      seed: seed of the resampling.
      draws: number of resamplings.
    Returns:
      The retention; None if the reference gains nothing, that is, if the lower end of the 95 %
      interval of its mean gain is 0 or less.

    >>> at = (np.arange(4)[:, None] + np.arange(4)) % 4
    >>> retention(np.full((4, 4), 1.5), np.full((4, 4), 2.0), at).share
    0.75
    """
    check_arguments(retention, locals())
    a, b = finite(model, "model"), finite(reference, "reference")
    weights = _resampled(at, seed, draws)
    total = lambda x: np.sum(weights * x, axis=1)  # [draws, depth]
    of_a, of_b, size = total(a), total(b), weights.sum(1)
    low = lambda x: float(np.nanpercentile(x, 2.5))
    high = lambda x: float(np.nanpercentile(x, 97.5))
    pooled = of_b.sum(1)
    if low(pooled) <= 0:
        return None
    shares = of_a.sum(1) / pooled
    with np.errstate(divide="ignore", invalid="ignore"):  # a depth may be left out of a resampling
        means = (of_b / size).T
    counts = [low(depth) >= WORTH * b.mean() for depth in means]
    upper, by_depth = [], []
    for j, counted in enumerate(counts):
        there = (size[:, j] > 0) & (of_b[:, j] > 0)
        upper.append(high(of_a[there, j] / of_b[there, j]) if counted else np.inf)
        by_depth.append(float(a[:, j].sum() / b[:, j].sum()) if counted else None)
    share = float(a.sum() / b.sum())
    return Retention(share, low(shares), high(shares), tuple(by_depth), min(upper))


def _resampled(
    at: Int[np.ndarray, "n n"], seed: int, draws: int = DRAWS
) -> Float[np.ndarray, "draws n n"]:
    """Return how often each context and depth occurs if contexts and passages are resampled."""
    rng, n = np.random.default_rng(seed), len(at)
    count = lambda: rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)
    contexts, passages = count(), count()
    return contexts[:, :, None] * passages[:, at]


def middle_limits(
    model: Float[Array | np.ndarray, "n n"],
    reference: Float[Array | np.ndarray, "n n"],
    at: Int[np.ndarray, "n n"],
    name: str,
) -> tuple[Limit, ...]:
    """Return what gains by depth say about a model.

    Args:
      model: its gains by context and depth.
      reference: those of the reference.
      at: `Planted.at`.
      name: name of the model.
    """
    found = retention(model, reference, at)
    share, holds = (None, None) if found is None else (found.share, found.holds)
    note = "The reference gains nothing from a passage that returns."
    if found is not None:
        by_depth = ", ".join("no gain" if s is None else f"{s:.2f}" for s in found.by_depth)
        note = (
            f"95 % interval [{found.low:.2f}, {found.high:.2f}]; by depth, from the beginning: "
            f"{by_depth}. It survives if the interval begins at the bound or above, and has "
            f"collapsed if the interval of one depth ends below {COLLAPSED:g}."
        )
    statement = (
        "A passage is easier to predict when it occurs in the text for the second time; "
        f"{name} keeps at least {SURVIVES:.0%} of what the reference gains by that."
    )
    kept = Limit("passage recall", statement, "survival", share, SURVIVES, holds, note=note)
    shapes = (reference, "the reference", "reference"), (model, name, "model")
    return kept, *(_shape(gain, at, who, short) for gain, who, short in shapes)


def _shape(
    gain: Float[Array | np.ndarray, "n n"], at: Int[np.ndarray, "n n"], name: str, short: str
) -> Limit:
    gain = np.asarray(gain)
    mean, error = gain.mean(0), _dip_error(gain, at)
    dip = float(_dip(mean))
    # Both ends must be above the middle, and the smaller one is. Below 0 chance alone may put it.
    lost = error is not None and dip > error
    said = "the middle is lost" if lost else "the middle is not shown to be lost"
    chance = (
        "There are too few depths to tell" if error is None else f"Chance may explain {error:.2f}"
    )
    return Limit(
        f"lost in the middle ({short})",
        f"Nats per token by which a passage that returns helps {name} more if it first occurred at "
        "the beginning or the end of the context, whichever helps less, than in between. Above 0 "
        "the middle is lost.",
        "description",
        dip,
        None,
        None,
        note=f"{chance}: {said}. Gain by depth, from the beginning: "
        f"{', '.join(f'{g:.2f}' for g in mean)} nats per token.",
    )


def _dip(mean: Float[np.ndarray, " n"]) -> float:
    """Return the smaller gain of both ends minus the mean gain between them, 0 without a middle."""
    return float(min(mean[0], mean[-1]) - mean[1:-1].mean()) if len(mean) > 2 else 0.0


def _dip_error(gain: Float[np.ndarray, "n n"], at: Int[np.ndarray, "n n"]) -> float | None:
    """Return what chance explains of an end minus the mean between, with 95 % confidence.

    In a Latin square the means by depth are free of what contexts and passages differ in, so that
    only the residual counts. None for fewer than three depths.
    """
    n = len(gain)
    if n < 3:
        return None
    by_passage = np.bincount(np.ravel(at), np.ravel(gain)) / n
    effects = gain.mean(1, keepdims=True) + gain.mean(0) + by_passage[at]
    degrees = (n - 1) * (n - 2)
    variance = float(np.sum((gain - effects + 2 * gain.mean()) ** 2)) / degrees
    return float(t.ppf(0.975, degrees)) * (variance / n * (1 + 1 / (n - 2))) ** 0.5
