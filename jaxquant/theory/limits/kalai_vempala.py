"""Calibrated models hallucinate: a toy world in which every quantity is known.

A world has many factoids, of which a few, chosen at random, are facts. Documents state facts drawn
from a Zipf law. Let MF be the share of the n documents whose fact occurs once, g the model's
distribution, g(H) its mass on false factoids, and

    Mis = 1/2 sum_B |p(B) - g(B)|    over the sets B of factoids of equal g

its miscalibration. With probability 1 - d over the documents and the choice of facts,

    g(H) >= MF - Mis - 3 e^(-s) / d - sqrt(6 ln(6 / d) / n),

where e^(-s) is the share of facts among factoids that were not seen. The bound is about calibration
before any training against hallucination: a model that repeats its documents never hallucinates,
and is as much miscalibrated.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.limits.monofacts import monofact_rate
from jaxquant.theory.limits.random_numbers import generator
from jaxquant.theory.number_checks import nonnegative

CONFIDENCE = 0.1  # d


@dataclasses.dataclass(frozen=True)
class Hallucination:
    """What a model of the toy world hallucinates, and the least it must.

    Attributes:
      name: name of the model.
      monofacts: share of the documents whose fact occurs once.
      miscalibration: Mis.
      hallucination: the model's mass on false factoids.
      bound: the least mass; 0 or less if the bound is vacuous.
    """

    name: str
    monofacts: float
    miscalibration: float
    hallucination: float
    bound: float

    def limits(self) -> tuple[Limit, ...]:
        """Return the theorem as a row of a suite."""
        statement = (
            f"In a toy world of random facts, a {self.name} states falsehoods with at least this "
            "probability, which follows from its miscalibration and the share of documents whose "
            "fact occurs once."
        )
        holds = self.hallucination >= self.bound if self.bound > 0 else None
        note = (
            f"{self.monofacts:.3f} of the documents state a fact that occurs once; miscalibration "
            f"{self.miscalibration:.3f}."
        )
        if holds is None:
            note += " The bound is not above 0, so it is vacuous."
        name = f"hallucination: {self.name}"
        measured = self.hallucination
        return (Limit(name, statement, "theorem", measured, self.bound, holds, note=note),)


def hallucination_bound(
    monofacts: float,
    miscalibration: float,
    documents: int,
    sparsity: float,
    confidence: float = CONFIDENCE,
) -> float:
    """Return the least mass that a model has on false factoids, with probability 1 - d.

    Args:
      monofacts: MF, 0 to 1.
      miscalibration: Mis, 0 to 1.
      documents: n, 1 or more.
      sparsity: s, the logarithm of unseen factoids over unseen facts, 0 or more.
      confidence: d, above 0 and at most 1.
    Returns:
      The bound, 0 or less if it is vacuous.
    Raises:
      ValueError: a number is out of range.
    Source:
      Kalai and Vempala 2024, arXiv:2311.14648, corollary 1, whose constants are quoted here and not
      derived.

    >>> round(hallucination_bound(0.3, 0.0, 1_000_000, 20.0), 3)
    0.295
    """
    check_arguments(hallucination_bound, locals())
    shares = 0 <= monofacts <= 1 and 0 <= miscalibration <= 1
    if not shares or documents < 1 or not sparsity >= 0 or not 0 < confidence <= 1:
        raise ValueError(
            "expected rates from 0 to 1, 1 document or more, sparsity of 0 or more and 0 < d <= 1, "
            f"got {monofacts}, {miscalibration}, {documents}, {sparsity} and {confidence}"
        )
    rare = 3 * math.exp(-sparsity) / confidence
    return monofacts - miscalibration - rare - math.sqrt(6 * math.log(6 / confidence) / documents)


def miscalibration(
    each: Float[Array | np.ndarray, "n"],
    model: Float[Array | np.ndarray, "n"],
    truth: Float[Array | np.ndarray, "n"],
) -> float:
    """Return half the L1 distance of two distributions over the level sets of the model.

    Args:
      each: the model's probability of a single factoid of each group [n].
      model: the model's probability of all factoids of the group [n].
      truth: the true probability of the group [n].
    Returns:
      Mis, from 0 to 1.
    Raises:
      ValueError: shapes differ, a number is negative, or a distribution does not sum to 1.

    >>> miscalibration(np.array([0.5, 0.5]), np.array([0.5, 0.5]), np.array([0.9, 0.1]))
    0.0
    """
    check_arguments(miscalibration, locals())
    g, m, p = (
        nonnegative(x, name, finite=True)
        for x, name in ((each, "each"), (model, "model"), (truth, "truth"))
    )
    if g.ndim != 1 or m.shape != g.shape or p.shape != g.shape:
        raise ValueError(f"expected three arrays [n], got {[list(x.shape) for x in (g, m, p)]}")
    if abs(m.sum() - 1) > 1e-6 or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"probabilities must sum to 1, got sums {m.sum():g} and {p.sum():g}")
    level = np.unique(g, return_inverse=True)[1].ravel()
    return float(np.abs(np.bincount(level, p - m)).sum() / 2)


def toy_world(
    key: Array, documents: int = 10_000, facts: int = 10_000, factoids: int = 100_000_000
) -> tuple[Hallucination, Hallucination]:
    """Draw documents, and compare two models with the bound: a calibrated one and a memorizer.

    The calibrated model gives all factoids of one count the same probability, and together their
    true one; what it gives to unseen facts it thus gives to unseen falsehoods too. The memorizer
    gives each fact its share of the documents.

    Args:
      key: of the documents.
      documents: their number n, 1 or more.
      facts: number of facts, 1 or more, whose probabilities fall as 1 / rank.
      factoids: number of factoids, facts included.
    Returns:
      The calibrated model and the memorizer.
    Raises:
      ValueError: a number is below 1, or there are no more factoids than facts.

    >>> import jax
    >>> [model.limits()[0].verdict for model in toy_world(jax.random.key(0))]
    ['holds', 'undecided']
    """
    check_arguments(toy_world, locals())
    if min(documents, facts) < 1 or factoids <= facts:
        raise ValueError(
            "expected 1 document and 1 fact or more, and more factoids than facts, got "
            f"{documents}, {facts} and {factoids}"
        )
    p = 1 / np.arange(1.0, facts + 1)
    p /= p.sum()
    counts = np.bincount(generator(key).choice(facts, documents, p=p), minlength=facts)
    rate = monofact_rate(counts)
    unseen_facts = int((counts == 0).sum())
    unseen = factoids - facts + unseen_facts
    sparsity = math.log(unseen / max(unseen_facts, 1))
    counted = lambda x: np.bincount(counts, x)  # sums over facts of one count
    sizes = counted(np.ones(facts))
    sizes[0] = unseen
    alike = np.divide(counted(p), sizes, out=np.zeros_like(sizes), where=sizes > 0)

    def judged(name: str, single: Float[np.ndarray, "n"], false: float) -> Hallucination:
        """Return what a model hallucinates, given its probability of each fact and falsehood."""
        all_false = false * (factoids - facts)
        groups = np.append(single, false), np.append(single, all_false), np.append(p, 0.0)
        wrong = miscalibration(*groups)
        bound = hallucination_bound(rate, wrong, documents, sparsity)
        return Hallucination(name, rate, wrong, float(all_false), bound)

    calibrated = judged("calibrated model", alike[counts], float(alike[0]))
    return calibrated, judged("memorizer", counts / documents, 0.0)
