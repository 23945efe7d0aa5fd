"""Rate-distortion functions: closed forms, and Blahut-Arimoto against them."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxquant.theory.rate_distortion import (
    DECIBELS_PER_BIT,
    blahut_arimoto,
    gap_in_bits,
    gap_in_decibels,
    gaussian_distortion,
    gaussian_rate,
)

COIN = np.array([0.5, 0.5])
HAMMING = 1 - np.eye(2)


def binary_entropy(p):
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def gaussian_grid(points=401):
    x = np.linspace(-5, 5, points)
    return np.exp(-(x**2) / 2), (x[:, None] - x) ** 2


def test_the_gaussian_curve():
    rates = np.linspace(0, 12, 25)
    np.testing.assert_allclose(gaussian_rate(gaussian_distortion(rates)), rates, atol=1e-12)
    np.testing.assert_allclose(gaussian_rate(9 * gaussian_distortion(rates), 9.0), rates)
    assert gaussian_rate(jnp.float32(0.25)) == 1 and gaussian_distortion(2, 16) == 1
    assert gaussian_rate(np.array([[0.25], [4.0]]), np.array([1.0, 16.0])).tolist() == [
        [1.0, 3.0],
        [0.0, 1.0],
    ]
    assert gaussian_rate(1e-320, 1e300) > 1000  # whose ratio overflows


def test_the_ends_of_the_gaussian_curve():
    assert gaussian_rate(1.0) == gaussian_rate(7.0) == gaussian_rate(np.inf) == 0
    assert gaussian_rate(0.0) == np.inf and gaussian_distortion(np.inf) == 0
    assert gaussian_rate(0.0, 0.0) == gaussian_rate(3.0, 0.0) == gaussian_distortion(1.0, 0.0) == 0


def test_gaps():
    """In bits at the same distortion, in dB at the same rate: one line of 6.02 dB per bit."""
    assert gap_in_bits(2.0, 1 / 16) == gap_in_decibels(2.0, 1 / 16) == 0
    assert gap_in_bits(2.0, 0.25) == 1 and gap_in_bits(2.0, 4.0, 16.0) == 1
    assert gap_in_bits(1.0, 1 / 16) == -1  # below the bound
    d = np.array([0.01, 0.1, 0.9])
    np.testing.assert_allclose(
        gap_in_decibels(3.0, d, 2.0), gap_in_bits(3.0, d, 2.0) * DECIBELS_PER_BIT
    )
    assert pytest.approx(6.0206, abs=5e-5) == DECIBELS_PER_BIT
    # Above the variance R(D) is 0, so that the whole rate is wasted.
    assert gap_in_bits(3.0, 5.0) == 3
    assert gap_in_bits(3.0, 0.0) == gap_in_decibels(3.0, 0.0) == -np.inf
    assert gap_in_bits(3.0, 0.0, 0.0) == 3


@pytest.mark.parametrize(
    "slope, rate, tolerance",
    [
        (1.0, 0.5, 1e-4),
        (2.0, 1.0, 2e-4),
        (5.0, 1.6610, 5e-4),
        (10.0, 2.1610, 1e-3),
        (20.0, 2.6610, 1e-3),
    ],
)
def test_blahut_arimoto_on_a_gaussian_grid(slope, rate, tolerance):
    found = blahut_arimoto(*gaussian_grid(), slope, tolerance=tolerance)
    assert found.rate == pytest.approx(rate, abs=5e-5)
    assert found.distortion == pytest.approx(1 / (2 * slope), rel=2e-5)
    # The bounds hold the closed form, which a grid that ends at 5 is 1e-5 below.
    assert found.lower <= gaussian_rate(found.distortion) <= found.rate + 2e-5
    assert 0 <= found.rate - found.lower <= tolerance * (1 + 1e-6)
    assert found.output.sum() == pytest.approx(1)


def test_a_slope_in_bits_is_another_point():
    """The twin: the slope is in nats per unit, as an exponent of e."""
    p, d = gaussian_grid(101)
    found = blahut_arimoto(p, d, 2.0 / np.log(2), tolerance=1e-3)
    assert abs(found.distortion - 0.25) > 0.05


def test_blahut_arimoto_on_a_coin():
    """A Bernoulli source under Hamming distortion has R(D) = h(p) - h(D)."""
    found = blahut_arimoto(COIN, HAMMING, 2.0, tolerance=1e-10)
    assert found.distortion == pytest.approx(0.119203, abs=5e-7)
    assert found.rate == pytest.approx(0.472935, abs=5e-7)
    assert found.rate == pytest.approx(1 - binary_entropy(found.distortion))
    biased = blahut_arimoto(np.array([0.2, 0.8]), HAMMING, 2.0, tolerance=1e-10)
    assert biased.rate == pytest.approx(binary_entropy(0.2) - binary_entropy(biased.distortion))


def test_blahut_arimoto_is_a_convex_program():
    """The output maximizes sum p log(A q): SciPy's optimizer finds the same on a random source."""
    rng = np.random.default_rng(0)
    p, d, slope = rng.dirichlet(np.ones(6)), rng.uniform(0, 3, (6, 4)), 1.5
    a = np.exp(-slope * d)
    loss = lambda v: -p @ np.log(a @ (np.exp(v) / np.exp(v).sum()))
    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-10})
    found = blahut_arimoto(p, d, slope, tolerance=1e-9)
    dual = found.rate * np.log(2) + slope * found.distortion
    assert dual == pytest.approx(best.fun, abs=1e-8)


def test_scales_and_slopes_at_the_limits_of_float64():
    """Symbols of probability 0 are left out, and no exponential underflows to a wrong answer."""
    symbols = np.arange(4)
    d = (symbols[:, None] - symbols) ** 2.0
    p = np.array([0.5, 0.5, 0.0, 1e-9])
    exact = blahut_arimoto(p, d, 1e6)
    assert exact.distortion == 0 and exact.rate == pytest.approx(1.0, abs=1e-6)
    flat = blahut_arimoto(p, d, 1e-9)
    assert flat.rate == pytest.approx(0, abs=1e-4) and flat.lower == 0
    shifted = blahut_arimoto(p, d + 1000.0, 3.0)
    plain = blahut_arimoto(p, d, 3.0)
    assert shifted.rate == pytest.approx(plain.rate, abs=1e-9)
    assert shifted.distortion == pytest.approx(plain.distortion + 1000)


def test_an_iteration_that_does_not_converge_says_so():
    with pytest.raises(ValueError, match="still .* bits apart after 3 iterations.*raise max_iter"):
        blahut_arimoto(*gaussian_grid(101), 5.0, max_iterations=3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gaussian_rate(-1.0), "distortion must be nonnegative, got -1"),
        (lambda: gaussian_rate(np.nan), "distortion must be nonnegative, got nan"),
        (lambda: gaussian_rate(1.0, np.inf), "variance must be finite and nonnegative, got inf"),
        (lambda: gaussian_rate("1"), "distortion: expected a number or an array"),
        (lambda: gaussian_distortion(-0.5), "rate must be nonnegative, got -0.5"),
        (lambda: gap_in_bits(np.inf, 1.0), "rate must be finite"),
        (lambda: gap_in_decibels(1.0, 1.0, 0.0), "variance must be positive"),
        (
            lambda: gaussian_rate(np.ones(2), np.ones(3)),
            r"must broadcast, got the shapes distortion \[2\], variance \[3\]",
        ),
        (
            lambda: gaussian_distortion(np.ones(2), np.ones(3)),
            r"got the shapes rate \[2\], variance \[3\]",
        ),
        (
            lambda: gap_in_bits(np.ones(2), np.ones(3)),
            r"got the shapes rate \[2\], distortion_and_variance \[3\]",
        ),
        (
            lambda: gap_in_decibels(1.0, np.ones(2), np.ones(3)),
            r"got the shapes rate \[\], distortion \[2\], variance \[3\]",
        ),
        (lambda: blahut_arimoto(COIN, np.eye(3), 1.0), r"\[n, k\], got shapes \[2\] and \[3, 3\]"),
        (lambda: blahut_arimoto(COIN, HAMMING[0], 1.0), r"got shapes \[2\] and \[2\]"),
        (lambda: blahut_arimoto(COIN[:0], HAMMING, 1.0), "p must be a nonempty array"),
        (lambda: blahut_arimoto(COIN * 0, HAMMING, 1.0), "p must have a positive sum"),
        (lambda: blahut_arimoto(-COIN, HAMMING, 1.0), "p must be finite and nonnegative"),
        (lambda: blahut_arimoto(COIN, HAMMING * np.inf, 1.0), "distortion_matrix must be finite"),
        (lambda: blahut_arimoto(COIN, -HAMMING, 1.0), "distortion_matrix must be nonnegative"),
        (lambda: blahut_arimoto(COIN, HAMMING, 0.0), "slope must be positive and finite, got 0"),
        (lambda: blahut_arimoto(COIN, HAMMING, 1.0, tolerance=-1.0), "tolerance must be positive"),
        (lambda: blahut_arimoto(COIN, HAMMING, 1.0, max_iterations=0), "must be 1 or more, got 0"),
    ],
)
def test_bad_arguments(call, message):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        call()
