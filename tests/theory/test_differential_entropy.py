"""Differential entropy: closed forms, estimates against them, what has no density."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxquant.theory.differential_entropy import (
    distribution_entropy,
    neighbor_entropy,
    spacing_entropy,
)

GAUSSIAN = math.log2(2 * math.pi * math.e) / 2
RNG = np.random.default_rng(0)


def test_closed_forms():
    assert distribution_entropy(stats.norm(3, 2)) == pytest.approx(GAUSSIAN + 1)
    b = 0.7
    assert distribution_entropy(stats.laplace(0, b)) == pytest.approx(math.log2(2 * math.e * b))
    assert distribution_entropy(stats.uniform(0, 0.25)) == -2
    t = stats.t(5)
    assert distribution_entropy(t) == pytest.approx(-t.expect(t.logpdf) / math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "source", [stats.norm(1, 3), stats.laplace(), stats.t(4)], ids=lambda source: source.dist.name
)
def test_spacings_estimate_it(source):
    x = source.rvs(20000, random_state=1)
    found = spacing_entropy(jnp.asarray(x))
    assert found == pytest.approx(distribution_entropy(source), abs=0.04)
    assert found != pytest.approx(math.log2(2 * math.pi * math.e * np.var(x)) / 2, abs=0.001)


def test_the_bias_is_as_documented():
    draws = lambda n, count: [spacing_entropy(RNG.normal(size=n)) - GAUSSIAN for _ in range(count)]
    assert np.mean(draws(100, 400)) == pytest.approx(-0.13, abs=0.02)
    assert np.mean(draws(1000, 100)) == pytest.approx(-0.01, abs=0.01)


def test_neighbors_estimate_joint_entropy():
    mix = np.array([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.5]])
    x = RNG.normal(size=(10000, 3)) @ mix.T
    want = 3 * GAUSSIAN + math.log2(abs(np.linalg.det(mix)))
    assert neighbor_entropy(x) == pytest.approx(want, abs=0.06)
    apart = sum(spacing_entropy(column) for column in x.T)
    assert apart > want + 1  # the twin: as if coordinates were independent


def test_a_scale_adds_its_logarithm():
    x = RNG.normal(size=(1000, 2))
    assert spacing_entropy(8 * x[:, 0]) == pytest.approx(spacing_entropy(x[:, 0]) + 3)
    assert neighbor_entropy(8 * x) == pytest.approx(neighbor_entropy(x) + 6)


def test_what_takes_few_values_has_no_density():
    few = np.round(RNG.normal(size=500))
    assert spacing_entropy(np.ones(9)) == spacing_entropy(few) == -math.inf
    assert neighbor_entropy(np.stack([few, few], axis=1)) == -math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spacing_entropy(np.ones(3)), r"vector of 4 samples or more, got shape \[3\]"),
        (lambda: spacing_entropy(np.array([])), r"4 samples or more, got shape \[0\]"),
        (lambda: spacing_entropy(np.ones((4, 4))), r"vector of 4 .*, got shape \[4, 4\]"),
        (lambda: spacing_entropy(np.full(9, np.nan)), r"shape \[9\] with NaN or infinite values"),
        (lambda: spacing_entropy(np.arange(9.0), 5), "from 1 to below half of the 9 samples, got"),
        (lambda: neighbor_entropy(np.ones(3)), r"finite matrix of samples \[n, d\], got"),
        (lambda: neighbor_entropy(np.ones((0, 2))), r"got shape \[0, 2\]"),
        (lambda: neighbor_entropy(np.full((9, 2), np.inf)), "with NaN or infinite values"),
        (lambda: neighbor_entropy(np.ones((3, 2)), 3), "neighbors must be from 1 to 2, got 3"),
        (lambda: distribution_entropy(3.0), "distribution: expected a Continuous"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "source",
    [stats.poisson(3), stats.norm(0, -1), stats.norm(0, [1, 2])],
    ids=lambda s: s.dist.name,
)
def test_what_has_no_density(source):
    with pytest.raises(ValueError, match="expected one distribution with a density"):
        distribution_entropy(source)
