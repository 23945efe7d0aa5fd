"""Two stages fail as often as the worse of them, but not as often as a product says."""

import dataclasses

import numpy as np
import pytest

from jaxquant.theory.limits.two_stages import chosen, two_stages, within_budget


def test_failures_are_counted_and_bounded():
    rng = np.random.default_rng(0)
    for _ in range(20):
        r, a = rng.random((2, 30)) < rng.random((2, 1))
        found = two_stages(r, a)
        assert found.failed == pytest.approx(
            sum(not (x and y) for x, y in zip(r, a, strict=True)) / 30
        )
        given = 0.0 if found.attended_if_retrieved is None else found.attended_if_retrieved
        assert found.failed == pytest.approx(1 - found.retrieved * given)
        assert found.limits()[0].verdict == "holds"


def test_the_product_is_no_bound():
    both = np.arange(10) < 5
    found = two_stages(both, both)
    assert found.failed == found.bound == 0.5 < found.product == 0.75
    wrong = dataclasses.replace(found, bound=found.product)
    assert wrong.limits()[0].verdict == "violated"


def test_a_choice_is_among_what_is_retrieved():
    rng = np.random.default_rng(1)
    exact, rough = rng.normal(size=(2, 40, 12))
    gold = rng.integers(0, 12, 40)
    found = chosen(exact, rough, gold, 4)
    for s, r, g, ok in zip(exact, rough, gold, found, strict=True):
        some = {*np.argsort(-r)[:4].tolist(), int(g)}
        assert ok == (max(some, key=lambda j: s[j]) == g)
    best = exact.argmax(1) == gold
    assert found[best].all() and found.sum() > best.sum()  # fewer rivals than in a search of all
    assert chosen(exact, rough, gold, 12).tolist() == best.tolist()
    assert not chosen(np.ones((1, 3)), np.ones((1, 3)), np.array([2]), 2).any()  # ties


def test_a_budget_ends_retrieval():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    lengths = np.array([5.0, 7.0, 4.0])
    # Totals by falling score: 5, 9, 16 and 4, 11, 16.
    assert within_budget(np.array([1, 1]), scores, lengths, 9.0).tolist() == [True, False]
    assert within_budget(np.array([2, 0]), scores, lengths, 4.0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_stages(np.zeros(0, bool), np.zeros(0, bool)), "arrays of booleans"),
        (lambda: two_stages(np.ones(3), np.ones(3)), "arrays of booleans"),
        (lambda: two_stages(np.ones(3, bool), np.ones(2, bool)), "arrays of booleans"),
        (
            lambda: chosen(np.ones((1, 3)), np.ones((1, 2)), np.array([0]), 1),
            "two arrays of scores",
        ),
        (lambda: chosen(np.ones((1, 3)), np.ones((1, 3)), np.array([3]), 1), "from 0 to 2"),
        (lambda: chosen(np.ones((1, 3)), np.full((1, 3), np.nan), np.array([0]), 1), "finite"),
        (lambda: within_budget(np.array([3]), np.ones((1, 3)), np.ones(3), 1.0), "a rank from 0"),
        (lambda: within_budget(np.array([0]), np.ones((1, 3)), np.ones(2), 1.0), "lengths"),
        (lambda: within_budget(np.array([0]), np.ones((1, 3)), np.ones(3), np.nan), "budget"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
