"""Distances to nearest neighbors: exact, whatever the cancellation, and in bounded memory."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxquant.theory import neighbors
from jaxquant.theory.neighbors import distinct, nearest, neighbor_distances


def brute(x, k):
    return np.sort(cdist(x, x), axis=1)[:, 1 : k + 1]


def normal(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize("d", [1, 3, neighbors.TREE_DIMENSION, neighbors.TREE_DIMENSION + 1, 60])
def test_equal_to_all_distances(d):
    x = normal(300, d)
    found = neighbor_distances(x, 7)
    np.testing.assert_allclose(found.distances, brute(x, 7), rtol=1e-14)
    between = np.linalg.norm(x[found.indices] - x[:, None], axis=2)
    np.testing.assert_allclose(between, found.distances, rtol=1e-14)


def test_the_formula_of_products_loses_what_this_keeps():
    """Far from the origin, in float32, and within tight clusters that lie far apart."""
    offset = normal(200, 30) + 1e6
    x = offset.astype(np.float32)
    wide = x.astype(float)
    np.testing.assert_allclose(neighbor_distances(x, 3).distances, brute(wide, 3), rtol=1e-13)
    squares = (x * x).sum(1)
    products = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0))
    assert np.abs(np.sort(products, 1)[:, 1] / brute(wide, 1)[:, 0] - 1).max() > 0.5
    clusters = normal(5, 30)[np.arange(200) % 5] + 1e-9 * normal(200, 30, 1)
    found = neighbor_distances(clusters, 3).distances
    np.testing.assert_allclose(found, brute(clusters, 3), rtol=1e-13)


def test_what_cannot_be_proved_is_compared_with_all(monkeypatch):
    """Products of centered float64 points select wrong candidates within tight clusters."""
    x = normal(5, 30)[np.arange(200) % 5] + 1e-9 * normal(200, 30, 1)
    compared, whole = [], neighbors._among_all
    monkeypatch.setattr(
        neighbors, "_among_all", lambda p, i, k: compared.append(i) or whole(p, i, k)
    )
    found = neighbor_distances(x, 3)
    assert compared == list(range(200))
    centered = x - x.mean(0)
    squares = (centered**2).sum(1)
    order = np.argsort(squares[:, None] + squares - 2 * centered @ centered.T, axis=1)
    candidates = order[:, 1 : 4 + neighbors.SPARE]
    missed = [len(set(found.indices[i]) - set(candidates[i])) for i in range(200)]
    assert sum(missed) > 50
    compared.clear()
    neighbor_distances(normal(200, 30), 3)
    assert not compared


def test_points_on_a_grid():
    """Every distance is shared by many candidates."""
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 5, indexing="ij"), -1).reshape(-1, 5)
    x = np.pad(grid, ((0, 0), (0, 20)))
    np.testing.assert_array_equal(neighbor_distances(x, 6).distances, brute(grid, 6))


def test_duplicates_are_dropped_and_counted():
    x = normal(100, 20)
    found = neighbor_distances(np.concatenate([x, x[:30], x[:5]]), 4)
    assert found.duplicates == 35
    np.testing.assert_array_equal(found.points, x)
    np.testing.assert_array_equal(found.distances, neighbor_distances(x, 4).distances)
    assert distinct(np.array([[0.0, 1.0], [-0.0, 1.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(("d", "block"), [(4, 1 << 12), (40, 1 << 14)])
def test_blocks_change_nothing_and_bound_the_memory(d, block, monkeypatch):
    n, k = 2000, 5
    x = normal(n, d)
    whole, done = neighbor_distances(x, k), []
    monkeypatch.setattr(neighbors, "BLOCK", block)
    tracemalloc.start()
    found = neighbor_distances(x, k, progress=done.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found.distances, whole.distances, rtol=1e-14)
    assert done == sorted(done) and len(done) > 1 and done[-1] == n
    result = found.distances.nbytes + found.indices.nbytes
    assert peak < 2 * x.nbytes + result + 4 * 8 * block + 300 * n  # digests of the points
    assert peak < 0.1 * 8 * n * n  # all distances at once


def test_arrays_of_jax_and_narrow_dtypes():
    x = jnp.asarray(normal(50, 12), jnp.bfloat16)
    wide = np.asarray(x).astype(float)
    np.testing.assert_allclose(neighbor_distances(x, 3).distances, brute(wide, 3), rtol=1e-13)


def test_bad_points():
    x = normal(20, 3)
    for k in (20, 25):
        with pytest.raises(ValueError, match=rf"more than k = {k} distinct points, got 20 \(of 23"):
            neighbor_distances(np.concatenate([x, x[:3]]), k)
    with pytest.raises(ValueError, match="got 1 .of 20, 19 of which repeat another"):
        neighbor_distances(np.ones((20, 3)), 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        neighbor_distances(x, 0)
    for bad in (np.nan, np.inf):
        y = x.copy()
        y[[3, 5], 1] = bad
        with pytest.raises(ValueError, match="2 of 20 contain NaN or infinity, the first .* 3"):
            neighbor_distances(y, 2)
    for wrong in (x[0], x[None], x[:0], x[:, :0]):
        with pytest.raises(ValueError, match=r"expected points \[n, d\], got shape"):
            neighbor_distances(wrong, 2)
    with pytest.raises(ValueError, match="expected an array"):
        neighbor_distances("x", 2)


def test_squares_that_float64_cannot_hold():
    for scale in (1e-150, 1e150):
        with pytest.raises(ValueError, match="rescale them"):
            neighbor_distances(scale * normal(20, 3), 2)
    with pytest.raises(ValueError, match="rescale them"):
        nearest(np.array([[0.0], [1e-200], [1.0]]), 1)
