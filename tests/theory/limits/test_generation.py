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
from jaxquant.theory.limits.generation_limits import generation_limits


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
    for few in (5, 19):  # a reference that loops more often does not certify a model
        assert loops_survive(base[:few], worse(1)[:few]).holds is None
    assert loops_survive(base[:20], worse(1)[:20]).holds is True


def test_a_row_is_undecided_only_if_its_interval_holds_its_bound():
    """What a reader sees: the measured number, the bound, and a verdict that they explain."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 99, 40) for _ in range(32)]
    nats = rng.normal(0.4, 1.2, 32), np.zeros(32)
    rows = {r.name: r for r in generation_limits((texts, texts), (texts, texts), nats, "model")}
    row, d = rows["judged by the reference"], paired_difference(*nats)
    assert row.verdict == "undecided" and d.low < row.bound < d.high
    assert rows["sampled loops"].bound == 0.15
    assert "sampled loops" in rows["generation survival"].note


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
