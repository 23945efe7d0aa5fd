"""The hardware suite's own parts, on the CPU: what needs no accelerator."""

import jax
import jax.numpy as jnp

from jaxquant_models.architectures.config import LlamaConfig
from tests.device import decode, timing
from tests.support.arrays import draw

TINY = LlamaConfig(
    vocab_size=64, d_model=128, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=256
)


def test_random_models_decode():
    params = decode.random_params(TINY, decode.FORMATS[2])
    assert params["layers"]["1"]["mlp"]["down"]["kernel"].bits_per_weight == 2.125
    assert decode.tokens_per_second(TINY, params, 2) > 0


def test_a_call_is_timed_with_fresh_operands():
    seen = []

    def fn(x, w):
        seen.append(w)
        return x @ w

    operands = [(draw(64, 64, seed=i),) for i in range(3)]
    assert timing.seconds(fn, draw(1, 64), operands) < 1
    assert len({id(w) for w in seen}) == 3
    assert timing.copies(1 << 20) * (1 << 20) >= timing.CACHE
    assert jnp.issubdtype(jax.eval_shape(fn, draw(1, 64), draw(64, 64)).dtype, jnp.floating)
