"""Scalar quantizers of a fixed number of levels: reference values, Lloyd's conditions, samples."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxquant.formats.normal_float import normal_quantiles
from jaxquant.theory.rate_distortion import gap_in_bits, gap_in_decibels, gaussian_distortion
from jaxquant.theory.scalar_quantizers import best_uniform, lloyd_max, scalar_quantizer

NORMAL = stats.norm(0, 1)
# Levels, Lloyd-Max D, entropy of its codes, best uniform D, its step, dB of Lloyd-Max over D(R).
TABLE = [
    (2, 0.363380, 1.0, 0.363380, 1.5958, 1.62),
    (3, 0.190174, 1.5358, 0.190174, 1.2240, 2.33),
    (4, 0.117482, 1.9111, 0.118846, 0.9957, 2.74),
    (8, 0.034548, 2.8249, 0.037440, 0.5860, 3.45),
    (16, 0.009501, 3.7653, 0.011543, 0.3352, 3.86),
]


@pytest.mark.parametrize("levels, distortion, entropy, uniform, step, decibels", TABLE)
def test_the_gaussian_table(levels, distortion, entropy, uniform, step, decibels):
    best = lloyd_max(NORMAL, levels)
    assert best.distortion == pytest.approx(distortion, abs=5e-7)
    assert best.entropy == pytest.approx(entropy, abs=5e-5)
    assert gap_in_decibels(best.rate, best.distortion) == pytest.approx(decibels, abs=5e-3)
    even, found = best_uniform(NORMAL, levels)
    assert even.distortion == pytest.approx(uniform, abs=5e-7)
    assert found == pytest.approx(step, abs=5e-5)
    assert even.distortion >= best.distortion * (1 - 1e-12)


def test_256_levels_and_the_asymptote():
    """Panter and Dite: L^2 D -> sqrt(3) pi / 2, which is 4.35 dB over D(R)."""
    best, (even, step) = lloyd_max(NORMAL, 256), best_uniform(NORMAL, 256)
    assert best.distortion == pytest.approx(4.11851e-5, abs=5e-11)
    assert even.distortion == pytest.approx(8.8e-5, abs=5e-7) and step == pytest.approx(
        0.0308, abs=5e-5
    )
    asymptote = 10 * np.log10(np.sqrt(3) * np.pi / 2)
    assert asymptote == pytest.approx(4.35, abs=5e-3)
    gap = gap_in_decibels(8.0, best.distortion)
    assert gap_in_decibels(4.0, lloyd_max(NORMAL, 16).distortion) < gap < asymptote
    assert gap == pytest.approx(4.312, abs=5e-4)


@pytest.mark.parametrize(
    "source",
    [stats.norm(3, 2), stats.laplace(-1, 0.5), stats.uniform(2, 5), stats.gamma(2), stats.t(5)],
    ids=lambda d: d.dist.name,
)
def test_lloyds_conditions(source):
    """Centroids and midpoints, by SciPy's own quadrature; E[Q^2] = E[X^2] - D."""
    q = lloyd_max(source, 5)
    np.testing.assert_allclose(q.thresholds, (q.levels[1:] + q.levels[:-1]) / 2, rtol=1e-9)
    edges = [-np.inf, *q.thresholds, np.inf]
    for level, p, a, b in zip(q.levels, q.probabilities, edges[:-1], edges[1:], strict=True):
        assert source.cdf(b) - source.cdf(a) == pytest.approx(p, abs=1e-9)
        assert source.expect(lb=a, ub=b, conditional=True) == pytest.approx(level, abs=1e-6)
    second = source.var() + source.mean() ** 2
    assert q.probabilities @ q.levels**2 == pytest.approx(second - q.distortion, rel=1e-7)


def test_uniform_density_and_scale():
    """A uniform density has D = width^2 / 12; D grows with the square of the scale."""
    q, step = best_uniform(stats.uniform(2, 5), 4)
    assert q.distortion == pytest.approx((5 / 4) ** 2 / 12) and step == pytest.approx(5 / 4)
    np.testing.assert_allclose(lloyd_max(stats.uniform(2, 5), 4).levels, q.levels, rtol=1e-6)
    big = lloyd_max(stats.norm(1e6, 1e-3), 4)
    assert big.distortion == pytest.approx(0.117482e-6, rel=1e-5)
    assert lloyd_max(stats.norm(3, 2), 1).levels.tolist() == [3.0]
    assert lloyd_max(stats.norm(3, 2), 1).distortion == 4 and lloyd_max(NORMAL, 1).entropy == 0


def test_samples():
    """The empirical D approaches the density's; levels at the wrong places are worse."""
    x = np.random.default_rng(0).normal(5, 2, (400, 500))
    q = lloyd_max(x, 8)
    assert q.distortion == pytest.approx(4 * 0.034548, rel=0.01)
    codes = np.searchsorted(q.thresholds, x)
    assert np.mean((x - q.levels[codes]) ** 2) == pytest.approx(q.distortion, rel=1e-9)
    np.testing.assert_allclose(np.bincount(codes.ravel()) / x.size, q.probabilities, atol=1e-12)
    np.testing.assert_allclose(q.levels, 5 + 2 * lloyd_max(NORMAL, 8).levels, atol=0.05)
    assert best_uniform(jnp.asarray(x), 4)[1] == pytest.approx(2 * 0.9957, rel=0.02)
    for shift in (-0.1, 0.1):
        assert scalar_quantizer(x, levels=q.levels + shift).distortion > q.distortion


def test_samples_with_duplicates():
    """No more distinct values than levels: these are the levels, without error."""
    x = np.array([3.0, 1.0, 1.0, 7.0])
    exact = lloyd_max(x, 4)
    assert exact.levels.tolist() == [1.0, 3.0, 7.0] and exact.distortion == pytest.approx(
        0, abs=1e-12
    )
    assert exact.probabilities.tolist() == [0.5, 0.25, 0.25]
    assert lloyd_max(x, 2).distortion == pytest.approx(2 / 3)  # {1, 1, 3} and {7}
    ties = np.repeat(np.arange(10.0), 50)
    assert lloyd_max(ties, 5).distortion == pytest.approx(0.25)


def test_midpoints_of_cells_are_worse_than_centroids():
    """The twin: reproduction in the middle of the cells of the best 4 level quantizer."""
    best = lloyd_max(NORMAL, 4)
    again = scalar_quantizer(NORMAL, thresholds=best.thresholds)
    assert again.distortion == pytest.approx(0.117482, abs=5e-7)
    step = best.thresholds[1] - best.thresholds[0]
    middle = np.append(best.thresholds - step / 2, best.thresholds[-1] + step / 2)
    assert scalar_quantizer(NORMAL, levels=middle).distortion > 0.1188


def test_normal_float_is_not_optimal():
    """NF4 at its best scale for Gaussian values: D(R) < Lloyd-Max < NF4 < best uniform."""
    table = np.array(normal_quantiles(4))
    nf4 = min(
        (scalar_quantizer(NORMAL, levels=table * s) for s in np.linspace(1.5, 4, 251)),
        key=lambda q: q.distortion,
    )
    even, _ = best_uniform(NORMAL, 16)
    lloyd = lloyd_max(NORMAL, 16).distortion
    assert gaussian_distortion(4.0) < lloyd < nf4.distortion < even.distortion
    assert gap_in_bits(nf4.entropy, nf4.distortion) > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lloyd_max(NORMAL, 0), "levels must be 1 or more, got 0"),
        (lambda: lloyd_max(NORMAL, 2.5), "levels: expected an integer"),
        (lambda: best_uniform(NORMAL, 1), "levels must be 2 or more, got 1"),
        (lambda: lloyd_max(3.0, 2), "expected an array of samples, or .* got float"),
        (lambda: lloyd_max([1.0, 2.0], 2), "got a list: wrap it in np.asarray"),
        (lambda: best_uniform((1.0, 2.0), 2), "got a tuple: wrap it in np.asarray"),
        (lambda: lloyd_max(stats.norm(0, [1, 2]), 2), r"must be numbers, .* of the shape \[2\]"),
        (lambda: lloyd_max(stats.norm([0, 1], 1), 2), r"must be numbers, .* of the shape \[2\]"),
        (lambda: lloyd_max(stats.poisson(3), 2), "expected an array of samples, or"),
        (lambda: lloyd_max(stats.cauchy(), 2), "must have a finite mean and variance"),
        (lambda: lloyd_max(stats.beta(0.01, 0.01), 2), "not resolved by quadrature"),
        (lambda: lloyd_max(np.zeros(0), 2), r"samples must not be empty, got shape \[0\]"),
        (lambda: lloyd_max(np.array([1, np.nan]), 2), "1 of 2 elements are not"),
        (lambda: lloyd_max(np.ones(5), 2), "must not all be equal: one level, 1, is exact"),
        (lambda: lloyd_max(np.array([0, 1e-200, 2e-200]), 2), "rescale the samples"),
        (lambda: scalar_quantizer(NORMAL), "expected levels, thresholds or both, got neither"),
        (lambda: scalar_quantizer(NORMAL, levels=np.array([1.0, 1.0])), "levels must be one axis"),
        (lambda: scalar_quantizer(NORMAL, thresholds=np.array([2.0, 1.0])), "strictly ascending"),
        (lambda: scalar_quantizer(NORMAL, levels=np.eye(2)), "levels must be one axis"),
        (
            lambda: scalar_quantizer(NORMAL, levels=np.arange(3.0), thresholds=np.zeros(1)),
            "one level more than thresholds, got 3 and 1",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# D over the variance by the closed form 1 - (E|X| / s)^2 at 2 levels, and as measured.
@pytest.mark.parametrize(
    "degrees, levels, distortion",
    [
        (2.5, 2, 0.7090988),
        (3, 2, 1 - 4 / np.pi**2),
        (3, 4, 0.3382595),
        (3, 16, 0.1210228),
        (4, 2, 0.5),
    ],
)
def test_the_best_step_for_heavy_tails(degrees, levels, distortion):
    """The range of such a density is far wider than the best quantizer's."""
    source = stats.t(degrees)
    found, step = best_uniform(source, levels)
    offsets = np.arange(levels) - (levels - 1) / 2
    at = lambda x: scalar_quantizer(source, levels=offsets * x).distortion
    assert found.distortion <= min(map(at, np.geomspace(step / 3, 3 * step, 30))) * (1 + 1e-9)
    assert found.distortion / source.var() == pytest.approx(distortion, rel=1e-6)


def test_the_best_step_of_samples_with_an_outlier():
    """The best step is far below the standard deviation, or above what puts levels on all."""
    x = np.append(np.tile([-1.0, 1.0], 5000), [-1e6, 1e6])
    assert best_uniform(x, 2)[1] == pytest.approx(2 * np.abs(x).mean(), rel=1e-6)
    # The outer two of four levels lie outside: least 50 (0.5 - s / 2)^2 + (1 - 1.5 s)^2.
    y = np.append(np.tile([-0.5, 0.5], 50), [-1.0, 1.0])
    assert best_uniform(y, 4)[1] == pytest.approx(14 / 14.75)


def test_the_mean_is_not_always_the_best_center():
    """Two levels for a symmetric density with three peaks: one peak to one level, two to the other.

    The peaks are +-1 with probability 1/4 and 0 with 1/2, of a small variance v. Around the mean
    D = E[X^2] - (E|X|)^2, about 1/4, and with centroids of unequal cells 1/6 + v.
    """
    rng = np.random.default_rng(0)
    half = np.repeat([1.0, 0.0], 2000) + 0.05 * rng.normal(size=4000)
    x = np.append(half, -half)
    even = best_uniform(x, 2)[0].distortion
    assert even == pytest.approx(np.mean(x**2) - np.abs(x).mean() ** 2)
    uneven = scalar_quantizer(x, levels=np.array([-1 / 3, 1.0]))
    assert uneven.distortion == pytest.approx(1 / 6 + 0.05**2, rel=0.01)
    assert uneven.distortion < 0.8 * even
    assert lloyd_max(stats.laplace(), 2).levels.sum() == pytest.approx(0, abs=1e-7)  # log-concave
