"""The dimension from spanning trees."""

from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist

from jaxquant.theory.persistent_dimension import persistent_dimension, spanning_tree_energy
from tests.support.point_sets import rotated

SHARED = Path("/work/shared/data/id_reference.npz")
KEY = jax.random.key(0)


def cube(n, d, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, d))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_energy_is_that_of_another_spanning_tree(alpha):
    x = cube(80, 3)
    edges = minimum_spanning_tree(cdist(x, x)).data
    assert spanning_tree_energy(x, alpha) == pytest.approx((edges**alpha).sum(), rel=1e-12)


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data")
def test_equal_to_the_shared_reference():
    """Which drew from np.random.default_rng(0), the generator that key 0 seeds."""
    kept = np.load(SHARED)
    for name in ("swissroll_d2_in3", "cube_d10_in50"):
        found = persistent_dimension(kept[name], KEY).value
        assert found == pytest.approx(float(kept[f"{name}__PHD_alpha1__value"]), rel=1e-9)


@pytest.mark.parametrize(("d", "alpha"), [(2, 0.5), (2, 1.0), (2, 1.5), (3, 2.0)])
def test_every_power_gives_the_dimension(d, alpha):
    """And 1 / (1 - m), which the public program returns, gives d / alpha."""
    found = persistent_dimension(cube(800, d), KEY, alpha=alpha, samples=3)
    assert found.value == pytest.approx(d, rel=0.15)
    assert found.value == pytest.approx(alpha / (1 - found.slope), rel=1e-12)
    if alpha != 1:
        assert 1 / (1 - found.slope) == pytest.approx(d / alpha, rel=0.15)
        assert abs(1 / (1 - found.slope) - d) > 0.25 * d


def test_defaults_are_those_of_the_public_program():
    x = cube(600, 3)
    few = persistent_dimension(x, KEY)
    sizes = range(50, 512, 40)
    assert few.value == persistent_dimension(x, KEY, sizes=sizes, samples=7, reruns=3).value
    # Half of 600 is 300: the sizes 330 to 490 are drawn 3 times, the others 7 times.
    assert few.value != persistent_dimension(x, KEY, samples_of_half=7).value
    assert few.value != persistent_dimension(x, jax.random.key(1)).value
    assert len(few.slopes) == 3 and few.slope == pytest.approx(np.mean(few.slopes))


def test_invariance_and_duplicates():
    x, rng, sizes = cube(200, 3), np.random.default_rng(0), (20, 40, 80)
    expected = persistent_dimension(x, KEY, sizes=sizes)
    for same in (rotated(x, 20, rng), 1e-3 * x, np.pad(x, ((0, 0), (0, 9))), x + 100):
        found = persistent_dimension(same, KEY, sizes=sizes)
        assert found.value == pytest.approx(expected.value, rel=1e-3)
    twice = persistent_dimension(np.concatenate([x, x[:50]]), KEY, sizes=sizes)
    assert twice.value == expected.value
    assert (twice.points, twice.duplicates, expected.duplicates) == (200, 50, 0)


def test_bad_arguments():
    x = cube(100, 3)
    with pytest.raises(ValueError, match="490 points, but there are 100 distinct ones .of 110."):
        persistent_dimension(np.concatenate([x, x[:10]]), KEY)
    sizes = (20, 40, 80)
    for wrong, message in (
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"reruns": 0}, "reruns must be at least 1"),
        ({"sizes": (20, 20)}, "two different sizes or more"),
        ({"sizes": (1, 20)}, "each 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            persistent_dimension(x, KEY, **{"sizes": sizes, **wrong})
    with pytest.raises(ValueError, match="expected a key"):
        persistent_dimension(x, 3, sizes=sizes)
    for call in (lambda x: persistent_dimension(x, KEY, sizes=sizes), spanning_tree_energy):
        with pytest.raises(ValueError, match="contain NaN"):
            call(np.where(x > 0.9, np.nan, x))
    with pytest.raises(ValueError, match="there are 1 distinct"):
        persistent_dimension(np.ones((100, 3)), KEY, sizes=sizes)
    with pytest.raises(ValueError, match="two or more distinct points, got 4 equal points"):
        spanning_tree_energy(np.ones((4, 3)))


@pytest.mark.parametrize("scale", [1e-170, 1e160])
def test_any_scale(scale):
    x = np.random.default_rng(0).normal(size=(120, 3))
    of = lambda x: persistent_dimension(x, jax.random.key(0), sizes=(20, 60), samples=3).value
    assert of(scale * x) == pytest.approx(of(x), rel=1e-6)
    assert spanning_tree_energy(scale * x) == pytest.approx(scale * spanning_tree_energy(x))
