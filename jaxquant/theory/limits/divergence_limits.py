"""Rows of a suite about the divergence of two models' texts."""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxquant.theory.limits.divergence import Flips, certified, coupled_disagreement
from jaxquant.theory.limits.limit import Limit

SIGMAS = 4.0  # standard deviations within which a random average must lie
DRAWS = 2000  # of the bootstrap


def flip_limits(
    flips: Flips, free: Flips, failed: Bool[np.ndarray, " p"], name: str, seed: int = 0
) -> tuple[Limit, ...]:
    """Return what flips say about the greedy texts of a model, and what these show.

    Args:
      flips: flips of the model on the greedy text of the reference.
      free: where the model's own greedy texts differ from the reference's, as a table.
      failed: prompts for which flips do not say where the texts part; see `divergence.unexplained`.
      name: name of the model.
      seed: seed of the bootstrap.
    """
    p, k = flips.table.shape
    told = Limit(
        "free running",
        f"The greedy text of {name} parts from the reference's where its first flip on the "
        "reference's text says, but for ties: none of the prompts fails.",
        "theorem",
        int(failed.sum()),
        0,
        not failed.any(),
        note="A failure means that generation and scoring compute different functions.",
    )
    parted = Limit(
        "first divergence",
        f"Median number of tokens for which the greedy texts of {name} and the reference agree.",
        "description",
        float(np.median(free.first)),
        None,
        None,
        note=f"{(free.first == k).sum()} of {p} texts agree in all {k} tokens; "
        f"{flips.rate:.2%} of the tokens flip.",
    )
    ties = float(np.mean((free.first != flips.first) & ~failed))
    chain = _union(flips, free, ties), _chain(flips, free, ties)
    return told, parted, *chain, _clusters(flips, seed)


def _union(flips: Flips, free: Flips, ties: float) -> Limit:
    least, most, seen = flips.boole - ties, flips.ceiling + ties, free.survival
    broken = np.flatnonzero((seen < least - 1e-9) | (seen > most + 1e-9))
    # The longest texts of which the bound says something, or where it is broken.
    k = int(broken[0]) if len(broken) else max(0, int(np.sum(least > 0)) - 1)
    return Limit(
        "union bound",
        f"At least 1 - k d of the greedy texts agree in their first {_tokens(k)}, where d is the "
        f"rate of flips in the first k = {k} on the reference's text.",
        "theorem",
        float(seen[k]),
        float(least[k]),
        not len(broken) if k else None,
        note="" if k else "Vacuous: every prompt flips at the first token.",
    )


def _chain(flips: Flips, free: Flips, ties: float) -> Limit:
    p, d = len(flips.table), flips.rate
    # Half of the texts should survive: a bound that is nearly 0 or 1 could hardly fail.
    k = max(1, int(np.flatnonzero(flips.chain >= 0.5)[-1]))
    seen, least = float(free.survival[k]), float(flips.chain[k])
    # How much each prompt moves seen - least: d is an estimate from the same prompts.
    moves = (free.first >= k) + k * (1 - d) ** (k - 1) * flips.table.mean(1)
    error = SIGMAS * np.sqrt(max(moves.var(), least * (1 - least)) / p) + ties
    holds = True if seen >= least else False if seen < least - error else None
    return Limit(
        "chain survival",
        f"If every token flipped independently with the probability d = {d:.2%}, at least "
        f"(1 - d)^k of the greedy texts would agree in their first {_tokens(k)}, k = {k}.",
        "expectation",
        seen,
        least,
        holds,
        note=f"Chance may explain a shortfall of {error:.2f}, which leaves it undecided. The bound "
        "is a lower one, since prompts differ; 1 / d is no estimate of the first divergence.",
    )


def _clusters(flips: Flips, seed: int) -> Limit:
    statement = (
        "Rate of first flips over the rate of all flips; the bound is that of independent flips of "
        "one probability. A value below 1 means that further flips follow a first one; a value "
        "above 1 means that flips gather at the beginnings of the texts, as where greedy text "
        "grows repetitive and easy to predict."
    )
    name = "clustered flips"
    if not flips.table.any():
        return Limit(name, statement, "description", None, 1.0, None, note="Nothing flips.")
    rng = np.random.default_rng(seed)
    p, k = flips.table.shape
    picked = rng.integers(p, size=(DRAWS, p))
    first, rates = flips.first[picked], flips.table.mean(1)[picked].mean(1)
    hazards = (first < k).sum(1) / np.minimum(first + 1, k).sum(1)
    ratios = hazards[rates > 0] / rates[rates > 0]
    low, high = map(float, np.percentile(ratios, [2.5, 97.5]))
    note = f"95 % interval [{low:.2f}, {high:.2f}]."
    measured = flips.hazard / flips.rate
    return Limit(name, statement, "description", measured, 1.0, None, note=note)


def certificate_limit(
    gap: Float[Array | np.ndarray, "*p"],
    change: Float[Array | np.ndarray, "*p"],
    flipped: Bool[Array | np.ndarray, "*p"],
) -> Limit:
    """Return the share of changed choices beside the share that might change.

    Args:
      gap: largest logit of the reference minus its second largest.
      change: max - min of the model's logits minus the reference's.
      flipped: whether the two models' likeliest tokens differ.
    """
    safe, other = certified(gap, change), np.asarray(flipped)
    bound = float(1 - safe.mean())
    holds = None if bound >= 1 else not (safe & other).any()
    return Limit(
        "gap certificate",
        "No choice flips where the reference's two largest logits are further apart than the range "
        "of the change, so at most the other places flip.",
        "theorem",
        float(other.mean()),
        bound,
        holds,
        note="Vacuous: the change exceeds the gap everywhere." if bound >= 1 else "",
    )


def coupling_limit(
    reference: Int[Array | np.ndarray, "p k"],
    model: Int[Array | np.ndarray, "p k"],
    distance: Float[Array | np.ndarray, "p k"],
) -> Limit:
    """Return how many sampled texts part, beside what the distances of the distributions allow.

    Args:
      reference: texts sampled from the reference.
      model: texts sampled from the model with the same random keys.
      distance: total variation distances of the two models on the reference's texts.
    """
    parted = np.logical_or.accumulate(np.asarray(reference) != np.asarray(model), axis=1)
    sums = np.cumsum(coupled_disagreement(np.clip(distance, 0.0, 1.0)), axis=1)
    # Only the mean of the sums is a bound: the sum of one text depends on how its samples fell.
    seen, most = parted.mean(0), np.minimum(sums.mean(0), 1.0)
    spread = np.maximum((parted - sums).var(0), most * (1 - most))
    error = SIGMAS * np.sqrt(spread / len(sums))
    useful = np.flatnonzero(most + error < 1)
    # Where the bound is most in danger; without a step at which it says anything, the first step.
    at = useful[np.argmax((seen - most - error)[useful])] if len(useful) else 0
    holds = bool((seen <= most + error)[useful].all()) if len(useful) else None
    return Limit(
        "coupled sampling",
        f"With the same random numbers, sampled texts part within their first {_tokens(at + 1)} at "
        "most as often as the sum of 2 TV / (1 + TV) says, where TV is the total variation "
        "distance of the two distributions of the next token.",
        "theorem",
        float(seen[at]),
        float(most[at]),
        holds,
        note="In expectation over the random numbers; "
        f"{error[at]:.2f} more ({SIGMAS:g} standard deviations) are allowed."
        if len(useful)
        else "Vacuous at every length.",
    )


def _tokens(count: int) -> str:
    return "token" if count == 1 else f"{count} tokens"
