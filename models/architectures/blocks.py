"""A Llama split into pure functions: block by block, and within a block."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant_models.architectures.cache import Cache, init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Attention, Block, Llama, feed_forward
from jaxquant_models.architectures.rope import rotation_angles


class Blockwise(NamedTuple):
    """The model as pure functions; see `blockwise`."""

    embed: Callable[[PyTree, jax.Array], jax.Array]
    block: Callable[[PyTree, jax.Array], jax.Array]
    head: Callable[[PyTree, jax.Array], jax.Array]
    seen: Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]]
    after: Callable[[PyTree, tuple[jax.Array, jax.Array, jax.Array]], jax.Array]


def blockwise(config: LlamaConfig, dtype: DTypeLike = jnp.float32) -> Blockwise:
    """Return the model as pure functions, for calibration one block at a time.

    Args:
      config: the architecture.
      dtype: dtype of activations.
    Returns:
      embed(params, tokens [b, t]) -> h [b, t, d];
      block(layer_params, h) -> h, where layer_params is `params["layers"]` without the axis L;
      head(params, h) -> logits [b, t, V] float32;
      seen(layer_params, h [b, p, d]) -> keys and values [1, b, n_kv_heads, p, head_dim] of a text
      that begins with h; and after(layer_params, (h, keys, values)) -> h of the tokens that follow.
      `params` is the inner "params" dict. Chained, the first three equal
      `Llama(config, dtype).apply`.
    """
    model = Llama(config, dtype)

    def embed(params, tokens):
        return model.apply({"params": params}, tokens, method=lambda m, t: m.embed(t))

    def block(layer_params, h):
        positions = jnp.arange(h.shape[1], dtype=jnp.int32)
        angles = rotation_angles(config, positions)
        run = Block(config, dtype).apply
        return run({"params": layer_params}, (h, None), None, positions, angles)[0][0]

    def head(params, h):
        return model.apply({"params": params}, h, method="logits")

    def cached(layer_params, h, cache):
        positions = cache.length + jnp.arange(h.shape[1], dtype=jnp.int32)
        angles = rotation_angles(config, positions)
        run = Block(config, dtype).apply
        return run({"params": layer_params}, (h, cache), 0, positions, angles)[0]

    def seen(layer_params, h):
        one = init_cache(dataclasses.replace(config, n_layers=1), *h.shape[:2], dtype)
        cache = cached(layer_params, h, one)[1]
        return cache.k, cache.v

    def after(layer_params, given):
        h, *held = given
        longer = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, h.shape[1]), (0, 0)])
        cache = Cache(*map(longer, held), jnp.int32(held[0].shape[3]))
        return cached(layer_params, h, cache)[0]

    return Blockwise(embed, block, head, seen, after)


def attention_and_mlp(
    config: LlamaConfig, dtype: DTypeLike = jnp.float32
) -> tuple[Callable, Callable]:
    """Return two functions (layer_params, h) -> the output that attention and the MLP add to h.

    Args:
      config: the architecture.
      dtype: dtype of activations.
    """

    def run(module, name, layer_params, h, *args):
        norm = nn.RMSNorm(config.norm_eps, dtype=dtype)
        x = norm.apply({"params": layer_params[f"{name}_norm"]}, h)
        return module.apply({"params": layer_params[name]}, x, *args)

    def attend(layer_params, h):
        angles = rotation_angles(config, positions := jnp.arange(h.shape[1], dtype=jnp.int32))
        return run(
            Attention(config, dtype), "attn", layer_params, h, None, None, positions, angles
        )[0]

    after = feed_forward(config, dtype)
    return attend, lambda layer_params, h: run(after, "mlp", layer_params, h)
