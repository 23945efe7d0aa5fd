"""A mixture of experts in the place of the MLP of a layer (Mixtral, Qwen3-MoE).

A router sends every token to a few of E experts, each an MLP of its own, and sums their outputs
with weights. The rows of all tokens are sorted by expert, so that `jax.lax.ragged_dot` multiplies
the rows of an expert by its matrix, and a token costs as much as its experts, not as all of them.
A stack of matrices reaches `ragged_dot` as it is in the tree, so that a packed one can take its
place.

    router/kernel [d, E]                      float: jaxquant's own recipes leave it out
    experts/{gate,up}/kernel [E, d, d_e], experts/down/kernel [E, d_e, d]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxquant_models.architectures.config import LlamaConfig


class Routed(NamedTuple):
    """Where the tokens go; a token has c rows, one for each expert that it is sent to.

    Attributes:
      token: the token of every row, the rows being sorted by expert.
      place: the position of a token's rows among them.
      sizes: number of rows of every expert.
      weights: the factors of the outputs of a token's experts.
    """

    token: Int[Array, " rows"]
    place: Int[Array, "t c"]
    sizes: Int[Array, " E"]
    weights: Float[Array, "t c"]


def routed(logits: Float[Array, "t E"], chosen: int, normalized: bool) -> Routed:
    """Return where a router sends the tokens: to the experts with the largest logits.

    The weights are the softmax over all experts. Divided by their sum, they are the softmax over
    the chosen ones.

    Args:
      logits: the router's logits, float32.
      chosen: number of experts of a token.
      normalized: whether the weights of a token's experts are divided by their sum.

    >>> to = routed(jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), 1, True)
    >>> to.token.tolist(), to.sizes.tolist(), to.weights.tolist()
    ([1, 0], [1, 1, 0], [[1.0], [1.0]])
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits), chosen)
    if normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    order = jnp.argsort(experts.reshape(-1))
    place = jnp.argsort(order).reshape(experts.shape)
    sizes = jnp.bincount(experts.reshape(-1), length=logits.shape[-1]).astype(jnp.int32)
    return Routed(order // chosen, place, sizes, weights)


class Stack(nn.Module):
    """The same matrix of every expert; rows [m, in], grouped by expert, become [m, features]."""

    experts: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, sizes):
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        kernel = self.param("kernel", init, (self.experts, x.shape[-1], self.features))
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        return jax.lax.ragged_dot(x, kernel, sizes)


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of the expert of every row."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, sizes):
        c = self.config
        stack = lambda name, features: Stack(c.n_experts, features, self.dtype, name=name)
        gate, up = (stack(name, c.expert_d_ff)(x, sizes) for name in ("gate", "up"))
        return stack("down", c.d_model)(activated(c, gate) * up, sizes)


class MixtureOfExperts(nn.Module):
    """The outputs of a token's experts, summed with the router's weights, in float32."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        c, tokens = self.config, x.reshape(-1, x.shape[-1])
        router = nn.Dense(c.n_experts, use_bias=False, dtype=jnp.float32, name="router")
        to = routed(router(tokens), c.experts_per_token, c.norm_topk_prob)
        out = Experts(c, self.dtype, name="experts")(tokens[to.token], to.sizes)
        summed = jnp.einsum("tcd,tc->td", out[to.place].astype(jnp.float32), to.weights)
        return summed.astype(self.dtype).reshape(x.shape)


def activated(config: LlamaConfig, gate: Array) -> Array:
    """Return the gate after its activation.

    Args:
      config: the architecture.
      gate: the outputs of the gate.
    """
    return nn.silu(gate) if config.activation == "silu" else jnp.square(nn.relu(gate))
