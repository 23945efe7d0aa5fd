"""Entropy-constrained scalar quantization: reference values, the high-rate gap, optimality."""

import numpy as np
import pytest
from scipy import stats

from jaxquant.theory.entropy_constrained import (
    HIGH_RATE_GAP,
    ecsq,
    high_rate_gap,
    uniform_threshold_quantizer,
)
from jaxquant.theory.rate_distortion import DECIBELS_PER_BIT, gap_in_bits
from jaxquant.theory.scalar_quantizers import scalar_quantizer

NORMAL = stats.norm(0, 1)
TABLE = [
    (0.5, 0.61734, 5e-6, 0.152, 5e-4),
    (1.0, 0.34834, 5e-6, 0.239, 5e-4),
    (2.0, 0.088941, 5e-7, 0.2545, 5e-5),
    (3.0, 0.022239, 5e-7, 0.2546, 5e-5),
    (4.0, 0.0055597, 5e-8, 0.2546, 5e-5),
]


@pytest.mark.parametrize("entropy, distortion, digits, gap, gap_digits", TABLE)
def test_the_gaussian_table(entropy, distortion, digits, gap, gap_digits):
    q = uniform_threshold_quantizer(NORMAL, entropy=entropy)
    assert q.entropy == pytest.approx(entropy, abs=1e-9)
    assert q.distortion == pytest.approx(distortion, abs=digits)
    assert gap_in_bits(q.entropy, q.distortion) == pytest.approx(gap, abs=gap_digits)
    # The twin: reproduction in the middle of the cells instead of their centroids.
    step = q.thresholds[1] - q.thresholds[0]
    middle = np.append(q.thresholds - step / 2, q.thresholds[-1] + step / 2)
    worse = scalar_quantizer(NORMAL, levels=middle, thresholds=q.thresholds)
    assert worse.distortion > distortion + 10 * digits


def test_the_high_rate_gap():
    assert pytest.approx(0.254614, abs=5e-7) == HIGH_RATE_GAP
    assert pytest.approx(1.53293, abs=5e-6) == HIGH_RATE_GAP * DECIBELS_PER_BIT
    q = uniform_threshold_quantizer(stats.norm(7, 3), step=0.03)
    assert gap_in_bits(q.entropy, q.distortion, 9.0) == pytest.approx(HIGH_RATE_GAP, abs=1e-6)
    # What a lattice gains in shape and what is left of it; a sphere leaves nothing.
    e8 = high_rate_gap(0.0716821)
    assert (HIGH_RATE_GAP - e8) * DECIBELS_PER_BIT == pytest.approx(0.654, abs=5e-4)
    assert e8 * DECIBELS_PER_BIT == pytest.approx(0.879, abs=5e-4)
    assert high_rate_gap(1 / (2 * np.pi * np.e)) == pytest.approx(0, abs=1e-12)


def test_a_laplace_step_in_closed_form():
    """Probabilities of the midtread quantizer are two-sided geometric; its entropy follows."""
    step, b = 1.3, 0.8
    q = uniform_threshold_quantizer(stats.laplace(2, b), step=step)
    center, ratio = 1 - np.exp(-step / (2 * b)), np.exp(-step / b)
    tail = 1 - center
    geometric = -(np.log2(1 - ratio) + ratio / (1 - ratio) * np.log2(ratio))
    entropy = -center * np.log2(center) - tail * np.log2(tail / 2) + tail * geometric
    assert q.entropy == pytest.approx(entropy, abs=1e-9)
    assert q.probabilities.max() == pytest.approx(center)


@pytest.mark.parametrize(
    "source, step", [(stats.t(5), 0.03), (stats.t(5), 0.01), (stats.laplace(), 1e-3)]
)
def test_fine_cells_have_the_error_of_a_uniform_variable(source, step):
    """In heavy tails too, where most cells have hardly any probability."""
    width = step * source.std()
    q = uniform_threshold_quantizer(source, step=width)
    assert q.distortion == pytest.approx(width**2 / 12, rel=2e-3)


def test_centroids_gain_by_the_fisher_information():
    """D = step^2 / 12 * (1 - step^2 I / 12), where t(5) has I = (5 + 1) / (5 + 3)."""
    width = 0.1
    q = uniform_threshold_quantizer(stats.t(5), step=width)
    ratio = q.distortion / (width**2 / 12)
    assert 1 - ratio == pytest.approx(width**2 * 0.75 / 12, rel=5e-3)


def test_tails_that_too_many_cells_would_cover():
    """A quantizer whose tails have most of the error is not returned as if it were uniform."""
    with pytest.raises(ValueError, match="at most 1,000,000 cells"):
        uniform_threshold_quantizer(stats.t(5), step=1e-3)


def test_one_cell():
    """A step that holds the whole range leaves one level and no bits."""
    q = uniform_threshold_quantizer(stats.norm(1, 2), step=100.0)
    assert q.levels.tolist() == [1.0] and q.entropy == 0 and q.distortion == pytest.approx(4)
    # No bit is worth this much: the slope of R(D) at D = variance is 2 ln 2 of the variance.
    none = ecsq(stats.norm(1, 2), 4 * 2 * np.log(2) * 1.1)
    assert none.entropy < 1e-6 and none.distortion == pytest.approx(4)


@pytest.mark.parametrize(
    "source, multiplier, gain",
    [(NORMAL, 0.3, 6e-4), (stats.laplace(0, 1), 1.0, 6e-3), (stats.laplace(0, 1), 0.4, 0.014)],
)
def test_ecsq_is_better_than_uniform(source, multiplier, gain):
    """At one entropy, by a little for a Gaussian, by up to 1.4% for a Laplace density."""
    best = ecsq(source, multiplier)
    even = uniform_threshold_quantizer(source, entropy=best.entropy)
    assert even.entropy == pytest.approx(best.entropy, abs=1e-8)
    assert even.distortion > best.distortion * (1 + gain)


def test_ecsq_meets_its_conditions():
    """Centroids; thresholds of equal cost; and its multiplier is the slope -dD/dH."""
    source, m = stats.laplace(1, 2), 2.0
    q = ecsq(source, m)
    same = scalar_quantizer(source, thresholds=q.thresholds)
    assert same.distortion == pytest.approx(q.distortion)
    np.testing.assert_allclose(same.levels, q.levels)
    likely = q.probabilities > 1e-4
    cost = lambda t, y, p: (t - y) ** 2 - m * np.log2(p)
    left = cost(q.thresholds, q.levels[:-1], q.probabilities[:-1])
    right = cost(q.thresholds, q.levels[1:], q.probabilities[1:])
    inner = likely[:-1] & likely[1:]
    np.testing.assert_allclose(left[inner], right[inner], rtol=1e-3)
    near = ecsq(source, 1.02 * m)
    slope = (near.distortion - q.distortion) / (q.entropy - near.entropy)
    assert slope == pytest.approx(1.01 * m, rel=5e-3)


def test_no_perturbation_of_ecsq_is_better():
    m = 0.2
    q = ecsq(NORMAL, m)
    cost = lambda q: q.distortion + m * q.entropy
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 1e-1):
        moved = np.sort(q.thresholds + size * rng.normal(size=q.thresholds.shape))
        assert cost(scalar_quantizer(NORMAL, thresholds=moved)) > cost(q) - 1e-9
    assert cost(uniform_threshold_quantizer(NORMAL, entropy=q.entropy)) > cost(q)


def test_no_scalar_quantizer_is_below_the_bound():
    for m in (1.2, 0.5, 0.1, 0.01):
        q = ecsq(NORMAL, m)
        assert 0 <= gap_in_bits(q.entropy, q.distortion) <= HIGH_RATE_GAP


def test_samples():
    x = np.random.default_rng(0).laplace(3, 1, 100_000)
    q = uniform_threshold_quantizer(x, entropy=1.5)
    density = uniform_threshold_quantizer(stats.laplace(3, 1), entropy=1.5)
    assert q.entropy == pytest.approx(1.5, abs=1e-3)
    assert q.distortion == pytest.approx(density.distortion, rel=0.03)
    best = ecsq(x, 0.5)
    even = uniform_threshold_quantizer(x, entropy=best.entropy)
    assert best.distortion < even.distortion
    assert best.distortion == pytest.approx(ecsq(stats.laplace(3, 1), 0.5).distortion, rel=0.03)
    # An empty cell between others is no level.
    apart = uniform_threshold_quantizer(np.array([0.0, 0.1, 10.0, 10.1]), step=1.0)
    assert apart.levels.tolist() == pytest.approx([0.05, 10.05]) and apart.entropy == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: high_rate_gap(0.05), "that of a sphere in many dimensions, got 0.05"),
        (lambda: uniform_threshold_quantizer(NORMAL), "expected a step or an entropy, got step=No"),
        (
            lambda: uniform_threshold_quantizer(NORMAL, step=1.0, entropy=1.0),
            "a step or an entropy",
        ),
        (lambda: uniform_threshold_quantizer(NORMAL, step=0.0), "step must be positive and finite"),
        (lambda: uniform_threshold_quantizer(NORMAL, entropy=-1.0), "entropy must be positive"),
        (lambda: uniform_threshold_quantizer(NORMAL, step=1e-7), "at most 1,000,000 cells"),
        (lambda: uniform_threshold_quantizer(np.arange(8.0), entropy=3.5), "a smaller entropy"),
        (lambda: ecsq(NORMAL, 0.0), "multiplier must be positive and finite, got 0"),
        (lambda: ecsq(NORMAL, 1e-20), "use a larger step, a larger multiplier"),
        (lambda: ecsq(np.ones(4), 1.0), "samples must not all be equal"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
