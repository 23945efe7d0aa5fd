"""Checks of the numbers that formulas take: what is accepted, what is refused, and how."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.number_checks import check_shapes, finite, nonnegative, positive, probabilities

REFUSED = {
    nonnegative: [-1.0, np.nan, -np.inf],
    positive: [0.0, -1.0, np.nan, np.inf],
    finite: [np.nan, np.inf, -np.inf],
}


@pytest.mark.parametrize("check", [nonnegative, positive, finite, probabilities])
def test_float64_copies_of_every_kind_of_array(check):
    for value in ([1, 3], (1.0, 3.0), np.float32([1, 3]), jnp.asarray([1, 3])):
        got = check(value, "x")
        assert got.dtype == np.float64 and got.shape == (2,)
        assert got[1] == 3 * got[0]


@pytest.mark.parametrize(("check", "bad"), [(c, b) for c, bad in REFUSED.items() for b in bad])
def test_refuses_one_bad_element_among_good_ones(check, bad):
    with pytest.raises(ValueError, match="^the rate must"):
        check(np.array([[1.0, bad], [2.0, 3.0]]), "the rate")
    with pytest.raises(ValueError, match="^the rate must"):
        check(bad, "the rate")


def test_infinity_is_nonnegative_unless_refused():
    assert nonnegative(np.inf, "rate") == np.inf
    with pytest.raises(ValueError, match="rate must be finite and nonnegative, got inf"):
        nonnegative(np.inf, "rate", finite=True)


def test_names_the_first_bad_element():
    with pytest.raises(ValueError, match="step must be positive and finite, got -2"):
        positive([1.0, -2.0, 0.0], "step")


def test_probabilities_are_those_of_each_row():
    np.testing.assert_array_equal(probabilities([[1, 3], [2, 0]], "p"), [[0.25, 0.75], [1.0, 0.0]])


@pytest.mark.parametrize("scale", [1e308, 1.0, 1e-320])
def test_probabilities_neither_overflow_nor_vanish(scale):
    np.testing.assert_array_equal(probabilities(np.full((2, 4), scale), "p"), np.full((2, 4), 0.25))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (1.0, "p must be a nonempty array"),
        ([], "p must be a nonempty array"),
        ([[1.0, 1.0], [0.0, 0.0]], "p must have a positive sum"),
        ([1.0, -1.0], "p must be finite and nonnegative, got -1"),
        ([1.0, np.inf], "p must be finite and nonnegative, got inf"),
    ],
)
def test_probabilities_refuse(bad, message):
    with pytest.raises(ValueError, match=message):
        probabilities(bad, "p")


def test_shapes_that_do_not_broadcast_are_named():
    check_shapes(rate=np.ones((2, 1)), variance=np.ones(3))
    with pytest.raises(ValueError, match=r"got the shapes rate \[2\], variance \[3\]"):
        check_shapes(rate=np.ones(2), variance=np.ones(3))
