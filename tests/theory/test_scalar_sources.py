"""Moments of sources over intervals: closed forms, tails, and what is refused."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxquant.theory.scalar_sources import graded, high_rate_levels, source_of

EDGES = np.array([-np.inf, -2.0, -0.3, 0.4, 1.5, np.inf])


@pytest.mark.parametrize(
    "source",
    [stats.norm(3, 2), stats.laplace(-1, 0.5), stats.uniform(2, 5), stats.gamma(2), stats.t(2.5)],
    ids=lambda d: d.dist.name,
)
def test_moments_of_a_density(source):
    """Probabilities are SciPy's; the whole has the moments 1, 0, 1."""
    z = source_of(source)
    assert (z.mean, z.std) == (source.mean(), source.std())
    found = z.moments(EDGES)
    np.testing.assert_allclose(found[0], np.diff(source.cdf(z.mean + z.std * EDGES)), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), [1, 0, 1], atol=1e-9)


@pytest.mark.parametrize("start", [3.0, 30.0, 1e3, 1e4])
def test_moments_of_a_heavy_tail(start):
    """Of t(3), whose density is 6 sqrt(3) / pi / (3 + x^2)^2, beyond a point; both sides alike."""
    z = source_of(stats.t(3))
    x = start * np.sqrt(3)
    angle = np.arctan(np.sqrt(3) / x)
    second = 3 * (angle + np.sin(2 * angle) / 2) / np.pi
    first = 3 * np.sqrt(3) / np.pi / (3 + x * x)
    tail = z.moments(np.array([start, np.inf]))[:, 0]
    other = z.moments(np.array([-np.inf, -start]))[:, 0]
    np.testing.assert_allclose(tail[0], stats.t(3).sf(x), rtol=1e-9)
    np.testing.assert_allclose(tail[1:], [first / np.sqrt(3), second / 3], rtol=1e-9)
    np.testing.assert_allclose(other, tail * [1, -1, 1], rtol=1e-9)


def test_moments_of_samples():
    x = np.random.default_rng(0).gamma(2, size=(30, 20))
    z = source_of(x)
    standard = (x.ravel() - x.mean()) / x.std()
    found = z.moments(EDGES)
    for i, (a, b) in enumerate(itertools.pairwise(EDGES)):
        inside = standard[(standard >= a) & (standard < b)]
        expected = [np.sum(inside**k) / x.size for k in range(3)]
        np.testing.assert_allclose(found[:, i], expected, atol=1e-12)
    assert (z.low, z.high) == (standard.min(), standard.max())


def test_a_graded_grid():
    grid = graded(-3.0, 100.0, 20)
    assert len(grid) == 21 and grid[10] == 0
    assert grid[[0, -1]] == pytest.approx([-3, 100])
    assert np.all(np.diff(np.diff(grid[10:])) > 0) and np.all(np.diff(np.diff(grid[:11])) < 0)


def test_levels_at_high_rates():
    """The density of levels of a Gaussian is a Gaussian of three times the variance."""
    levels = high_rate_levels(source_of(stats.norm(5, 2)), 63)
    expected = stats.norm(0, np.sqrt(3)).ppf((np.arange(63) + 0.5) / 63)
    np.testing.assert_allclose(levels, expected, atol=0.01)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1.0, 2.0], "got a list: wrap it in np.asarray"),
        (stats.norm(0, [1, 2]), r"must be numbers, got arrays of the shape \[2\]"),
        (stats.norm(0, 0.0), "must have a finite mean and variance"),
        (stats.t(2), "must have a finite mean and variance"),
        (np.ones(3), "must not all be equal"),
        ("norm", "expected an array of samples, or .* got str"),
    ],
)
def test_sources_that_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        source_of(source)
