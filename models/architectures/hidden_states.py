"""The residual stream of a Llama after each layer, and the attention that each key receives."""

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
    embed = blockwise(config, dtype).embed
    block = Block(config, dtype)

    def of(params: PyTree, tokens: Array) -> HiddenStates:
        if len(tokens) <= first_query:
            raise ValueError(f"expected more than {first_query} tokens, got {len(tokens)}")
        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        angles = rotation_angles(config, positions)

        def step(h: Array, layer: PyTree) -> tuple[Array, HiddenStates]:
            ((h, _), _), seen = block.apply(
                {"params": layer}, (h, None), None, positions, angles,
                capture_intermediates=_is_query_or_key, mutable="intermediates",
            )  # fmt: skip
            q, k = _heads(config, seen["intermediates"]["attn"])
            mass = _mass(rotate(q, angles)[0], rotate(k, angles)[0], first_query)
            return h, HiddenStates(h[0].astype(jnp.float32), mass)

        h = embed(params, tokens[None])
        if not is_apart(params, "layers"):
            return jax.lax.scan(step, h, params["layers"])[1]
        found = []
        for layer in layers_of(params, "layers"):
            h, one = step(h, layer)
            found.append(one)
        return jax.tree.map(lambda *a: jnp.stack(a), *found)

    return of


def _is_query_or_key(module: nn.Module, _: str) -> bool:
    return module.name in ("q", "k", "q_norm", "k_norm")


def _heads(config: LlamaConfig, seen: Mapping[str, PyTree]) -> list[Array]:
    """Return queries and keys [1, t, heads, head_dim] before RoPE."""
    last = "{}_norm" if config.qk_norm else "{}"
    found = [seen[last.format(name)]["__call__"][0] for name in "qk"]
    return [a.reshape(*a.shape[:2], -1, config.head_dim) for a in found]


def _mass(
    q: Float[Array, "t heads hd"], k: Float[Array, "t kv hd"], first: int
) -> Float[Array, " t"]:
    """Return causal softmax weights averaged over heads and the queries from `first` on."""
    q, k = q.astype(jnp.float32).swapaxes(0, 1), k.astype(jnp.float32).swapaxes(0, 1)
    t, hd = k.shape[1:]
    visible = jnp.arange(t) <= jnp.arange(first, t)[:, None]

    def of_head(i: Array) -> Array:
        scores = q[i, first:] @ k[i * len(k) // len(q)].T * hd**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.mean(weights, axis=0)

    return jnp.mean(jax.lax.map(of_head, jnp.arange(len(q))), axis=0)
