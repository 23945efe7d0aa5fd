"""The floor on errors about random facts: Fano's inequality with equality, and its ends."""

import math

import numpy as np
import pytest

from jaxquant.theory.limits.fact_floor import (
    fact_capacity,
    fact_capacity_limit,
    fact_error_floor,
    fact_floor_limit,
)


def left(e, v):
    parts = sum(-p * math.log2(p) for p in (e, 1 - e) if p > 0)
    return parts + e * math.log2(v - 1) if v > 2 else parts


@pytest.mark.parametrize("v", [2, 3, 256, 49152])
@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.75, 0.9, 0.999])
def test_the_floor_is_where_fano_is_an_equality(v, share):
    m = 1e6
    e = fact_error_floor(share * m * math.log2(v), m, v)
    assert left(e, v) == pytest.approx((1 - share) * math.log2(v), abs=1e-9)
    grid = np.linspace(0, 1 - 1 / v, 20_001)
    below = [x for x in grid if left(x, v) < (1 - share) * math.log2(v)]
    assert abs(max(below) - e) <= grid[1] + 1e-12


def test_known_values():
    floors = [round(fact_error_floor(c, 1.0), 4) for c in (0.25, 0.5, 0.75, 0.9)]
    assert floors == [0.2145, 0.11, 0.0417, 0.013]
    assert fact_error_floor(0.0, 5.0, 8) == 1 - 1 / 8
    assert fact_error_floor(15.0, 5.0, 8) == 0.0 == fact_error_floor(1e9, 5.0, 8)


def test_a_learner_that_says_too_few_bits_is_seen():
    assert fact_floor_limit(0.12, 50.0, 100.0).verdict == "holds"
    assert fact_floor_limit(0.10, 50.0, 100.0).verdict == "violated"
    assert fact_floor_limit(0.0, 100.0, 100.0).verdict == "undecided"
    assert fact_capacity(1600.0, 65536) == 100 and fact_capacity_limit(8.0, 2).verdict == "-"


@pytest.mark.parametrize(
    ("bits", "facts", "values"),
    [(-1.0, 1.0, 2), (1.0, 0.0, 2), (1.0, 1.0, 1), (math.nan, 1.0, 2), (1.0, math.inf, 2)],
)
def test_bad_input(bits, facts, values):
    with pytest.raises(ValueError, match="bits must be 0 or more"):
        fact_error_floor(bits, facts, values)


def test_bad_shares_and_capacities():
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        fact_floor_limit(math.nan, 1.0, 2.0)
    with pytest.raises(ValueError, match="bits must be 0 or more"):
        fact_capacity(math.nan, 2)
