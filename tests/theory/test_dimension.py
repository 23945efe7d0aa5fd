"""Estimators of the intrinsic dimension: equal to scikit-dimension, and invariant."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.dimension import (
    levina_bickel,
    local_two_nn,
    participation_ratio,
    two_nn,
)
from jaxquant.theory.neighbors import neighbor_distances
from tests.support.point_sets import gaussian, rotated, sphere, spiral

SHARED = Path("/work/shared/data/id_reference.npz")
ESTIMATORS = {
    "two_nn": two_nn,
    "two_nn mle": partial(two_nn, method="mle"),
    "two_nn .3": partial(two_nn, discard=0.3),
    "two_nn mle 0": partial(two_nn, method="mle", discard=0.0),
    "mle 20": levina_bickel,
    "mle 20 mean": partial(levina_bickel, combine="mean"),
    "mle 10 median": partial(levina_bickel, k=10, combine="median"),
    "mle 20 mean unbiased": partial(levina_bickel, combine="mean", unbiased=True),
    "local 64": partial(local_two_nn, neighborhood=64),
}
# By scikit-dimension 0.5.0 on f(np.random.default_rng(7)), T = skdim.id.TwoNN, M = skdim.id.MLE:
# T().fit(x), T(method="mle").fit(x), T(discard_fraction=0.3).fit(x),
# T(discard_fraction=0.0, method="mle").fit(x), M().fit(x, n_neighbors=20),
# M().fit(x, n_neighbors=20, comb="mean"), M().fit(x, n_neighbors=10, comb="median"),
# M(unbiased=True).fit(x, n_neighbors=20, comb="mean"), of each `.dimension_`;
# np.mean(T().fit_transform_pw(x, n_neighbors=64))
VALUES = {
    gaussian: (4.2888313383, 4.3207590124, 4.0190114105, 4.2681464882, 3.9734680619,
               4.2259173368, 4.1353811831, 4.0035006349, 3.9807509333),
    sphere: (5.5667258124, 5.5527305031, 5.7293483011, 5.5863765654, 4.7580830958,
             5.0461867219, 5.1950790906, 4.7805979471, 5.1627379618),
    spiral: (1.8510112371, 1.8851291017, 1.9246565338, 1.8976817048, 1.9589911927,
             2.0765121344, 1.9093820637, 1.9672220221, 1.8707843222),
}  # fmt: skip


def points(of=gaussian):
    return of(np.random.default_rng(7))


@pytest.mark.parametrize("of", VALUES)
def test_equal_to_scikit_dimension(of):
    x = points(of)
    found = [estimate(x).value for estimate in ESTIMATORS.values()]
    np.testing.assert_allclose(found, VALUES[of], rtol=1e-8)
    # The usual slips: ranks from 0, nothing discarded, the mean in place of the harmonic mean.
    assert abs(found[0] / found[3] - 1) > 1e-3 and abs(found[4] / found[5] - 1) > 1e-2
    mu = np.sort(np.divide(*neighbor_distances(x, 2).distances.T[::-1]))[:360]
    heights = -np.log(1 - np.arange(360) / 400)
    from_zero = np.log(mu) @ heights / (np.log(mu) @ np.log(mu))
    assert abs(from_zero / VALUES[of][0] - 1) > 1e-3


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data")
def test_equal_to_the_shared_reference():
    kept = np.load(SHARED)
    for name in (n for n in kept if "__" not in n):
        x, of = kept[name], lambda what, name=name: kept[f"{name}__{what}"]
        known = neighbor_distances(x, 128)
        local = local_two_nn(known)
        pairs = (
            (two_nn(known).value, of("TwoNN_d0.1__value")),
            (levina_bickel(known).value, of("MLE_K20_nb__value")),
            (levina_bickel(known, combine="mean").value, of("MLE_pw20_mean__value")),
            (levina_bickel(known).pointwise, of("MLE_pw20")),
            (local.value, of("TwoNN_local128_mean__value")),
            (local.pointwise.std(), of("TwoNN_local128_std__value")),
            (local.pointwise, of("TwoNN_local128")),
            (participation_ratio(x), of("participation_ratio__value")),
        )
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_invariance(name):
    """Under rotation, translation, scaling and more dimensions, in float32 too."""
    estimate, x, rng = ESTIMATORS[name], points(), np.random.default_rng(0)
    expected = estimate(x).value
    for same in (
        rotated(x, 12, rng), rotated(x, 50, rng), x * 1e-3, x * 1e60, x + 1e4,
        np.pad(x, ((0, 0), (0, 100))), x[rng.permutation(len(x))], np.float32(x + 3),
        jnp.asarray(x, jnp.float32),
    ):  # fmt: skip
        assert estimate(same).value == pytest.approx(expected, rel=1e-3)
    assert abs(estimate(x * np.linspace(1, 9, 12)).value / expected - 1) > 1e-3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_duplicates(name):
    x = points()
    once, twice = ESTIMATORS[name](x), ESTIMATORS[name](np.concatenate([x, x[:100]]))
    assert twice.value == once.value and (once.duplicates, twice.duplicates) == (0, 100)
    assert once.points == twice.points == 400


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bad_points(name):
    estimate, x = ESTIMATORS[name], points()
    with pytest.raises(ValueError, match="more than k = .* got 2 "):
        estimate(x[:2])
    with pytest.raises(ValueError, match="got 1 .of 9, 8 of which repeat another"):
        estimate(np.ones((9, 3)))
    x[1, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 400 contain NaN"):
        estimate(x)


def test_the_true_dimension():
    """Of an open cube without borders: a flat torus, so that the estimators have no bias."""
    turns = 2 * np.pi * np.random.default_rng(0).uniform(size=(3000, 2))
    known = neighbor_distances(np.concatenate([np.cos(turns), np.sin(turns)], 1), 128)
    assert two_nn(known, method="mle").value == pytest.approx(2, abs=4 * 2 / 3000**0.5)
    assert levina_bickel(known).value == pytest.approx(2, abs=0.02)
    unbiased = levina_bickel(known, combine="mean", unbiased=True).value
    assert unbiased == pytest.approx(2, abs=0.02)
    assert levina_bickel(known, combine="mean").value == pytest.approx(2 * 19 / 18, abs=0.02)
    assert local_two_nn(known).value == pytest.approx(2, abs=0.1)


def test_neighborhoods_that_share_too_few_neighbors():
    """Each neighborhood by itself, as its definition says: hubs, and points far away."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(60, 5)), 30 * rng.normal(size=(6, 5))])
    known = neighbor_distances(x, 6)
    expected = []
    for around in known.indices:
        r = neighbor_distances(x[around], 2).distances
        expected.append(levina_bickel(x[around], 2).value if r.size else 0)
    found = local_two_nn(known, 6, method="mle", discard=0.0)
    # For k = 2 the harmonic mean of Levina-Bickel is n / sum ln mu.
    np.testing.assert_allclose(found.pointwise, np.array(expected) * 5 / 6, rtol=1e-12)


def test_neighbors_that_are_known():
    x = points()
    known = neighbor_distances(x, 30)
    assert two_nn(known).value == two_nn(x).value
    assert levina_bickel(known, 11).value == levina_bickel(x, 11).value
    assert local_two_nn(known, 24).value == pytest.approx(local_two_nn(x, 24).value, rel=1e-12)
    with pytest.raises(ValueError, match="up to the 31th, got 30"):
        levina_bickel(known, 31)


def test_equal_distances_have_an_infinite_dimension():
    """A regular simplex, of which all distances are equal."""
    simplex = 2.0 * np.eye(30)
    assert two_nn(simplex).value == two_nn(simplex, method="mle").value == np.inf
    assert levina_bickel(simplex, 5).value == np.inf


def test_participation_ratio():
    x = np.random.default_rng(0).normal(size=(400, 5)) * [3, 2, 1, 0, 0]
    variances = np.linalg.eigvalsh(np.cov(x.T))
    expected = variances.sum() ** 2 / (variances**2).sum()
    for same in (x, x * 1e-200, x * 1e200, x + 100, np.pad(x, ((0, 0), (0, 500)))):
        assert participation_ratio(same) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="expected points that differ, got 7 equal points"):
        participation_ratio(np.ones((7, 3)))


def test_bad_settings():
    x = points()
    for call, message in (
        (partial(levina_bickel, k=1), "k must be at least 2, got 1"),
        (partial(levina_bickel, k=2, unbiased=True), "k must be at least 3, got 2"),
        (partial(levina_bickel, combine="mode"), "combine must be one of harmonic, mean, median"),
        (partial(two_nn, method="ml"), "method must be 'fit' or 'mle', got 'ml'"),
        (partial(two_nn, discard=0.0), "above 0 and below 1 for 'fit', got 0.0"),
        (partial(two_nn, discard=1.0, method="mle"), "from 0 and below 1 for 'mle', got 1.0"),
        (partial(two_nn, discard=0.999), "at least 2 ratios after discarding 100% of 400, got 0"),
        (partial(local_two_nn, neighborhood=3), "neighborhood must be at least 4, got 3"),
        (partial(local_two_nn, neighborhood=400), "more than k = 400 distinct points, got 400"),
    ):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_a_regular_neighborhood_decides_nothing():
    """Its points have all neighbors at one distance; the others have a dimension."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(8.0)] * 2), -1).reshape(-1, 2) + 1e3
    mixed = np.concatenate([rng.normal(size=(600, 2)), grid])
    assert 1.5 < local_two_nn(mixed, 16).value < 2.5
    assert 1.5 < levina_bickel(mixed, 4, combine="mean").value < 4
    turned = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    for simplex in (2 * np.eye(30), 2 * np.eye(30) @ turned):  # rounding makes no dimension
        assert two_nn(simplex).value == np.inf
        assert levina_bickel(simplex, 5).value == np.inf


def test_complex_points_are_refused():
    with pytest.raises(ValueError, match="expected real points"):
        two_nn(np.ones((3, 2)) * 1j)
