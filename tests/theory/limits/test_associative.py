"""Associative memories: bounds recomputed, their shape in bits, and misstated bits."""

import jax
import numpy as np
import pytest

from jaxquant.theory.limits.associative import Memory, learned, recalls, rounded
from jaxquant.theory.limits.fact_floor import fact_error_floor

FACTS, WEIGHTS = 240, 160
MEMORIES = [learned(FACTS, WEIGHTS, jax.random.key(i)) for i in range(4)]


def test_rounded_weights_are_nearest_of_their_levels():
    w = np.random.default_rng(0).normal(size=500)
    for bits in (1, 2, 3, 5, 8):
        found = rounded(w, bits)
        levels = np.unique(np.concatenate([found, -found]))
        assert np.unique(found).size <= 2**bits
        assert (np.abs(w[:, None] - levels).argmin(1) == np.searchsorted(levels, found)).all()
    assert (np.sign(rounded(w, 1)) == np.sign(w)).all() and np.unique(abs(rounded(w, 1))).size == 1
    # The search of the step matters at few bits.
    step = np.abs(w).max() / 1.5
    unsearched = (np.clip(np.floor(w / step), -2, 1) + 0.5) * step
    assert np.sum((rounded(w, 2) - w) ** 2) < 0.6 * np.sum((unsearched - w) ** 2)
    assert rounded(np.zeros(3), 4).tolist() == [0, 0, 0]


def test_int8_recalls_what_few_bits_do_not():
    found = recalls(MEMORIES)
    eight, *_, one = found.roundings
    assert eight.error < 0.005 and 0.05 < one.error < 0.5
    assert one.floor == fact_error_floor(WEIGHTS + 32, FACTS) > 0.02
    assert one.all_recalled == 2.0 ** (WEIGHTS + 32 - FACTS)
    w = rounded(MEMORIES[0].weights, 1)
    by_hand = np.mean(np.sign(MEMORIES[0].patterns @ w) == MEMORIES[0].labels)
    assert one.recalls[0] == by_hand
    assert [row.verdict for row in found.limits()] == ["holds"] * 4


@pytest.mark.parametrize("name", ["memory: errors", "memory: all recalled"])
def test_floats_that_are_declared_as_one_bit_are_seen(name):
    found = recalls(MEMORIES, {"a lie": (1, lambda w: w), "8 bits": (8, lambda w: rounded(w, 8))})
    rows = {row.name: row for row in found.limits()}
    assert rows[name].verdict == "violated" and "a lie" in rows[name].statement
    honest = recalls(MEMORIES, {"float32": (32, lambda w: w)})
    assert {row.name: row.verdict for row in honest.limits()}[name] == "undecided"


def test_broken_roundings_fail_what_is_expected_of_them():
    signs = lambda w: np.sign(w)
    found = recalls(MEMORIES, {"2": (2, lambda w: rounded(w, 3)), "8": (8, signs)})
    rows = {row.name: row.verdict for row in found.limits()}
    assert rows["memory: monotone"] == rows["memory: 8"] == "violated"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learned(0, 5, jax.random.key(0)), "1 or more"),
        (lambda: learned(60, 10, jax.random.key(0), 50), "did not learn 60 facts"),
        (lambda: rounded(np.ones(3), 0), "bits must be 1 to 16"),
        (lambda: rounded(np.array([np.nan]), 4), "finite"),
        (lambda: rounded(np.zeros(0), 4), "empty"),
        (lambda: recalls([]), "memories of one size"),
        (lambda: recalls([*MEMORIES, learned(3, 5, jax.random.key(0))]), "memories of one size"),
        (lambda: recalls(MEMORIES, {}), "one or more roundings"),
        (lambda: recalls(MEMORIES, {"a": (0, lambda w: w)}), "positive number of bits"),
        (lambda: recalls(MEMORIES, {"a": (4, lambda w: w[:3])}), "expected 160 weights"),
        (lambda: recalls(MEMORIES, {"a": (4, lambda w: w * np.nan)}), "finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_sum_of_zero_recalls_nothing():
    x = np.array([[1.0, 1.0], [1.0, -1.0]])
    assert Memory(x, np.array([1.0, 1.0]), np.ones(2)).recall(np.ones(2)) == 0.5
