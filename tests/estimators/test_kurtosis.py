"""Kurtosis regularization: its derivative is that of the penalty, and it flattens outputs."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.estimators.kurtosis import kurtosis
from tests.support.arrays import draw


def net(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def latents():
    return jq.latent({"a": draw(32, 48), "b": draw(48, 24, seed=1)}, jq.ste(4, 16))


def test_of_known_distributions():
    normal = jax.random.normal(jax.random.key(0), (200, 1000))
    assert kurtosis(3 * normal + 1) == pytest.approx(3, rel=0.02)
    assert kurtosis(jnp.linspace(-1, 1, 1001)) == pytest.approx(1.8, rel=0.01)


@pytest.mark.parametrize("weight", [0.3, 1e-3])
def test_its_derivative_is_that_of_the_penalty(weight):
    """Of the loss with the penalty written out, layer by layer."""
    p, x = latents(), draw(9, 32, seed=2)
    loss = lambda p, x: jnp.sum(jq.quantized(net)(p, x) ** 2)

    def written_out(p, x):
        first = jq.quantized(lambda p, x: x @ p["a"])(p, x)
        y = jq.quantized(lambda p, h: h @ p["b"])(p, jnp.tanh(first))
        return jnp.sum(y**2) + weight * (kurtosis(first) + kurtosis(y))

    with jq.estimators.flattened(weight):
        value, got = jax.value_and_grad(loss)(p, x)
    assert value == loss(p, x)  # the loss alone is told
    want, without = jax.grad(written_out)(p, x), jax.grad(loss)(p, x)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
    assert np.any(without["a"].data["codes"] != got["a"].data["codes"])


def test_training_with_it_has_lighter_tails():
    """Towards outputs with an outlier channel, which the loss alone would grow."""
    x = draw(64, 32, seed=2)
    wanted = net({"a": draw(32, 48, seed=8), "b": draw(48, 24, seed=9).at[:, 3].multiply(12)}, x)

    def trained(weight):
        p = latents()
        train, rest = eqx.partition(p, jq.trained(p))
        optimizer = optax.adam(2e-2)
        loss = lambda t: jnp.mean((jq.quantized(net)(eqx.combine(t, rest), x) - wanted) ** 2)

        @jax.jit
        def step(t, state):
            with jq.estimators.flattened(weight):
                updates, state = optimizer.update(jax.grad(loss)(t), state, t)
            return optax.apply_updates(t, updates), state

        state = optimizer.init(train)
        for _ in range(60):
            train, state = step(train, state)
        return float(kurtosis(jq.quantized(net)(eqx.combine(train, rest), x)))

    assert trained(10.0) < 0.7 * trained(0.0)
