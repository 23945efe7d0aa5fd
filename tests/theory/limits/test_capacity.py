"""Cover's theorem by a recursion and by experiment, and points that are not in general position."""

import itertools
from functools import cache

import jax
import numpy as np
import pytest

from jaxquant.theory.limits.capacity import (
    cover_share,
    is_separable,
    projected,
    random_separability,
    separability,
)

KEY = jax.random.key(0)


@cache
def labelings(m, n):
    """Recursion: a new point splits the planes that can pass through it."""
    if m == 1 or n == 0:
        return 2 * (n > 0)
    return labelings(m - 1, n) + labelings(m - 1, n - 1)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 2), (7, 7), (45, 30), (75, 30), (200, 90)])
def test_cover_is_its_recursion(m, n):
    assert cover_share(m, n) == labelings(m, n) / 2**m


def test_half_of_the_labelings_at_twice_the_dimension():
    assert all(cover_share(2 * n, n) == 0.5 for n in (1, 2, 30, 1000, 5000))
    assert round(cover_share(45, 30), 4) == 0.9887 and round(cover_share(75, 30), 4) == 0.0403


def test_all_labelings_of_a_few_points_by_count():
    x = np.random.default_rng(0).normal(size=(7, 3))
    count = sum(is_separable(x, np.array(y)) for y in itertools.product((-1, 1), repeat=7))
    assert count == labelings(7, 3) < 2**7
    # A plane with an offset separates more, as in one more dimension.
    shifted = np.hstack([x, np.ones((7, 1))])
    count = sum(is_separable(shifted, np.array(y)) for y in itertools.product((-1, 1), repeat=7))
    assert count == labelings(7, 4)


def test_the_experiment_agrees_and_repeats():
    found = random_separability(24, 12, 100, KEY)
    assert found == random_separability(24, 12, 100, KEY)
    assert found.expected == 0.5 and found.limits()[0].verdict == "holds"


def test_states_in_general_position_survive_a_projection_and_others_do_not():
    states = np.random.default_rng(1).normal(size=(24, 40)) * np.arange(40)
    row = separability(projected(states, 12, KEY), 60, KEY).limits("general position")[0]
    assert row.verdict == "holds" and row.name == "general position"
    for broken in (np.ones((24, 40)), np.repeat(states[:2], 12, 0), states[:, :1] * np.ones(40)):
        found = separability(projected(broken, 12, KEY), 60, KEY)
        assert found.limits()[0].verdict == "violated" and found.separable == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cover_share(0, 3), "points must be"),
        (lambda: cover_share(10**9, 3), "points must be"),
        (lambda: cover_share(3, 0), "dimension 1 or more"),
        (lambda: is_separable(np.zeros((0, 3)), np.zeros(0)), "must not be empty"),
        (lambda: is_separable(np.full((2, 3), np.nan), np.ones(2)), "finite"),
        (lambda: is_separable(np.ones((2, 3)), np.zeros(2)), "-1 or 1"),
        (lambda: is_separable(np.ones(3), np.ones(3)), r"points \[n, d\]"),
        (lambda: separability(np.ones((2, 3)), 0, KEY), "trials must be"),
        (lambda: random_separability(10**9, 3, 5, KEY), "points must be"),
        (lambda: projected(np.ones((2, 3)), 0, KEY), "dimension must be"),
        (lambda: separability(np.ones((2, 3)), 5, 0), "expected a key"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
