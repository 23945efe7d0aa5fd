"""Verdicts on generation: four kinds of models, and tests against SciPy and enumeration."""

import numpy as np
import pytest
from scipy.stats import binomtest

from jaxquant.theory.limits.generation import (
    all_hold,
    judge_survives,
    loops_survive,
    mcnemar,
    paired_difference,
)


def test_mcnemar_is_a_binomial_test():
    rng = np.random.default_rng(0)
    a, b = rng.random(40) < 0.6, rng.random(40) < 0.3
    more, fewer = int((a & ~b).sum()), int((~a & b).sum())
    assert mcnemar(a, b) == pytest.approx(
        binomtest(more, more + fewer, alternative="greater").pvalue
    )
    assert mcnemar(a, a) == 1


def test_seven_texts_must_begin_to_loop():
    base = np.zeros(32, bool)
    worse = lambda n: np.arange(32) < n
    assert loops_survive(worse(7), base).holds is False
    assert loops_survive(worse(6), base).holds is None
    assert loops_survive(worse(0), base).holds is True
    assert loops_survive(base[:16], base[:16]).holds is None  # 3/16 cannot be excluded
    assert loops_survive(worse(9), worse(9)).holds is True  # the float model loops, too


def test_the_judge_asks_for_a_nat_with_confidence():
    rng = np.random.default_rng(1)
    base = rng.normal(3, 0.3, 32)
    assert judge_survives(base, base).difference.mean == 0
    assert judge_survives(base, base).holds is True
    assert judge_survives(base + rng.normal(2, 0.3, 32), base).holds is False
    assert judge_survives(base + rng.normal(0.7, 0.3, 32), base).holds is None


def test_intervals_cover():
    rng = np.random.default_rng(2)
    inside = [
        d.low <= 0.5 <= d.high
        for d in (
            paired_difference(rng.normal(0.5, 1, 40), np.zeros(40), i, 400) for i in range(200)
        )
    ]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_one_collapse_is_enough_and_doubt_prevails_over_survival():
    assert all_hold(True, None, False) is False
    assert all_hold(True, None) is None and all_hold(True, True) is True


def test_bad_input():
    with pytest.raises(ValueError, match="2 or more prompts"):
        paired_difference(np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="must be finite"):
        judge_survives(np.array([np.nan, 1.0]), np.zeros(2))
