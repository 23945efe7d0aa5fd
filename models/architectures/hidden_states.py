"""The residual stream of a Llama after each layer, its attention scores, and what keys receive."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.ptq.layer_stacks import is_apart, layers_of
from jaxquant_models.architectures.blocks import blockwise
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Block
from jaxquant_models.architectures.rope import rotate, rotation_angles

FIRST_QUERY = 64  # earlier queries see only few keys


class HiddenStates(NamedTuple):
    """Hidden states of one text.

    Attributes:
      residual: the residual stream after each layer, float32 [L, t, d].
      attention: the attention weight of each key, averaged over heads and queries, float32 [L, t].
    """

    residual: Float[Array, "L t d"]
    attention: Float[Array, "L t"]


def hidden_states(
    config: LlamaConfig, dtype: DTypeLike = jnp.float32, first_query: int = FIRST_QUERY
) -> Callable[[PyTree, Int[Array, " t"]], HiddenStates]:
    """Return the pure function (params, tokens int [t]) -> `HiddenStates`.

    Layers may be stacked or unstacked. The attention matrix [t, t] of one head is held at a time.
    For packed params use `jaxquant.quantized(hidden_states(config))`.

    Args:
      config: the architecture.
      dtype: dtype of activations.
      first_query: first query of the average; texts must be longer than this.
    """
    kept = lambda h, q, k: HiddenStates(h.astype(jnp.float32), _mass(q, k, first_query))
    run = _layer_by_layer(config, dtype, kept)

    def of(params: PyTree, tokens: Array) -> HiddenStates:
        if len(tokens) <= first_query:
            raise ValueError(f"expected more than {first_query} tokens, got {len(tokens)}")
        return run(params, tokens)[1]

    return of


def attention_scores(
    config: LlamaConfig, dtype: DTypeLike, reduce: Callable[[Float[Array, "t t"]], PyTree]
) -> Callable[[PyTree, Int[Array, " t"]], tuple[Float[Array, "t d"], PyTree]]:
    """Return the function (params, tokens int [t]) -> (last residual stream, reduced scores).

    Layers may be stacked or unstacked. The scores [t, t] of one head are held at a time.

    Args:
      config: the architecture.
      dtype: dtype of activations.
      reduce: function of the scores of one head, float32 [t, t], query by key: q k^T / sqrt(hd),
        and -inf where the key comes after the query. Its results are stacked [L, heads, ...].
    """
    run = _layer_by_layer(config, dtype, lambda h, q, k: _of_heads(q, k, 0, reduce))

    def of(params: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        h, found = run(params, tokens)
        return h[0].astype(jnp.float32), found

    return of


def _layer_by_layer(
    config: LlamaConfig, dtype: DTypeLike, kept: Callable[[Array, Array, Array], PyTree]
) -> Callable[[PyTree, Array], tuple[Array, PyTree]]:
    """Return (params, tokens) -> the last h [1, t, d] and what is kept of all layers, stacked.

    Of every layer `kept` receives its output [t, d], and its rotated queries and keys
    [heads, t, hd] in float32.
    """
    embed = blockwise(config, dtype).embed
    block = Block(config, dtype)

    def of(params: PyTree, tokens: Array) -> tuple[Array, PyTree]:
        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        angles = rotation_angles(config, positions)
        turned = lambda a: rotate(a, angles)[0].astype(jnp.float32).swapaxes(0, 1)

        def step(h: Array, layer: PyTree) -> tuple[Array, PyTree]:
            ((h, _), _), seen = block.apply(
                {"params": layer}, (h, None), None, positions, angles,
                capture_intermediates=_is_query_or_key, mutable="intermediates",
            )  # fmt: skip
            q, k = _heads(config, seen["intermediates"]["attn"])
            return h, kept(h[0], turned(q), turned(k))

        h = embed(params, tokens[None])
        if not is_apart(params, "layers"):
            return jax.lax.scan(step, h, params["layers"])
        found = []
        for layer in layers_of(params, "layers"):
            h, one = step(h, layer)
            found.append(one)
        return h, jax.tree.map(lambda *a: jnp.stack(a), *found)

    return of


def _is_query_or_key(module: nn.Module, _: str) -> bool:
    return module.name in ("q", "k", "q_norm", "k_norm")


def _heads(config: LlamaConfig, seen: Mapping[str, PyTree]) -> list[Array]:
    """Return queries and keys [1, t, heads, head_dim] before RoPE."""
    last = "{}_norm" if config.qk_norm else "{}"
    found = [seen[last.format(name)]["__call__"][0] for name in "qk"]
    return [a.reshape(*a.shape[:2], -1, config.head_dim) for a in found]


def _mass(
    q: Float[Array, "heads t hd"], k: Float[Array, "kv t hd"], first: int
) -> Float[Array, " t"]:
    """Return causal softmax weights averaged over heads and the queries from `first` on."""
    mean = lambda scores: jnp.mean(jax.nn.softmax(scores, axis=-1), axis=0)
    return jnp.mean(_of_heads(q, k, first, mean), axis=0)


def _of_heads(
    q: Float[Array, "heads t hd"],
    k: Float[Array, "kv t hd"],
    first: int,
    reduce: Callable[[Array], PyTree],
) -> PyTree:
    """Return the causal scores of each head, from query `first` on, reduced and stacked."""
    t, hd = k.shape[1:]
    visible = jnp.arange(t) <= jnp.arange(first, t)[:, None]

    def of_head(i: Array) -> PyTree:
        scores = q[i, first:] @ k[i * len(k) // len(q)].T * hd**-0.5
        return reduce(jnp.where(visible, scores, -jnp.inf))

    return jax.lax.map(of_head, jnp.arange(len(q)))
