"""The least share of random facts that a learner of limited size gets wrong.

If m facts are independent and uniform on V values, and all that remains of them is C bits, then by
Fano's inequality the mean share e of wrong answers satisfies

    h2(e) + e log2(V - 1) >= (1 - C / (m log2 V)) log2 V,

where h2 is the binary entropy. For C count the bits of the stored model, side information included,
after lossless coding; only then is it a theorem. A capacity "per parameter" is an empirical number.
"""

import math

from scipy.optimize import brentq
from scipy.special import entr

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit


def fact_error_floor(bits: float, facts: float, values: int = 2) -> float:
    """Return the least mean share of wrong answers about random facts.

    Args:
      bits: number C of bits that are left of the facts, 0 or more.
      facts: number m of facts, positive.
      values: number V of values of a fact, 2 or more.
    Returns:
      The share: 0 if bits >= facts log2(values), and 1 - 1 / values for 0 bits.
    Raises:
      ValueError: a number is out of range.
    Source:
      Fano 1961; concavity of the entropy extends it to the mean over facts.

    >>> round(fact_error_floor(0.5, 1.0), 4), fact_error_floor(32.0, 32.0)
    (0.11, 0.0)
    """
    check_arguments(fact_error_floor, locals())
    c, m, v = float(bits), float(facts), int(values)
    if not (0 <= c < math.inf and 0 < m < math.inf and v >= 2):
        raise ValueError(
            "bits must be 0 or more, facts positive and values 2 or more, all finite, got "
            f"{bits}, {facts} and {values}"
        )
    whole = math.log2(v)
    missing = whole - c / m
    if missing <= 0:
        return 0.0
    if c == 0:
        return 1 - 1 / v
    # The left side increases from 0 to log2 V on this interval, and falls beyond it.
    return float(brentq(lambda e: _left(e, v) - missing, 0.0, 1 - 1 / v, xtol=1e-15))


def fact_floor_limit(
    error: float, bits: float, facts: float, values: int = 2, *, name: str = "fact floor"
) -> Limit:
    """Return a measured share of wrong answers beside the least one as a row of a suite.

    Args:
      error: measured share of wrong answers, averaged over draws of the facts; 0 to 1.
      bits: as for `fact_error_floor`.
      facts: as for `fact_error_floor`.
      values: as for `fact_error_floor`.
      name: name of the row.
    Returns:
      The row; undecided if the floor is 0.
    Raises:
      ValueError: a number is out of range.

    >>> fact_floor_limit(0.0, 100.0, 200.0).verdict
    'violated'
    """
    check_arguments(fact_floor_limit, locals())
    if not 0 <= error <= 1:
        raise ValueError(f"error must be a share from 0 to 1, got {error}")
    floor = fact_error_floor(bits, facts, values)
    statement = (
        f"A learner of {bits:,.0f} bits is wrong about at least this share of {facts:,.0f} random "
        f"facts of {values:,} values."
    )
    holds = error >= floor if floor > 0 else None
    note = "" if floor > 0 else "The bits suffice for all facts, so the floor is vacuous."
    return Limit(name, statement, "theorem", error, floor, holds, note=note)


def fact_capacity(bits: float, values: int) -> float:
    """Return the most random facts that a number of bits can hold: bits / log2(values).

    Args:
      bits: stored bits, 0 or more.
      values: number of values of a fact, 2 or more, such as the size of a vocabulary for facts of
        one token.
    Raises:
      ValueError: a number is out of range.

    >>> fact_capacity(1600.0, 65536)
    100.0
    """
    check_arguments(fact_capacity, locals())
    if not 0 <= bits < math.inf or values < 2:
        raise ValueError(f"bits must be 0 or more and values 2 or more, got {bits} and {values}")
    return float(bits) / math.log2(values)


def fact_capacity_limit(
    bits: float, values: int, *, name: str = "fact capacity", owner: str = "a model"
) -> Limit:
    """Return the most facts of one token that a model of `bits` can hold, as a description.

    Args:
      bits: as for `fact_capacity`.
      values: as for `fact_capacity`.
      name: name of the row.
      owner: whose bits they are.
    Returns:
      The row, without a verdict.
    Raises:
      ValueError: a number is out of range.

    >>> fact_capacity_limit(1600.0, 65536).measured
    100.0
    """
    check_arguments(fact_capacity_limit, locals())
    most = fact_capacity(bits, values)
    statement = (
        f"The {bits:,.0f} stored bits of {owner} hold at most this many random facts, each of them "
        f"one of {values:,} values."
    )
    return Limit(name, statement, "description", most, None, None)


def _left(e: float, values: int) -> float:
    entropy = (entr(e) + entr(1 - e)) / math.log(2)
    return float(entropy + e * math.log2(values - 1))
