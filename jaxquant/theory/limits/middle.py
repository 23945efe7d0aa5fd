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

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.number_checks import finite

MARGIN = 16  # tokens of filler after the deepest passage
SURVIVES, COLLAPSED = 0.8, 0.5  # shares of the gain that a quantized model retains
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
    (n, t), (count, q) = filler.shape, passage.shape
    if n != count or n < 2:
        raise ValueError(f"expected 2 or more fillers and as many passages, got {n} and {count}")
    if n * q + margin > t:
        raise ValueError(
            f"{n} passages of {q} tokens and a margin of {margin} do not fit in {t} tokens"
        )
    starts = np.linspace(0, t - margin - q, n).astype(int)
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
      by_depth: the same share, by depth.
      worst_high: the smallest upper end of the 95 % intervals of the depths.
    """

    share: float
    low: float
    high: float
    by_depth: tuple[float, ...]
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
    n = len(b)
    rng = np.random.default_rng(seed)
    count = lambda: rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)
    contexts, passages = count(), count()
    weights = contexts[:, :, None] * passages[:, at]  # [draws, context, depth]
    total = lambda x, w: np.sum(w * x, axis=-2)
    low = lambda x: float(np.percentile(x, 2.5))
    high = lambda x: float(np.percentile(x, 97.5))
    kept = weights.sum((1, 2)) > 0
    weights = weights[kept]
    pooled_a, pooled_b = total(a, weights).sum(-1), total(b, weights).sum(-1)
    if low(pooled_b) <= 0:
        return None
    shares = pooled_a / pooled_b
    with np.errstate(divide="ignore", invalid="ignore"):
        depths = total(a, weights) / total(b, weights)
    upper = [high(d[np.isfinite(d)]) for d in depths.T]
    by_depth = a.sum(0) / b.sum(0)
    share = float(a.sum() / b.sum())
    return Retention(share, low(shares), high(shares), tuple(map(float, by_depth)), min(upper))


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
        by_depth = ", ".join(f"{s:.2f}" for s in found.by_depth)
        note = f"95 % interval [{found.low:.2f}, {found.high:.2f}]; by depth {by_depth}."
    statement = (
        f"{name} retains this share of what the reference gains when a passage returns, at every "
        "depth."
    )
    kept = Limit("passage recall", statement, "survival", share, SURVIVES, holds, note=note)
    return kept, _shape(reference, "the reference", "reference"), _shape(model, name, "model")


def _shape(gain: Float[Array | np.ndarray, "n n"], name: str, short: str) -> Limit:
    mean = np.asarray(gain).mean(0)
    inner = mean[1:-1].mean() if len(mean) > 2 else mean.mean()
    return Limit(
        f"lost in the middle ({short})",
        f"By so many nats per token a passage at either end helps {name} more than one in between.",
        "description",
        float(min(mean[0], mean[-1]) - inner),
        None,
        None,
        note=f"Gain by depth: {', '.join(f'{g:.2f}' for g in mean)} nats per token.",
    )
