"""Text that a model writes itself: training data where there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant_models.architectures.llama import init_cache
from jaxquant_models.readers.registry import Model
from jaxquant_models.runs import pipeline

BATCH = 16  # sequences written at a time


def written(model: Model, count: int, length: int, key: jax.Array) -> np.ndarray:
    """Token sequences [count, length], sampled at temperature 1 from the model.

    Each begins with the model's first token, or, where it has none, with one at random.
    """
    batches = [
        _batch(model.apply_cached, model.config, length, model.params, _first(model, one), one)
        for one in jax.random.split(key, -(-count // BATCH))
    ]
    return np.concatenate([np.asarray(b) for b in batches])[:count]


def _first(model: Model, key: jax.Array) -> jax.Array:
    fixed = pipeline.beginning(model)
    if fixed:
        return jnp.full(BATCH, fixed[0], jnp.int32)
    return jax.random.randint(key, (BATCH,), 0, model.config.vocab_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch(apply_cached, config, length, params, first, key):
    def step(state, key):
        tokens, cache = state
        logits, cache = apply_cached(params, tokens[:, None], cache)
        return (jax.random.categorical(key, logits[:, 0]).astype(jnp.int32), cache), tokens

    keys = jax.random.split(jax.random.fold_in(key, 1), length)
    _, tokens = jax.lax.scan(step, (first, init_cache(config, BATCH, length)), keys)
    return tokens.T
