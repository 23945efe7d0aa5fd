"""Alpha-stable distributions against closed forms and SciPy; their exponents; fits to samples."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from jaxquant.theory.field_counts import count_fields
from jaxquant.theory.stable_fit import fit_stable, fit_stable_counts
from jaxquant.theory.stable_law import StableLaw, ecf8_paper_bounds

X = np.array([0, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 1, 2, 3, 5, 10, 30])
FAR = np.array([1e2, 1e4, 1e8, 1e30, 1e200])


def drawn(alpha, size=100_000, seed=0):
    """The method of Chambers, Mallows and Stuck, which evaluates no distribution function."""
    random = np.random.default_rng(seed)
    angle, wait = random.uniform(-math.pi / 2, math.pi / 2, size), random.exponential(size=size)
    tilt = (np.cos((1 - alpha) * angle) / wait) ** ((1 - alpha) / alpha)
    return np.sin(alpha * angle) / np.cos(angle) ** (1 / alpha) * tilt


def test_a_gaussian_and_a_cauchy_distribution():
    for alpha, exact, near in (
        (2.0, stats.norm(scale=2**0.5), 2 - 1e-6),
        (1.0, stats.cauchy(), 1 + 2e-5),
    ):
        law = StableLaw(alpha)
        np.testing.assert_allclose(law.sf(X), exact.sf(X), rtol=1e-12)
        np.testing.assert_allclose([law.pdf(-x) for x in X], exact.pdf(X), rtol=1e-12)
        # The integral next to the closed form is continuous.
        np.testing.assert_allclose(StableLaw(near).sf(X), exact.sf(X), atol=4e-6)
    wide = StableLaw(1.0, 3.0)
    np.testing.assert_allclose(wide.cdf(-X), stats.cauchy(scale=3).cdf(-X), rtol=1e-12)
    np.testing.assert_allclose(wide.cdf(X) + wide.cdf(-X), 1)


@pytest.mark.parametrize("alpha", [0.6, 1.1, 1.5, 1.9])
def test_the_integral_is_scipys(alpha):
    x = np.array([0.3, 4.0])
    np.testing.assert_allclose(StableLaw(alpha).sf(x), stats.levy_stable.sf(x, alpha, 0), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.99, 1.001, 1.3, 1.7, 1.99, 1.9999])
def test_density_and_distribution_function_agree_and_the_tail_is_a_power(alpha):
    law = StableLaw(alpha)
    part, _ = integrate.quad(law.pdf, 0.2, 3.0, epsabs=1e-12)
    assert part == pytest.approx(float(law.sf(0.2) - law.sf(3.0)), abs=2e-8)
    assert law.pdf(0.0) == pytest.approx(math.gamma(1 + 1 / alpha) / math.pi)
    factor = math.gamma(alpha) * math.sin(math.pi * alpha / 2) / math.pi
    np.testing.assert_allclose(law.sf(FAR[2:]), factor * FAR[2:] ** -alpha, rtol=0.02)
    grid = law.sf(np.logspace(-12, 12, 500))
    assert (np.diff(grid) <= 1e-8).all() and ((grid >= 0) & (grid <= 0.5)).all()
    assert law.sf(np.zeros((2, 0))).shape == (2, 0)


def test_exponents_of_stable_numbers():
    """Means over the phases of the scale; of both samples and the law. No bound is the paper's."""
    phases = 2 ** np.linspace(0, 1, 8, endpoint=False)
    for alpha, bits in ((2.0, 2.544), (1.8, 2.654), (1.5, 2.819), (1.0, 3.1945)):
        law = np.mean([StableLaw(alpha, s).exponent_entropy for s in phases])
        assert law == pytest.approx(bits, abs=1e-3)
        sample = count_fields(drawn(alpha).clip(-1e38, 1e38), "float32").entropies.exponent
        assert sample == pytest.approx(StableLaw(alpha).exponent_entropy, abs=0.015)
        low, high = ecf8_paper_bounds(alpha)
        assert low < law and (law < high) == (alpha == 2)
    assert ecf8_paper_bounds(2.0) == pytest.approx((1.6, 8 / 3))
    assert ecf8_paper_bounds(1.0) == pytest.approx((2 / 3, 2.0))


@pytest.mark.parametrize("alpha", [0.8, 1.0, 1.4, 1.9, 2.0])
def test_a_fit_finds_alpha_and_scale(alpha):
    found = fit_stable(0.02 * drawn(alpha))
    assert found.law.alpha == pytest.approx(alpha, abs=0.02)
    assert abs(found.law.alpha - alpha) < 4 * found.alpha_error
    assert abs(found.law.scale - 0.02) < 4 * found.scale_error < 0.001
    assert found.weights == 100_000 and found.misfit < 0.003


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_rounding_is_taken_into_account(dtype):
    w = (1.5 * drawn(1.7)).clip(-440, 440)
    found = fit_stable_counts(count_fields(w, dtype))
    assert found.law.alpha == pytest.approx(1.7, abs=0.02)
    assert found.law.scale == pytest.approx(1.5, rel=0.015)


def test_outliers_and_zeros_hardly_move_a_fit():
    w = drawn(1.8)
    clean = fit_stable(w).law
    spoiled = np.concatenate([w, np.zeros(30_000), np.full(3, 1e30)])
    found = fit_stable(spoiled)
    assert found.law.alpha == pytest.approx(clean.alpha, abs=0.005)
    assert found.law.scale == pytest.approx(clean.scale, rel=0.005)
    # The misfit tells of weights that are no stable numbers at all.
    assert fit_stable(np.random.default_rng(0).uniform(1, 2, 10_000)).misfit > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StableLaw(2.1), "alpha must be from 0.5 to 2, got 2.1"),
        (lambda: StableLaw(math.nan), "alpha must be from"),
        (lambda: StableLaw(1.5, 0.0), "scale must be a finite number above 0, got 0.0"),
        (lambda: ecf8_paper_bounds(0.0), "alpha must be above 0"),
        (lambda: fit_stable(np.ones(50)), "at least 100 normal numbers .* got 50 in 1 bins"),
        (lambda: fit_stable(np.ones(500)), "several magnitudes, got 500 in 1 bins"),
        (lambda: fit_stable(np.zeros(500)), "got 0 in 0 bins"),
        (lambda: fit_stable(np.array([1.0, np.nan] * 100)), "w must be finite, but 100 of 200"),
        (lambda: fit_stable(np.arange(500)), "w must be floating-point, got int64"),
        (lambda: fit_stable(np.zeros(0)), "w must not be empty"),
        (lambda: fit_stable_counts(3), "expected a FieldCounts"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
