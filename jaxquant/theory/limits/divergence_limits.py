"""Rows of a suite about the divergence of two models' texts."""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxquant.theory.limits.divergence import Flips, certified, coupled_disagreement
from jaxquant.theory.limits.limit import Limit

SIGMAS = 4.0  # standard deviations within which a random average must lie
DRAWS = 2000  # of the bootstrap


def flip_limits(
    flips: Flips, failed: Bool[np.ndarray, " p"], name: str, seed: int = 0
) -> tuple[Limit, ...]:
    """Return what flips say about the greedy texts of a model.

    Args:
      flips: flips of the model on the greedy text of the reference.
      failed: prompts for which they do not say where the texts part; see `divergence.unexplained`.
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
        float(np.median(flips.first)),
        None,
        None,
        note=f"{(flips.first == k).sum()} of {p} texts agree in all {k} tokens; "
        f"{flips.rate:.2%} of the tokens flip.",
    )
    return told, parted, _union(flips), _chain(flips), _clusters(flips, seed)


def _union(flips: Flips) -> Limit:
    least, most, seen = flips.boole, flips.ceiling, flips.survival
    k = int(np.flatnonzero(least > 0)[-1])
    good = bool(((least <= seen + 1e-9) & (seen <= most + 1e-9)).all())
    return Limit(
        "union bound",
        f"At least 1 - k d of the texts agree in k = {k} tokens, where d is the rate of flips in "
        "the first k.",
        "theorem",
        float(seen[k]),
        float(least[k]),
        good if k else None,
        note="" if k else "Vacuous: every prompt flips at the first token.",
    )


def _chain(flips: Flips) -> Limit:
    p, k = flips.table.shape
    seen, least = float(flips.survival[-1]), float(flips.chain[-1])
    error = SIGMAS * np.sqrt(least * (1 - least) / p)
    return Limit(
        "chain survival",
        f"At least (1 - d)^k of the texts agree in k = {k} tokens if flips are independent.",
        "expectation",
        seen,
        least,
        seen >= least - error,
        note="A lower bound, since prompts differ; 1 / d is no estimate of the first divergence.",
    )


def _clusters(flips: Flips, seed: int) -> Limit:
    statement = (
        "The rate of first flips over the rate of flips is 1 if flips are independent and prompts "
        "alike; below 1, flips come in clusters."
    )
    name = "clustered flips"
    if not flips.table.any():
        return Limit(name, statement, "expectation", None, 1.0, None, note="Nothing flips.")
    rng = np.random.default_rng(seed)
    p, k = flips.table.shape
    picked = rng.integers(p, size=(DRAWS, p))
    first, rates = flips.first[picked], flips.table.mean(1)[picked].mean(1)
    hazards = (first < k).sum(1) / np.minimum(first + 1, k).sum(1)
    ratios = hazards[rates > 0] / rates[rates > 0]
    low, high = map(float, np.percentile(ratios, [2.5, 97.5]))
    measured = flips.hazard / flips.rate
    note = f"95 % interval [{low:.2f}, {high:.2f}]."
    holds = abs(np.log(measured)) <= SIGMAS * np.std(np.log(ratios))
    return Limit(name, statement, "expectation", measured, 1.0, bool(holds), note=note)


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
    parted = np.logical_or.accumulate(np.asarray(reference) != np.asarray(model), axis=1).mean(0)
    each = coupled_disagreement(np.clip(distance, 0.0, 1.0))
    most = np.minimum(np.cumsum(each, axis=1), 1.0).mean(0)
    error = SIGMAS * np.sqrt(most * (1 - most) / len(each))
    useful = np.flatnonzero(most + error < 1)
    # Where the bound is most in danger; without a step at which it says anything, the first step.
    at = useful[np.argmax((parted - most - error)[useful])] if len(useful) else 0
    holds = bool((parted <= most + error)[useful].all()) if len(useful) else None
    return Limit(
        "coupled sampling",
        f"With the same random keys, sampled texts part within {at + 1} tokens at most as often as "
        "the sum of 2 TV / (1 + TV) says.",
        "theorem",
        float(parted[at]),
        float(most[at]),
        holds,
        note=f"In expectation over the keys; {SIGMAS:g} standard deviations are allowed."
        if len(useful)
        else "Vacuous at every length.",
    )
