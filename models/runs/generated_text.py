"""Text that a model writes itself: training data where there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.durable.store import Finished
from jaxquant_models.architectures.cache import init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.model import ApplyCached, Model

GENERATED = "generated"  # what the sequences are kept as
BATCH = 16  # sequences written at a time


def generated_sequences(
    model: Model, count: int, length: int, seed: int, finished: Finished
) -> np.ndarray:
    """Token sequences [count, length], sampled at temperature 1 from the model.

    Each begins with the model's first token, or, where it has none, with one at random. Sequences
    that were finished before are not written again.
    """
    if GENERATED not in finished:
        batches = [
            _batch(model.apply_cached, model.config, length, model.params, _first(model, key), key)
            for key in jax.random.split(jax.random.key(seed), -(-count // BATCH))
        ]
        tokens = np.concatenate([np.asarray(b) for b in batches])[:count]
        finished[GENERATED] = {"tokens": tokens}
    return finished[GENERATED]["tokens"]


def _first(model: Model, key: jax.Array) -> jax.Array:
    if bos := model.bos_ids:
        return jnp.full(BATCH, bos[0], jnp.int32)
    return jax.random.randint(key, (BATCH,), 0, model.config.vocab_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch(apply_cached: ApplyCached, config: LlamaConfig, length: int, params, first, key):
    def step(state, key):
        tokens, cache = state
        logits, cache = apply_cached(params, tokens[:, None], cache)
        return (jax.random.categorical(key, logits[:, 0]).astype(jnp.int32), cache), tokens

    keys = jax.random.split(jax.random.fold_in(key, 1), length)
    _, tokens = jax.lax.scan(step, (first, init_cache(config, BATCH, length)), keys)
    return tokens.T
