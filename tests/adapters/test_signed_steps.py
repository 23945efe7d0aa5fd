"""Signed steps of ternary numbers: how many move, which way, and where they stop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.adapters.signed_steps import falling, sign_descent


def test_the_share_with_the_largest_gradients_moves_in_every_matrix():
    g = (
        jax.random.normal(jax.random.key(0), (3, 40, 50))
        * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    )
    w = jnp.zeros(g.shape)
    optimizer = sign_descent(0.05)
    updates, _ = optimizer.update(g, optimizer.init(w), w)
    assert [int(jnp.sum(u != 0)) for u in updates] == [100, 100, 100]
    moved = np.asarray(updates != 0)
    np.testing.assert_array_equal(updates[moved], -jnp.sign(g)[moved])
    for one, size in zip(moved, np.abs(g), strict=True):
        assert size[one].min() > size[~one].max()


def test_numbers_stay_ternary():
    optimizer, w = sign_descent(0.5), jnp.zeros((8, 8))
    state = optimizer.init(w)
    for i in range(5):
        g = jax.random.normal(jax.random.key(i), w.shape)
        updates, state = optimizer.update(g, state, w)
        w = optax.apply_updates(w, updates)
        assert set(np.unique(w)) <= {-1.0, 0.0, 1.0}
    assert {-1.0, 1.0} <= set(np.unique(w))


def test_gradients_of_zero_move_nothing():
    optimizer, w = sign_descent(0.5), jnp.ones((4, 4))
    updates, _ = optimizer.update(jnp.zeros((4, 4)), optimizer.init(w), w)
    assert not updates.any()


def test_the_schedule_is_counted_in_the_state():
    optimizer, w = sign_descent(falling(10, first=0.5, last=0.1)), jnp.zeros((10, 10))
    state, counts = optimizer.init(w), []
    g = jax.random.normal(jax.random.key(0), w.shape)
    for _ in range(10):
        updates, state = optimizer.update(g, state, w)
        counts.append(int(jnp.sum(updates != 0)))
    assert counts == [50, 45, 40, 35, 30, 25, 20, 15, 1, 1]


def test_it_needs_the_parameters():
    optimizer, w = sign_descent(0.5), jnp.ones((2, 2))
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(w, optimizer.init(w))
