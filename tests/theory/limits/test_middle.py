"""Lost in the middle: the Latin square, gains by definition, retention of models of known gain."""

import numpy as np
import pytest

from jaxquant.theory.limits.middle import gains, middle_limits, planted, retention

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


def test_a_reference_of_limited_sight_has_nothing_to_lose_far_back():
    rng = np.random.default_rng(2)
    noise = lambda: rng.normal(0, 0.01, (5, 5))
    near = 2.0 * (np.arange(5) >= 2)
    reference, model = near + noise(), near + noise()
    found = retention(model, reference, AT)
    assert found.holds is True and found.by_depth[:2] == (None, None)
    reference[:, :2], model[:, :2] = 0.01, 0.001  # the same, without noise
    assert retention(model, reference, AT).holds is True
    lost = retention(model * (np.arange(5) != 3), reference, AT)
    assert lost.holds is False and lost.by_depth[3] == 0
    row = middle_limits(model, reference, AT, "model")[0]
    assert "no gain, no gain, 1.00" in row.note and row.verdict == "survives"


def test_the_middle_is_said_to_be_lost_only_beyond_chance():
    rng = np.random.default_rng(3)
    flat = 2 + rng.normal(0, 0.2, (5, 5))
    lost = flat - 1.0 * np.array([0, 1, 1, 1, 0])
    notes = [row.note for row in middle_limits(lost, flat, AT, "model")]
    assert "not shown to be lost" in notes[1] and "the middle is lost" in notes[2]
    ends = middle_limits(flat - 1.0 * np.array([1, 0, 0, 0, 0]), flat, AT, "model")[2]
    assert "not shown" in ends.note and ends.measured == pytest.approx(-1, abs=0.3)
    # Passages and contexts of other difficulties change nothing.
    harder = lost + 3.0 * np.arange(5)[AT] + 2.0 * np.arange(5)[:, None]
    rows = middle_limits(harder, harder, AT, "model")
    assert (
        rows[2].note.split(" Gain")[0]
        == middle_limits(lost, flat, AT, "model")[2].note.split(" Gain")[0]
    )
    two = middle_limits(flat[:2, :2], flat[:2, :2], np.array([[0, 1], [1, 0]]), "model")
    assert two[1].measured == 0  # two depths have no middle


def test_a_flat_model_rarely_loses_its_middle():
    rng = np.random.default_rng(4)
    flat = [2 + rng.normal(0, 0.3, (4, 4)) for _ in range(60)]
    at = (np.arange(4)[:, None] + np.arange(4)) % 4
    said = ["the middle is lost" in middle_limits(g, g, at, "a")[2].note for g in flat]
    assert sum(said) <= 3


def test_bad_input():
    with pytest.raises(ValueError, match="do not fit"):
        planted(np.zeros((2, 20), int), np.zeros((2, 8), int))
    with pytest.raises(ValueError, match="2 or more fillers"):
        planted(np.zeros((1, 90), int), np.zeros((1, 8), int))
    with pytest.raises(ValueError, match="must be finite"):
        gains(AT, np.full((5, 5), np.nan), np.ones((5, 5)))
