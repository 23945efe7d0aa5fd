"""The rate-distortion-perception function of a Gaussian: closed form, brute force, certificate."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from jaxquant.theory.perception import (
    centroid_perception,
    perception_distortion,
    perception_rate,
)
from jaxquant.theory.rate_distortion import gaussian_distortion, gaussian_rate
from jaxquant.theory.scalar_quantizers import lloyd_max

POINTS = [(0.25, 0.0, 1.0466), (0.25, 0.01, 1.0032), (0.5, 0.01, 0.5441), (1.0, 0.05, 0.1178)]


def best_coupling(d, p, s=1.0):
    """The least rate of jointly Gaussian couplings, over a grid of the output's deviation."""
    t = np.linspace(max(s - np.sqrt(p), 1e-9), s + np.sqrt(p), 200_001)
    correlation = np.maximum((s**2 + t**2 - d) / (2 * s * t), 0)  # the least that reaches d
    possible = correlation < 1
    return np.min(-np.log2(1 - correlation[possible] ** 2) / 2)


@pytest.mark.parametrize("d, p, rate", POINTS)
def test_rates(d, p, rate):
    assert perception_rate(d, p) == pytest.approx(rate, abs=5e-5)
    assert perception_rate(9 * d, 9 * p, 9.0) == pytest.approx(perception_rate(d, p))
    # The twin: a constraint on W2 instead of its square.
    if p:
        assert abs(perception_rate(d, np.sqrt(p)) - rate) > 1e-3


@pytest.mark.parametrize("d", [0.1, 0.25, 0.5, 0.9, 1.0, 1.3, 1.8])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.05, 0.3, 1.5])
def test_no_gaussian_coupling_is_better(d, p):
    assert perception_rate(d, p) == pytest.approx(best_coupling(d, p), abs=1e-9)


def certificate(d, t):
    """Return what proves on a grid that output N(0, t^2) has the least rate at this distortion.

    I + slope * E (X - Y)^2 + price * W2^2(X, Y) is convex in the joint distribution. It is least at
    a(x) p(x) exp(-slope (x - y)^2) q(y) b(y) with marginals p and q, if -log b(y) is price times
    the Kantorovich potential (1 - 1 / t) y^2 of N(0, 1) and N(0, t^2), with price >= 0. Then no
    other output is better, Gaussian or not. Sinkhorn's iterations find a and b. For t = 1 there is
    no other output to compare with, and any b will do.

    Returns:
      The rate in bits, the distortion, the price, and the largest error of that fit of -log b.
    """
    x = np.linspace(-6, 6, 121)
    y, squared = t * x, (x[:, None] - t * x) ** 2
    mass = norm.logpdf(x) - logsumexp(norm.logpdf(x))  # of x, and of y
    c = (1 + t * t - d) / (2 * t)
    kernel = -squared * c / (2 * t * (1 - c * c))  # with which jointly Gaussian X and Y correlate
    b = np.zeros_like(y)
    for _ in range(150):
        a = -logsumexp(b + mass + kernel, axis=1)
        b = -logsumexp((a + mass)[:, None] + kernel, axis=0)
    exponent = a[:, None] + kernel + b
    joint = np.exp(exponent + mass[:, None] + mass)
    inner = np.abs(x) < 3
    fit = np.polyfit(y[inner] ** 2, -b[inner], 1)
    misfit = np.abs(np.polyval(fit, y[inner] ** 2) + b[inner]).max()
    price = fit[0] / (1 - 1 / t) if t != 1 else np.inf
    return np.sum(joint * exponent) / np.log(2), np.sum(joint * squared), price, misfit


@pytest.mark.parametrize("d, p, rate", POINTS)
def test_no_other_output_is_better(d, p, rate):
    information, distortion, price, misfit = certificate(d, 1 - np.sqrt(p))
    assert distortion == pytest.approx(d, abs=1e-5)
    assert information == pytest.approx(rate, abs=1e-4)
    assert price > 0 and misfit < 1e-4


def test_other_outputs_have_no_certificate():
    """The twin: output that is wider than the source, or narrower than the classical one."""
    assert certificate(0.25, 1.1)[2] < 0
    assert certificate(0.25, np.sqrt(0.75) - 0.05)[2] < 0
    assert certificate(0.25, np.sqrt(0.75))[2] == pytest.approx(0, abs=1e-6)


def test_perfect_perception():
    assert perception_distortion(1.0, 0.0) == pytest.approx(0.26795, abs=5e-6)
    assert perception_distortion(2.0, 0.0) == pytest.approx(0.06351, abs=5e-6)
    rates = np.array([1e-6, 0.5, 1.0, 3.0, 10.0])
    closed = 2 * 4 * (1 - np.sqrt(1 - 4.0**-rates))
    np.testing.assert_allclose(perception_distortion(rates, 0.0, 4.0), closed, rtol=1e-9)
    ratio = perception_distortion(rates, 0.0) / gaussian_distortion(rates)
    assert np.all(np.diff(ratio) < 0)
    assert ratio[0] == pytest.approx(2, abs=0.01) and ratio[-1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 2.0])
def test_the_inverse(p):
    rates = np.linspace(0.01, 12, 30)
    d = perception_distortion(rates, p, 3.0)
    np.testing.assert_allclose(perception_rate(d, p, 3.0), rates, rtol=1e-7)
    assert np.all(d >= gaussian_distortion(rates, 3.0))


def test_limits():
    assert perception_rate(0.0, 0.0) == perception_rate(0.0, 0.3) == np.inf
    assert perception_rate(0.0, 0.0, 0.0) == perception_rate(0.0, 0.3, 0.0) == 0
    # Independent output of the same distribution has D = 2: no rate is needed there.
    assert perception_rate(1.9999, 0.0) > 0 and perception_rate(2.0, 0.0) == 0
    assert perception_rate(np.inf, 0.0) == 0
    d = np.linspace(0.01, 3, 50)
    assert np.array_equal(perception_rate(d, np.inf), gaussian_rate(d))
    assert np.array_equal(perception_rate(d, d), gaussian_rate(d))  # a code is a coupling
    loose = [perception_rate(d, p) for p in (0.0, 0.01, 0.1, 1.0)]
    assert np.all(np.diff(loose, axis=0) <= 1e-12) and np.all(np.diff(loose, axis=1) <= 1e-12)
    assert perception_distortion(0.0, 0.0) == 2 and perception_distortion(np.inf, 0.0) == 0
    assert perception_rate(1.0, 0.0, 0.0) == perception_distortion(1.0, 0.0, 0.0) == 0


def test_centroids_shrink():
    """W2^2 of a scalar quantizer is D, above the bound: an ascending map is the best coupling."""
    q = lloyd_max(norm(0, 1), 4)
    assert centroid_perception(q.distortion) == pytest.approx(0.0037, abs=5e-5)
    u = (np.arange(200_000) + 0.5) / 200_000
    x = norm.ppf(u)
    output = np.sort(q.levels[np.searchsorted(q.thresholds, x)])
    assert np.mean((x - output) ** 2) == pytest.approx(q.distortion, rel=1e-4)
    # Output of the Gaussian's own shape meets the bound: R(D, P) is R(D) from there on.
    d = np.array([0.1, 0.5, 1.0])
    least = centroid_perception(d)
    np.testing.assert_allclose(perception_rate(d, least), gaussian_rate(d), atol=1e-7)
    assert np.all(perception_rate(d, 0.9 * least) > gaussian_rate(d) + 1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: perception_rate(-1.0, 0.0), "distortion must be nonnegative, got -1"),
        (lambda: perception_rate(1.0, np.nan), "perception must be nonnegative, got nan"),
        (lambda: perception_rate(1.0, 0.0, np.inf), "variance must be finite"),
        (lambda: perception_rate(1.0, None), "perception: expected a number or an array"),
        (lambda: perception_distortion(-1.0, 0.0), "rate must be nonnegative"),
        (lambda: perception_distortion(1.0, 0.0, -1.0), "variance must be finite and nonnegative"),
        (lambda: centroid_perception(2.0), "at most the variance, got a distortion of up to 2"),
        (
            lambda: perception_rate(np.ones(2), np.ones((4, 1)), np.ones(3)),
            r"got the shapes distortion \[2\], perception \[4, 1\], variance \[3\]",
        ),
        (
            lambda: perception_distortion(np.ones(2), np.ones(3)),
            r"got the shapes rate \[2\], perception \[3\], variance \[\]",
        ),
        (
            lambda: centroid_perception(np.zeros(2), np.ones(3)),
            r"got the shapes distortion \[2\], variance \[3\]",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
