"""Llama-3-8B's shapes on TPU v5e by `roofline` and `explain`: nothing is computed, only traced."""

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant_models import Llama, LlamaConfig

config = LlamaConfig(
    vocab_size=128256,
    d_model=4096,
    d_ff=14336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    max_position=8192,
)
net = Llama(config)
token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
params = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def fn(params, tokens):
    return net.apply({"params": params}, tokens)


sites = jq.sites(fn, params, token)
recipe = jq.Recipe([("layers*kernel", jq.rtn(bits=4)), ("*", jq.KEEP)])
packed = jax.eval_shape(lambda p: jq.quantize(p, recipe, sites), params)
for chips in (1, 8):
    print(jq.roofline(packed, "v5e", tokens=1, chips=chips, sites=sites))
print(jq.explain(fn, packed, token, platform="v5e"))
print(jq.summary(packed))
