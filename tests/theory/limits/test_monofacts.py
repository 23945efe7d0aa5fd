"""Good and Turing: exact expectations by enumeration, and texts whose natural order is bursty."""

import itertools

import jax
import numpy as np
import pytest

from jaxquant.theory.limits.monofacts import (
    expected_once,
    monofact_rate,
    monofacts,
    ngrams,
    split_monofacts,
)

KEY = jax.random.key(0)


def bursty(blocks=20, size=200):
    """A text whose blocks have vocabularies of their own."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.zipf(1.5, size).clip(max=50) + 50 * b for b in range(blocks)])


@pytest.mark.parametrize("size", range(1, 8))
def test_the_expectation_is_that_of_all_samples(size):
    counts = np.array([1, 1, 2, 3])
    items = np.repeat(np.arange(4), counts)
    samples = list(itertools.combinations(range(7), size))
    once = [np.sum(np.bincount(items[list(s)], minlength=4) == 1) / size for s in samples]
    assert expected_once(counts, size) == pytest.approx(np.mean(once), rel=1e-12)
    # The same number is the share of further draws that size - 1 draws have not seen.
    unseen = [
        items[j] not in items[list(s)]
        for s in itertools.combinations(range(7), size - 1)
        for j in set(range(7)) - set(s)
    ]
    assert expected_once(counts, size) == pytest.approx(np.mean(unseen), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ngrams_are_those_of_tuples(n):
    tokens = np.random.default_rng(n).integers(-3, 4, 300)
    index = ngrams(tokens, n)
    tuples = list(
        zip(*(tokens[k : len(tokens) - n + 1 + k].tolist() for k in range(n)), strict=True)
    )
    assert len(set(zip(index.tolist(), tuples, strict=True))) == len(set(tuples)) == index.max() + 1
    single = sum(tuples.count(x) == 1 for x in tuples) / len(tuples)
    assert monofact_rate(np.bincount(index)) == single


@pytest.mark.parametrize("n", [1, 2])
def test_random_halves_agree_and_natural_ones_do_not(n):
    found = monofacts(bursty(), n, KEY)
    assert [row.verdict for row in found.limits()] == ["holds", "holds", "-"]
    assert found.natural_unseen > 2 * found.natural_once
    index = ngrams(bursty(), n)
    broken = split_monofacts(index, [index] * 8, n)  # splits that are not random
    assert broken.limits()[1].verdict == "violated"
    assert broken.unseen[0] == broken.natural_unseen
    near = split_monofacts(index, [np.roll(index, k) for k in range(8)], n)
    assert near.limits()[1].verdict == "violated"


def test_independent_draws_are_estimated_well():
    p = 1 / np.arange(1, 50_001)
    draws = np.random.default_rng(0).choice(50_000, 10_000, p=p / p.sum())
    counts = np.bincount(draws, minlength=50_000)
    unseen = (p / p.sum())[counts == 0].sum()
    assert monofact_rate(counts) == pytest.approx(unseen, abs=0.02) and 0.28 < unseen < 0.33


def test_ends():
    assert monofact_rate(np.array([1, 1])) == 1 == expected_once(np.array([1, 1, 1]), 2)
    assert monofacts(np.arange(20), 1, KEY).limits()[0].verdict == "holds"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ngrams(np.zeros(0, int), 1), "integer tokens"),
        (lambda: ngrams(np.arange(3), 4), "integer tokens"),
        (lambda: ngrams(np.full(3, np.nan), 1), "integer tokens"),
        (lambda: monofact_rate(np.array([0])), "positive sum"),
        (lambda: monofact_rate(np.array([-1, 2])), "0 or more"),
        (lambda: expected_once(np.array([1, 2]), 4), "size must be 1 to 3"),
        (lambda: monofacts(np.arange(1), 1, KEY), "two n-grams"),
        (lambda: monofacts(np.arange(9), 1, KEY, 1), "splits must be 2"),
        (lambda: split_monofacts(np.arange(9), []), "one order or more"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
