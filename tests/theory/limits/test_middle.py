"""Lost in the middle: the Latin square, gains by definition, retention of models of known gain."""

import numpy as np
import pytest

from jaxquant.theory.limits.middle import gains, planted, retention

AT = (np.arange(5)[:, None] + np.arange(5)) % 5


def test_every_passage_lies_at_every_depth_once():
    fillers = np.zeros((5, 200), int)
    passages = np.arange(1, 6)[:, None] * np.ones((1, 20), int)
    found = planted(fillers, passages, margin=10)
    for j, start in enumerate([0, 42, 85, 127, 170]):
        here = found.contexts[:, start : start + 20]
        assert (here == found.at[:, j, None] + 1).all()
        assert sorted(found.at[:, j]) == list(range(5))
    assert ((found.contexts > 0).sum(1) == 100).all() and not found.fillers.any()


def test_gains_are_sorted_by_depth():
    rng = np.random.default_rng(0)
    present, absent = rng.random((5, 5)), rng.random((5, 5))
    found = gains(AT, present, absent)
    for c in range(5):
        for j in range(5):
            i = (c + j) % 5
            assert found[c, j] == absent[c, i] - present[c, i]


def test_retention_flips_for_a_model_that_forgets():
    rng = np.random.default_rng(1)
    base = 2 + rng.normal(0, 0.2, (5, 5))
    assert retention(base, base, AT).holds is True
    assert retention(base, base, AT).share == 1
    window = base * (np.arange(5) == 4)  # attention that sees the last depth only
    assert retention(window, base, AT).holds is False
    assert retention(0.75 * base, base, AT).holds is None
    assert retention(base, rng.normal(0, 0.2, (5, 5)), AT) is None  # no gain to retain


def test_bad_input():
    with pytest.raises(ValueError, match="do not fit"):
        planted(np.zeros((2, 20), int), np.zeros((2, 8), int))
    with pytest.raises(ValueError, match="2 or more fillers"):
        planted(np.zeros((1, 90), int), np.zeros((1, 8), int))
    with pytest.raises(ValueError, match="must be finite"):
        gains(AT, np.full((5, 5), np.nan), np.ones((5, 5)))
