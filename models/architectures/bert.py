"""BERT encoders in Flax linen, from sentences to vectors.

Post-norm layers, learned positions, exact GELU, biases everywhere (Devlin et al. 2018,
arXiv:1810.04805). The layers are stacked, as in `architectures.llama`. The parameter paths:

    {embed,positions,types}/embedding [., d]              embed_norm/{scale,bias} [d]
    layers/attn/{q,k,v,o}/{kernel,bias} [L, ...]          layers/attn_norm/{scale,bias} [L, d]
    layers/mlp/{up,down}/{kernel,bias} [L, ...]           layers/mlp_norm/{scale,bias} [L, d]
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import PyTree

# For `jaxquant.ptq.fold`: the input of o is linear in the values. Factors of no other input can be
# folded, since norms also feed the residual stream and no factor passes through GELU.
FOLDS = {"layers/attn/o/kernel": ("layers/attn/v/kernel", "layers/attn/v/bias")}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder. Immutable, hashable, compared by value.

    Attributes:
      vocab_size: rows of the token embedding.
      d_model: width of the residual stream.
      d_ff: hidden width of the MLP.
      n_layers: number of layers.
      n_heads: number of heads.
      max_position: number of learned positions.
      n_types: rows of the token type embedding.
      norm_eps: epsilon of the LayerNorms.
      pad_id: id of the padding token.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    max_position: int = 512
    n_types: int = 2
    norm_eps: float = 1e-12
    pad_id: int = 0

    @property
    def weights(self) -> int:
        """A lower bound of the number of weights: those of all matrices."""
        layer = self.d_model * (4 * self.d_model + 2 * self.d_ff)
        tables = self.vocab_size + self.max_position + self.n_types
        return self.n_layers * layer + tables * self.d_model


class Attention(nn.Module):
    """Bidirectional attention, in which padding is masked."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, real):
        c = self.config
        dense = lambda name: nn.Dense(c.d_model, dtype=self.dtype, name=name)
        q, k, v = (dense(name)(x).reshape(*x.shape[:2], c.n_heads, -1) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, mask=real[:, None, None, :])
        return dense("o")(mixed.reshape(x.shape))


class MLP(nn.Module):
    """down(gelu(up(x)))."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(self.config.d_ff, dtype=self.dtype, name="up")(x)
        down = nn.Dense(self.config.d_model, dtype=self.dtype, name="down")
        return down(nn.gelu(up, approximate=False))


class Block(nn.Module):
    """One post-norm layer, in the (carry, slice) form that `nn.scan` requires."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h, real):
        norm = lambda name: nn.LayerNorm(self.config.norm_eps, dtype=self.dtype, name=name)
        h = norm("attn_norm")(h + Attention(self.config, self.dtype, name="attn")(h, real))
        return norm("mlp_norm")(h + MLP(self.config, self.dtype, name="mlp")(h)), None


class Bert(nn.Module):
    """An encoder from tokens to hidden states.

    `apply({"params": p}, tokens)` maps int tokens [b, t], padded at the end with `pad_id`, to
    [b, t, d]; the values at padding are meaningless.

    Attributes:
      config: the architecture.
      dtype: dtype of activations and matmuls.
    """

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        if tokens.shape[1] > c.max_position:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the {c.max_position} positions")
        embed = lambda size, name: nn.Embed(size, c.d_model, dtype=self.dtype, name=name)
        h = embed(c.vocab_size, "embed")(tokens)
        h = h + embed(c.max_position, "positions")(jnp.arange(tokens.shape[1]))
        h = h + embed(c.n_types, "types")(jnp.zeros_like(tokens))  # a single text, not a pair
        h = nn.LayerNorm(c.norm_eps, dtype=self.dtype, name="embed_norm")(h)
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.n_layers,
        )
        return layers(c, self.dtype, name="layers")(h, tokens != c.pad_id)[0]


def sentence_vectors(model: Bert, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Return the mean hidden state of each sentence without padding, normalized to length 1.

    Args:
      model: the encoder.
      params: inner "params" tree.
      tokens: int [b, t].
    Returns:
      float32 [b, d]; inner products of two are cosines.
    Source: Reimers & Gurevych 2019, arXiv:1908.10084.
    """
    hidden = model.apply({"params": params}, tokens).astype(jnp.float32)
    total = jnp.sum(hidden * (tokens != model.config.pad_id)[..., None], axis=1)
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)
