"""Bytes that a generation takes beside the weights: its cache, and what its programs add."""

import jax
import jax.numpy as jnp

from jaxquant.ptq.layer_stacks import is_apart
from jaxquant_models.architectures.cache import init_cache
from jaxquant_models.runs.generate import _decode, _prefill

PROMPT = 32  # tokens of the prompt


def generation_memory(apply_cached, params, config, room, form=None):
    """Bytes of a generation of `room` tokens; from shapes alone, nothing is computed."""
    shape = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda a: shape(a.shape, a.dtype), params)
    apart = is_apart(params, "layers")

    def empty():
        cache = init_cache(config, 1, PROMPT + room, jnp.float32, form)
        return cache.apart() if apart else cache

    cache = jax.eval_shape(empty)
    integer, heat = shape((), "int32"), shape((), "float32")
    key = jax.eval_shape(jax.random.key, 0)
    programs = (
        _prefill.lower(
            apply_cached, params, shape((1, PROMPT), "int32"), integer, heat, key, cache=cache
        ),
        _decode.lower(
            apply_cached, room, params, integer, integer, shape((1,), "int32"), heat, key,
            cache=cache,
        ),
    )  # fmt: skip
    added = []
    for program in programs:
        sizes = program.compile().memory_analysis()
        new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        added.append(sizes.temp_size_in_bytes + new)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)) + max(added)
