"""Tokens per second of Llama-shaped models with random weights, at 16, 8, 4 and 2 bits.

The bits are those of the layers' matrices, groups of 128; embedding and head stay bfloat16.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.core.tensor import View
from jaxquant_models.architectures.cache import Cache, init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama, apply
from tests.support.operands import random_data

SHAPES = {
    "1B": {"d_model": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64,
           "d_ff": 8192},
    "7B": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128,
           "d_ff": 11008},
}  # fmt: skip
FORMATS = {
    16: None,
    8: jq.formats.Integer(8, -1, symmetric=True),
    4: jq.formats.Integer(4, 128, symmetric=True),
    2: jq.formats.Integer(2, 128, symmetric=True),
}
TOKENS, CONTEXT = 64, 256


def rates(deadline: float) -> list[dict]:
    """Rows of model, bits, tokens per second, and how much of it is the packed bytes' due."""
    rows = []
    print(f"{'model':6} {'bits':>5} {'GB':>6} {'tokens/s':>9} {'over 16 bits':>13}")
    for name, shape in SHAPES.items():
        config, base = LlamaConfig(vocab_size=32000, **shape), 0.0
        for bits, format in FORMATS.items():
            if time.monotonic() > deadline:
                print("out of time: the rest is left out")
                return rows
            params = random_params(config, format)
            nbytes = sum(a.nbytes for a in jax.tree.leaves(params))
            rate = tokens_per_second(config, params)
            base = base or rate
            print(
                f"{name:6} {bits:5} {nbytes / 1e9:6.2f} {rate:9.1f} {rate / base:13.2f}", flush=True
            )
            row = {"model": name, "bits": bits, "bytes": nbytes, "tokens_per_second": rate}
            rows.append(row)
    return rows


def random_params(config: LlamaConfig, format) -> dict:
    """Layers apart; matrices of the layers packed (None: bfloat16), the rest bfloat16."""
    model = Llama(config, jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def dense(a):
        return jnp.asarray(rng.standard_normal(a.shape, np.float32) * 0.02, jnp.bfloat16)

    def packed(a, seed):
        k, n = a.shape
        return jq.QTensor(
            data=random_data(format, k, n, seed),
            format=format,
            view=View((k,), (n,), (-2, -1)),
            logical_dtype="bfloat16",
            method="random",
        )

    def layer(i):
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes["layers"])
        return jax.tree.map(
            lambda a: packed(a, i) if format is not None and a.ndim == 2 else dense(a), one
        )

    rest = {name: jax.tree.map(dense, value) for name, value in shapes.items() if name != "layers"}
    return {**rest, "layers": {str(i): layer(i) for i in range(config.n_layers)}}


def tokens_per_second(config: LlamaConfig, params, tokens: int = TOKENS) -> float:
    """Of greedy decoding from an empty prompt, the loop on the device; median of three."""
    run = jq.quantized(lambda p, t, c: apply(Llama(config, jnp.bfloat16), p, t, c))

    @jax.jit
    def decode(params, token, cache):
        def step(_, state):
            token, cache = state
            logits, cache = run(params, token, cache)
            return jnp.argmax(logits[:, -1:], -1).astype(jnp.int32), Cache(*cache)

        _, cache = run(params, token, cache)  # from here on as the layers lie, stacked or apart
        return jax.lax.fori_loop(0, tokens, step, (token, cache))[0]

    token, cache = jnp.ones((1, 1), jnp.int32), init_cache(config, 1, CONTEXT, jnp.bfloat16)
    jax.block_until_ready(decode(params, token, cache))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(decode(params, token, cache))
        times.append(time.perf_counter() - start)
    return tokens / statistics.median(times)
