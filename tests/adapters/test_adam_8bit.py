"""8-bit Adam: against NumPy, against float32, and where its range ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.adapters.adam_8bit import Moment, adam8bit, decoded, encoded, unsigned_map
from jaxquant.formats.normal_float import dynamic_map


def nearest(a, signed, block):
    """Quantized and decoded again, by the definition."""
    values = np.float32(dynamic_map() if signed else unsigned_map())
    parts = a.reshape(-1, block)
    top = np.abs(parts).max(1, keepdims=True)
    at = np.abs((parts / np.where(top > 0, top, 1))[..., None] - values).argmin(-1)
    return (values[at] * top).reshape(a.shape)


@pytest.mark.parametrize("root", [True, False])
def test_numpy(root):
    """Three steps, with weight decay and a schedule."""
    r, rates = np.random.default_rng(0), [0.1, 0.2, 0.3]
    p = r.normal(size=(8, 64)).astype(np.float32)
    rate = lambda n: 0.1 * (n + 1)
    optimizer = adam8bit(rate, 0.8, 0.9, weight_decay=0.1, block=64, least=0, root=root)
    params, m, v = jnp.asarray(p), np.zeros_like(p), np.zeros_like(p)
    state = optimizer.init(params)
    for t, rate in enumerate(rates, 1):
        g = r.normal(size=p.shape).astype(np.float32)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
        p = p - rate * (step + 0.1 * p)
        m = nearest(m, True, 64)
        v = nearest(np.sqrt(v), False, 64) ** 2 if root else nearest(v, False, 64)
        updates, state = jax.jit(optimizer.update)(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        off = np.abs(params - p)  # a value halfway between two codes may round to either
        assert np.median(off) < 1e-5 and (off > 1e-3).mean() < 0.01


@pytest.mark.parametrize(("root", "ratio"), [(True, 0.92), (False, 27.9)])
def test_range(root, ratio):
    """Steady gradients, one 3e-4 of the other: in v that is 9e-8, below the least code."""
    optimizer = adam8bit(1.0, block=2, least=0, root=root)
    g = jnp.array([1.0, 3e-4])

    def step(carry, _):
        updates, state = optimizer.update(g, carry)
        return state, updates

    updates = jax.lax.scan(step, optimizer.init(g), None, 3000)[1]
    assert abs(updates[-1][1]) == pytest.approx(ratio, rel=0.02)
    assert abs(updates[-1][0]) == pytest.approx(1, rel=0.02)


def test_quadratic():
    """4096 parameters with curvatures of 1e-2 to 1, 400 steps: as good as in float32."""
    r = np.random.default_rng(0)
    curvature = jnp.asarray(np.logspace(-2, 0, 4096), jnp.float32)
    start = jnp.asarray(r.normal(size=4096), jnp.float32)
    loss = lambda x: jnp.sum(curvature * x * x) / 2

    def final(optimizer):
        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return float(loss(jax.lax.scan(step, (start, optimizer.init(start)), None, 400)[0][0]))

    exact = final(optax.adam(1e-2))
    assert exact < 0.05 * loss(start)
    assert final(adam8bit(1e-2)) == pytest.approx(exact, rel=0.1)


def test_bytes():
    """2.03 for a parameter, the count apart; small parameters have float32."""
    params = {"w": jnp.zeros((64, 1024), jnp.bfloat16), "bias": jnp.zeros(1024)}
    state = adam8bit(1e-3).init(params)
    nbytes = lambda a: sum(x.nbytes for x in jax.tree.leaves(a))
    assert nbytes((state.m["w"], state.v["w"])) / params["w"].size == 2 + 2 * 4 / 256
    assert nbytes((state.m["bias"], state.v["bias"])) == 8 * 1024


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((512,), (2,)),
        ((3, 512), (3, 2)),
        ((3, 100), (2,)),
        ((3, 20, 20), (3, 2)),
        ((3, 4, 512), (3, 4, 2)),
        ((5,), (1,)),
    ],
)
def test_blocks(shape, scales):
    a = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    moment = encoded(a, True, 256)
    assert moment.codes.shape == shape and moment.scale.shape == scales
    assert jnp.max(jnp.abs(decoded(moment, True, 256) - a)) < 0.02 * jnp.max(jnp.abs(a))


def test_layers_of_a_stack_are_apart():
    """One layer at a time gives what all give, also where a layer is no multiple of a block."""
    r = np.random.default_rng(0)
    g = jnp.asarray(r.normal(size=(3, 20, 20)), jnp.float32)
    optimizer = adam8bit(1e-2, least=0)
    run = lambda g: optimizer.update(g, optimizer.update(g, optimizer.init(g))[1])[0]
    np.testing.assert_array_equal(run(g), jnp.concatenate([run(g[i : i + 1]) for i in range(3)]))


def test_zeros_and_bfloat16():
    """A first gradient of zeros moves nothing; nor does a block of zeros beside another."""
    params = jnp.ones((2, 256), jnp.bfloat16)
    optimizer = adam8bit(0.125, least=0)
    updates, state = optimizer.update(jnp.zeros_like(params), optimizer.init(params))
    assert updates.dtype == jnp.bfloat16 and not updates.any()
    g = params.at[0].set(0)
    updates, state = optimizer.update(g, optimizer.init(params))
    assert not updates[0].any() and (updates[1] == -0.125).all()
    assert isinstance(state.m, Moment) and not decoded(state.v, False, 256)[0].any()


def test_maps():
    for values, signed in ((dynamic_map(), True), (unsigned_map(), False)):
        assert len(set(values)) == 256 and list(values) == sorted(values)
        codes = encoded(jnp.float32(values), signed, 256).codes
        assert codes.tolist() == list(range(256))


def test_errors():
    with pytest.raises(ValueError, match="b1 and b2 must be"):
        adam8bit(1e-3, b1=1.0)
    optimizer = adam8bit(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="weight decay needs the parameters"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))
