"""A mixture of experts in place of the MLP of a layer (Mixtral, Qwen3-MoE).

A router sends every token to a few of E experts, each of which is an MLP, and the layer returns the
weighted sum of their outputs. The rows of all tokens are sorted by expert, so that
`jax.lax.ragged_dot` multiplies the rows of each expert by its matrix; a token then costs only as
much as the experts that it is sent to. `ragged_dot` receives each stack of matrices directly from
the tree, so that a packed stack can replace it.

    router/kernel [d, E]                      float: jaxquant's own recipes do not quantize it
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
    """The experts of each of t tokens; a token has c rows, one for each of its experts.

    Attributes:
      token: index of the token of every row, where rows are sorted by expert, integers [t * c].
      place: index of each of a token's rows in that order, integers [t, c].
      sizes: number of rows of every expert, int32 [E].
      weights: factors of the outputs of a token's experts, float32 [t, c].
    """

    token: Int[Array, " rows"]
    place: Int[Array, "t c"]
    sizes: Int[Array, " E"]
    weights: Float[Array, "t c"]


def routed(logits: Float[Array, "t E"], chosen: int, normalized: bool) -> Routed:
    """Return the routing of tokens to the experts with the largest logits.

    The weights are the softmax over all experts. If they are divided by their sum, they are the
    softmax over the chosen experts.

    Args:
      logits: the router's logits, float32 [t, E].
      chosen: number of experts per token, from 1 to E.
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
    """One matrix for every expert, which maps rows [m, in], sorted by expert, to [m, features]."""

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
    """The experts' MLPs: down(act(gate(x)) * up(x)) with the matrices of the expert of each row."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, sizes):
        c = self.config
        stack = lambda name, features: Stack(c.n_experts, features, self.dtype, name=name)
        gate, up = (stack(name, c.expert_d_ff)(x, sizes) for name in ("gate", "up"))
        return stack("down", c.d_model)(activated(c, gate) * up, sizes)


class MixtureOfExperts(nn.Module):
    """The sum of the outputs of a token's experts with the router's weights, taken in float32."""

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
    """Return the gate after the activation function of the architecture.

    Args:
      config: the architecture: SiLU if its `activation` is "silu", else the squared ReLU.
      gate: the outputs of the gate, of any shape.
    """
    return nn.silu(gate) if config.activation == "silu" else jnp.square(nn.relu(gate))
