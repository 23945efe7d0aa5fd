"""Random arrays, a scanned network, and the check that packed weights serve as dense ones do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def check(fn, params, qparams, *args, dense=()):
    """Packed equals dequantized, jitted or not; only the weights in `dense` are made dense."""
    want = fn(jq.dequantize(qparams), *args)
    for run in (jq.quantized(fn), jax.jit(jq.quantized(fn))):
        np.testing.assert_allclose(run(qparams, *args), want, rtol=2e-5, atol=2e-4)
    explanation = jq.explain(fn, qparams, *args)
    assert explanation.uses, "no weight was served"
    assert explanation.materialised == tuple(dense), str(explanation)


def stack():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jnp.tanh(nn.Dense(32, use_bias=False, name="d")(x)), None

    class Net(nn.Module):
        remat: bool = False

        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block) if self.remat else Block
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    return Net


def outlying(t=64, k=48):
    """Rows with two channels that are always large, and one entry that is huge."""
    x = draw(t, k) * jnp.where(jnp.isin(jnp.arange(k), jnp.array([3, 17])), 30.0, 1.0)
    return x.at[5, 29].set(900.0)
