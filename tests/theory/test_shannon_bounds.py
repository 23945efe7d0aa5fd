"""Lower bounds: Gaussian and Laplace by hand, sources of layers, the figures of the yardstick."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxquant.theory.differential_entropy import distribution_entropy, spacing_entropy
from jaxquant.theory.rate_distortion import gaussian_distortion, gaussian_rate
from jaxquant.theory.scale_mixture import ScaleMixture, fit_scale_mixture, student_t_entropy
from jaxquant.theory.shannon_bounds import layer_bound, shannon_distortion, shannon_lower_bound
from tests.benchmarks import report
from tests.support.layer import made_layer


def source(k=96, n=160, degrees=5.0, seed=0):
    """A matrix with row and column scales, what it was made of, and a correlated second moment."""
    rng = np.random.default_rng(seed)
    rows, columns = np.exp(rng.normal(size=k)), np.exp(0.6 * rng.normal(size=n))
    columns /= np.exp(np.mean(np.log(columns)))
    t = rng.normal(size=(k, n)) if math.isinf(degrees) else rng.standard_t(degrees, (k, n))
    x = rng.normal(size=(4 * k, k)) @ rng.normal(size=(k, k)) / np.sqrt(k)
    return np.sqrt(np.outer(rows, columns)) * t, ScaleMixture(rows, columns, degrees), x.T @ x


# --- one variable -------------------------------------------------------------------------------


def test_the_bound_of_a_gaussian_is_its_rate():
    d = np.array([0.01, 0.3, 2.0])
    h = distribution_entropy(stats.norm(0, math.sqrt(2)))
    np.testing.assert_allclose(shannon_lower_bound(h, d), gaussian_rate(d, 2.0), atol=1e-12)
    np.testing.assert_allclose(shannon_distortion(h, shannon_lower_bound(h, d)), d)


def test_the_bound_of_others_is_below_the_gaussian_rate_of_their_variance():
    b = 1 / math.sqrt(2)  # a Laplace variable of variance 1
    gap = gaussian_rate(0.01) - shannon_lower_bound(math.log2(2 * math.e * b), 0.01)
    assert gap == pytest.approx(math.log2(math.pi / math.e) / 2)  # 0.104 bits, at any D
    x = stats.laplace(0, b).rvs(20000, random_state=0)
    estimated = shannon_lower_bound(spacing_entropy(x), 0.01)
    assert estimated == pytest.approx(gaussian_rate(0.01) - gap, abs=0.03)


# --- scale mixtures -----------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [math.inf, 5.0, 2.5])
def test_a_fit_finds_scales_and_degrees(degrees):
    w, made, _ = source(degrees=degrees)
    found = fit_scale_mixture(jnp.asarray(w), None if degrees < 9 else degrees)
    if degrees < 9:
        assert found.degrees == pytest.approx(degrees, rel=0.15)
    assert np.std(np.log(found.rows / made.rows)) < 0.3
    assert np.std(np.log(found.columns / made.columns)) < 0.3
    assert found.entropy == pytest.approx(made.entropy, abs=0.04)
    assert np.exp(np.mean(np.log(found.columns))) == pytest.approx(1)
    # No likelihood is greater than that of a fit, that of the truth included.
    assert found.log_likelihood(w) > made.log_likelihood(w)
    for other in (0.7, 1.4):
        degrees = found.degrees * other if degrees < 9 else degrees
        near = ScaleMixture(found.rows * other, found.columns, degrees)
        assert near.log_likelihood(w) < found.log_likelihood(w)


def test_a_fit_of_gaussian_scales_has_its_own_entropy():
    """At the greatest likelihood the mean log density of the sample is minus the entropy."""
    w = source()[0]
    fit = fit_scale_mixture(w, math.inf)
    assert -fit.log_likelihood(w) == pytest.approx(fit.entropy, abs=1e-9)
    assert fit.entropy > fit_scale_mixture(w).entropy + 0.03  # heavy tails have less
    assert student_t_entropy(1e9) == pytest.approx(student_t_entropy(math.inf), abs=1e-6)


# --- layers -------------------------------------------------------------------------------------


def test_at_many_bits_it_is_determinant_and_geometric_mean():
    w, _, h = source(degrees=math.inf)
    fit = fit_scale_mixture(w, math.inf)
    logs = np.linalg.slogdet(h)[1] / len(w) + np.mean(np.log(np.outer(fit.rows, fit.columns)))
    want = np.exp(logs) * w.size * 4.0**-9 / np.sum(w * (h @ w))
    found = layer_bound(jnp.asarray(w), jnp.asarray(h))
    assert found.loss(9.0) == pytest.approx(want, rel=1e-5)
    assert found.loss(0.5) > 1.1 * want * 4.0**8.5  # there, rates of 0 make it greater


@pytest.mark.parametrize("degrees", [math.inf, 5.0])
def test_rate_and_loss_are_inverse(degrees):
    w, _, h = source()
    bound = layer_bound(w, h, degrees)
    for rate in (0.3, 1.0, 2.5, 6.0):
        assert bound.rate(bound.loss(rate)) == pytest.approx(rate)
    assert bound.rate(2.0) == 0


def test_plain_weights_have_the_gaussian_distortion():
    w = np.random.default_rng(0).normal(size=(200, 400))
    bound = layer_bound(w, np.eye(200))
    assert bound.loss(2.0) == pytest.approx(gaussian_distortion(2.0), rel=0.01)


def test_student_t_is_below_gaussian_by_their_entropies():
    w, _, h = source()
    gaussian, heavy = layer_bound(w, h), layer_bound(w, h, None)
    bits = fit_scale_mixture(w, math.inf).entropy - fit_scale_mixture(w).entropy
    assert gaussian.rate(1e-5) - heavy.rate(1e-5) == pytest.approx(bits, abs=1e-3)
    assert layer_bound(w, h, 1e8).loss(9.0) == pytest.approx(gaussian.loss(9.0), rel=1e-3)


def test_a_singular_second_moment_needs_fewer_bits():
    w, _, h = source(degrees=math.inf)
    h[:5] = h[:, :5] = 0
    assert layer_bound(w, h).loss(3.0) > 0  # water-filling gives the rest the bits
    assert layer_bound(w, h, 5.0).loss(3.0) == 0  # Shannon's bound says nothing
    assert layer_bound(w, h, 5.0).rate(1e-9) == 0


# --- the yardstick ------------------------------------------------------------------------------


@pytest.mark.slow  # making the layer takes seconds
def test_the_figures_of_the_yardstick():
    """.00408, .000971, .000243, .0000606 at 1 to 4 bits, and what is not meant by known scales."""
    w, h = (np.asarray(a, np.float64) for a in made_layer())
    bound = layer_bound(w, h)
    want = [0.004082, 0.0009715, 0.0002425, 0.00006063]
    np.testing.assert_allclose([bound.loss(r) for r in (1, 2, 3, 4)], want, rtol=2e-4)
    # The twins: scales by mean squares instead of likelihood; no column scales; no rates of 0.
    mean = lambda a: np.exp(np.mean(np.log(a)))
    size = w.size * np.exp(np.linalg.slogdet(h)[1] / len(w)) / np.sum(w * (h @ w))
    by_rows, by_columns = (np.mean(w**2, axis=axis) for axis in (1, 0))
    squares = mean(by_rows) * mean(by_columns) / np.mean(w**2)
    assert size * squares / 4**4 == pytest.approx(5.96e-5, rel=1e-3)
    assert size * mean(by_rows) / 4**4 > 1.1 * want[3]
    assert bound.loss(4) * 4**3 < 0.96 * want[0]
    # The page has the curve of this bound.
    for bits in (1.0, 2.03, 4.3):
        assert report.bound(bits) == pytest.approx(bound.loss(bits), rel=1e-3)
        assert report.gap(5.0, bound.loss(bits)) == f"{5 - bits:+.2f}"


def test_the_page_says_how_many_bits_above_the_bound_a_loss_is():
    assert report.bound(2) == pytest.approx(0.0009715, rel=1e-3)
    assert report.gap(2.0, 0.001033) == "+0.04"
    with pytest.raises(ValueError, match="does not reach the loss 2"):
        report.gap(2.0, 2.0)
    table = {"columns": ["method", "bits per weight", "loss"], "rows": [["x", "2.0", "0.001033"]]}
    found = report.with_bound(table | {"bound": [2]})
    assert found["columns"][-1] == "gap, bits"
    assert found["rows"] == [["x", "2.0", "0.001033", "+0.04"], ["bound", "2.000", "0.000971", ""]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: shannon_lower_bound(-math.inf, 1.0),
            "entropy must be finite, got -inf; it is",
        ),
        (lambda: shannon_lower_bound(1.0, 0.0), "distortion must be above 0, got 0.0"),
        (lambda: shannon_lower_bound(1.0, np.nan), "distortion must be above 0, got nan"),
        (lambda: shannon_distortion(1.0, -1.0), "rate must be nonnegative, got -1"),
        (lambda: layer_bound(np.ones((2, 3)), np.eye(3)), r"w \[k, n\] and gram \[k, k\], got"),
        (lambda: layer_bound(np.eye(2), np.eye(2) * np.nan), "finite and symmetric"),
        (
            lambda: layer_bound(np.ones((2, 2)), np.eye(2)).loss(-1.0),
            "rate must be finite and nonnegative",
        ),
        (lambda: layer_bound(np.ones((2, 2)), np.eye(2)).rate(0.0), "loss must be above 0, got"),
        (lambda: fit_scale_mixture(np.zeros((2, 2))), "row 0 is zero, so it has no scale"),
        (lambda: fit_scale_mixture(np.array([[1.0, 0], [1, 0]])), "column 1 is zero"),
        (lambda: fit_scale_mixture(np.ones(3)), r"matrix \[k, n\], got shape \[3\]"),
        (lambda: fit_scale_mixture(np.full((2, 2), np.inf)), r"finite, but 4 of 4"),
        (lambda: fit_scale_mixture(np.ones((2, 2)), 0.0), "degrees must be above 0, got 0.0"),
        (lambda: student_t_entropy(-1.0), "degrees must be above 0, got -1.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_bound_is_above_what_no_bits_attain():
    """Weights of zeros lose everything, whatever the energy of this one matrix."""
    w = np.random.default_rng(3).normal(size=(8, 16))
    for degrees in (math.inf, 5.0):
        bound = layer_bound(w, np.eye(8), degrees)
        assert bound.loss(0.0) <= 1 and bound.rate(1.0) == 0


def test_many_zeros_have_no_student_t_distribution():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 64)) * (rng.random((64, 64)) > 0.4)
    with pytest.raises(ValueError, match="of the weights are exactly 0"):
        layer_bound(w, np.eye(64), None)


def test_the_unit_of_the_weights_does_not_matter():
    w = np.random.default_rng(0).standard_t(5, (32, 64))
    one, tiny = (layer_bound(x, np.eye(32), None) for x in (w, 1e-150 * w))
    assert tiny.loss(2.0) == pytest.approx(one.loss(2.0), rel=1e-6)


def test_fewer_tokens_than_inputs():
    """Shannon's bound says nothing; water-filling needs bits for the inputs that occur only."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(20, 32)), rng.normal(size=(32, 16))
    student, gaussian = (layer_bound(w, x.T @ x / 20, v) for v in (5.0, math.inf))
    assert student.loss(1.0) == 0 and student.rate(0.1) == 0
    assert 0 < gaussian.loss(1.0) < 0.25


def test_what_float64_cannot_hold_and_inputs_that_are_zero():
    w = np.random.default_rng(0).normal(size=(8, 16))
    for scale in (1e200, 1e-200):
        with pytest.raises(ValueError, match="cannot hold its square"):
            layer_bound(scale * w, np.eye(8))
    with pytest.raises(ValueError, match="gram must not be zero"):
        layer_bound(w, np.zeros((8, 8)))
