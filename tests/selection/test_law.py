"""The Entropy Law as a measurement: correlations, their intervals, verdicts, and bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxquant.selection.law import entropy_law

DRAW = np.random.default_rng(0)
RATIOS = np.linspace(1.5, 5, 14)
NOISE = DRAW.normal(size=14)


def test_the_correlation_is_spearmans():
    score = -RATIOS + 2 * NOISE
    found = entropy_law(RATIOS, score, NOISE)
    assert found.ratio.rho == pytest.approx(scipy.stats.spearmanr(RATIOS, score).statistic)
    assert found.loss.rho == pytest.approx(scipy.stats.spearmanr(NOISE, score).statistic)
    assert found.ratio.low <= found.ratio.rho <= found.ratio.high
    again = entropy_law(jnp.asarray(np.exp(RATIOS)), score)  # ranks are all that counts
    assert again.ratio == found.ratio and again.loss is None


def test_the_interval_is_that_of_scipy():
    score = -RATIOS + 2 * NOISE
    found = entropy_law(RATIOS, score, resamples=4000).ratio
    other = scipy.stats.bootstrap(
        (RATIOS, score), lambda a, b: scipy.stats.spearmanr(a, b).statistic, paired=True,
        vectorized=False, n_resamples=400, method="percentile", random_state=1,
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(other), abs=0.1)


@pytest.mark.parametrize(
    ("score", "verdict", "sign"),
    [
        (-RATIOS, "subsets show the law", -1),
        (RATIOS, "contradict", 1),
        (abs(RATIOS - 3), "do not show the law", 0),
    ],
)
def test_the_verdict_depends_on_the_interval(score, verdict, sign):
    found = entropy_law(RATIOS, score, -score)
    assert verdict in found.verdict and found.verdict in str(found)
    assert found.ratio.sign == sign and found.loss.rho == -1
    assert f"{found.ratio.rho:+.2f}" in str(found)


def test_coverage_with_a_dozen_subsets():
    """Intervals of independent quantities contain 0 about as often as the docstring says."""
    covered = [
        entropy_law(DRAW.normal(size=12), DRAW.normal(size=12), resamples=300).ratio.sign == 0
        for _ in range(150)
    ]
    assert 0.84 < np.mean(covered) < 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3], [1, 2, 3]), "performance must have 4 or more values"),
        ((RATIOS[:5], NOISE), r"ratios must have 14 values, as performance, .* got shape \[5\]"),
        ((np.ones(14), NOISE), "ratios is 1 for every subset"),
        ((RATIOS, np.full(14, np.nan)), "performance must be finite, got nan for subset 0"),
        ((RATIOS, NOISE, np.where(RATIOS > 4, np.inf, 1.0)), "losses must be finite, got inf"),
        ((np.ones((7, 2)), NOISE), r"got shape \[7, 2\]"),
    ],
)
def test_bad_quantities(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy_law(*arguments)


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0}, {"resamples": 10}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="confidence must be between 0 and 1 and resamples"):
        entropy_law(RATIOS, NOISE, **options)
