"""An exact prefix: the first tokens of a text, whose activations are not rounded.

These tokens are attention sinks, with activations hundreds of times as large as those of other
tokens. Other tokens see only their keys and values, which are computed once (IntactKV, Liu et al.
2024, arXiv:2403.01241; PrefixQuant, Chen et al. 2024, arXiv:2410.05265).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant_models.architectures.cache import Cache, init_cache
from jaxquant_models.architectures.llama import Llama, apply


def exact_prefix(model: Llama, length: int) -> tuple[Callable, Callable]:
    """Return the model's functions without and with a cache, exact in the first tokens of a text.

    More than `length` tokens passed to a cache at once are taken to begin a text.

    Args:
      model: the model.
      length: number of tokens whose activations are not rounded.
    Returns:
      (apply_fn, apply_cached), with the signatures of `Model.apply_fn` and `Model.apply_cached`.
    """

    def apply_cached(params: PyTree, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        if tokens.shape[1] <= length:
            return apply(model, params, tokens, cache)
        with jq.core.exact_activations():
            first, cache = apply(model, params, tokens[:, :length], cache)
        rest, cache = apply(model, params, tokens[:, length:], cache)
        return jnp.concatenate([first, rest], axis=1), cache

    def apply_fn(params: PyTree, tokens: jax.Array) -> jax.Array:
        cache = init_cache(model.config, *tokens.shape, model.dtype)
        return apply_cached(params, tokens, cache)[0]

    return apply_fn, apply_cached


def after_prefix(
    model: Llama, params: PyTree, sequence: jax.Array, length: int
) -> tuple[jax.Array, Cache]:
    """Return the tokens [1, t] after a prefix, and the cache filled by the prefix.

    Calibration runs on these.

    Args:
      model: the model.
      params: inner "params" tree.
      sequence: tokens, int [1, length + t].
      length: number of tokens of the prefix.
    """
    cache = init_cache(model.config, 1, sequence.shape[1], model.dtype)
    if length:
        cache = apply(model, params, sequence[:, :length], cache)[1]
    return sequence[:, length:], cache
