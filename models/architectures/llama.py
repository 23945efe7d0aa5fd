"""Llama, Mistral, Mixtral, SmolLM, Qwen2, Qwen3, Qwen3-MoE and BitNet b1.58 in Flax linen.

Every weight is used by a plain `nn.Dense`, `Embed` or `ragged_dot`, so jaxquant can substitute a
packed weight at its place in the parameter tree. The layers are stacked: their leaves have a
leading axis L, over which `nn.scan` runs, so that compile time does not grow with depth. The
parameter paths:

    embed/embedding [V, d]                    norm/scale [d]          head/kernel [d, V] if untied
    layers/attn/{q,k,v,o}/kernel [L, in, out] (and bias [L, out])
    layers/attn/{q_norm,k_norm}/scale [L, head_dim]                   Qwen3
    layers/attn/sub_norm/scale [L, heads x head_dim], layers/mlp/sub_norm/scale [L, d_ff]  BitNet
    layers/mlp/{gate,up,down}/kernel [L, in, out] (and bias [L, out])
    layers/mlp/router/kernel [L, d, E], layers/mlp/experts/{gate,up,down}/kernel [L, E, in, out]
                                                                      experts, in place of these
    layers/{attn_norm,mlp_norm}/scale [L, d]

Unstacked params, layers/0/attn/..., are supported too (`apply`); the layers then run one after the
other. This takes longer to compile, but no layer's packed words are copied out of a stack before a
kernel reads them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike, DTypeLike

from jaxquant.ptq.layer_stacks import is_apart, layers_of, restack
from jaxquant_models.architectures.cache import AnyCache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.experts import MixtureOfExperts, activated
from jaxquant_models.architectures.rope import rotate, rotation_angles
from pallas_kernels.attention import attention

# Patterns of parameter paths. The matrices of the layers are all but the routers of experts, whose
# name is the only one that ends in "r": they are small, and an error there sends a token to another
# expert.
LAYER_MATRICES = "layers/*[!r]/kernel"
RESIDUAL_READERS = ("layers/attn/[qkv]/kernel", "layers/mlp*/[gu]*/kernel")
QUERIES_AND_KEYS = "layers/*attn/[qk]/kernel"
NORM_SCALES = "*norm/scale"


class Embed(nn.Embed):
    """`nn.Embed` that converts the rows that are looked up, not the whole table, to its dtype."""

    def __call__(self, inputs):
        rows = jnp.take(self.embedding, inputs, axis=0)
        return rows.astype(self.dtype or rows.dtype)


class Attention(nn.Module):
    """Grouped-query attention: n_heads query heads share n_kv_heads key and value heads."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, cache, layer, positions, angles):
        c = self.config

        def project(name: str, heads: int):
            dense = nn.Dense(heads * c.head_dim, c.qkv_bias, dtype=self.dtype, name=name)
            return dense(x).reshape(*x.shape[:2], heads, c.head_dim)

        q, k, v = project("q", c.n_heads), project("k", c.n_kv_heads), project("v", c.n_kv_heads)
        if c.qk_norm:
            q = nn.RMSNorm(c.norm_eps, dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(c.norm_eps, dtype=self.dtype, name="k_norm")(k)
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # the layout of the products: saves a cache copy
        if cache is None:
            mixed, kept = attention(q, k, v, positions), None
        else:
            mixed, cache, kept = cache.attend(layer, q, k, v, positions, c)
        mixed = mixed.reshape(*x.shape[:2], -1)
        if c.sub_norms:
            mixed = nn.RMSNorm(c.norm_eps, dtype=self.dtype, name="sub_norm")(mixed)
        return nn.Dense(c.d_model, c.o_bias, dtype=self.dtype, name="o")(mixed), cache, kept


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)); for BitNet, down(norm(relu(gate(x))^2 * up(x)))."""

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = nn.Dense(c.d_ff, c.mlp_bias, dtype=self.dtype, name="gate")(x)
        up = nn.Dense(c.d_ff, c.mlp_bias, dtype=self.dtype, name="up")(x)
        h = activated(c, gate) * up
        if c.sub_norms:
            h = nn.RMSNorm(c.norm_eps, dtype=self.dtype, name="sub_norm")(h)
        return nn.Dense(c.d_model, c.mlp_bias, dtype=self.dtype, name="down")(h)


def feed_forward(config: LlamaConfig, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Return what follows the attention in a layer: an MLP or a mixture of experts.

    Args:
      config: the architecture.
      dtype: dtype of activations.
      name: name of the module; None for one by itself.
    """
    return (MixtureOfExperts if config.n_experts else MLP)(config, dtype, name=name)


class Block(nn.Module):
    """One layer, in the (carry, slice) form that `nn.scan` requires.

    The carry is h and the cache, which a layer may update in place; `layer` is the layer's number.
    The second result holds what the cache receives from all layers at the end.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry, layer, positions, angles):
        h, cache = carry
        norm = lambda name: nn.RMSNorm(self.config.norm_eps, dtype=self.dtype, name=name)
        attention = Attention(self.config, self.dtype, name="attn")
        mixed, cache, kept = attention(norm("attn_norm")(h), cache, layer, positions, angles)
        h = h + mixed
        h = h + feed_forward(self.config, self.dtype, "mlp")(norm("mlp_norm")(h))
        return (h, cache), kept


class Llama(nn.Module):
    """A decoder from tokens to logits.

    `apply({"params": p}, tokens)` maps int tokens [b, t] to float32 logits [b, t, V].
    `apply({"params": p}, tokens, cache)` returns `(logits, cache)`. The tokens are at positions
    cache.length ... cache.length + t - 1, which must fit in the cache. A traced length cannot be
    checked; beyond the end, JAX would overwrite the last slots.

    Attributes:
      config: the architecture.
      dtype: dtype of activations and matmuls; softmax, norms and logits are float32.
      remat: whether each block is recomputed in the backward pass instead of keeping its
        activations; or a policy of `jax.checkpoint_policies` that selects what to keep.
    """

    config: LlamaConfig
    dtype: DTypeLike = jnp.float32
    remat: bool | Callable[..., bool] = False

    def setup(self):
        c = self.config
        policy = self.remat if callable(self.remat) else None
        block = nn.remat(Block, prevent_cse=False, policy=policy) if self.remat else Block
        self.embed = Embed(c.vocab_size, c.d_model, dtype=self.dtype)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.n_layers,
        )(c, self.dtype)
        self.norm = nn.RMSNorm(c.norm_eps, dtype=self.dtype)
        if not c.tie_embeddings:
            self.head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype)

    def __call__(self, tokens, cache: AnyCache | None = None, layers: Callable | None = None):
        """Return the logits, and the updated cache if one is given.

        Args:
          tokens: int [b, t].
          cache: the cache, or None.
          layers: function that runs in place of the stack of layers, with its arguments and
            results.
        """
        if cache is not None and tokens.shape[1] > cache.size:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit in a cache of size {cache.size}; "
                f"make a larger one with init_cache"
            )
        start = 0 if cache is None else cache.length
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        angles = rotation_angles(self.config, positions)
        numbers = jnp.arange(self.config.n_layers)
        carry = (self.embed(tokens), cache)
        (h, cache), kept = (layers or self.layers)(carry, numbers, positions, angles)
        logits = self.logits(h)
        if cache is None:
            return logits
        return logits, cache.advanced(tokens.shape[1], kept, self.config)

    def logits(self, h):
        """Apply the final norm and the output matrix: h [b, t, d] -> float32 [b, t, V].

        Args:
          h: the residual stream after the last layer.
        """
        h = self.norm(h)
        out = self.embed.attend(h) if self.config.tie_embeddings else self.head(h)
        return out.astype(jnp.float32)


def apply(model: Llama, params, tokens, cache: AnyCache | None = None):
    """Run the model on its inner "params" tree.

    Args:
      model: the model.
      params: inner "params" tree, with layers stacked or unstacked (`jaxquant.ptq.unstack`).
      tokens: int [b, t].
      cache: the cache, such as that of `init_cache`, or None.
    Returns:
      float32 logits [b, t, V]; with a cache, (logits, cache). For unstacked layers the returned
      cache is unstacked too.
    """
    if not is_apart(params, "layers"):
        return model.apply({"params": params}, tokens, cache)
    block = Block(model.config, model.dtype)

    def in_turn(carry, _, positions, angles):
        kept = []
        for i, layer in enumerate(layers_of(params, "layers")):
            carry, of_layer = block.apply({"params": layer}, carry, i, positions, angles)
            kept.append(of_layer)
        return carry, _after(carry[0], jax.tree.map(lambda *a: jnp.stack(a), *kept))

    rest = {name: value for name, value in params.items() if name != "layers"}
    cache = None if cache is None else cache.apart()
    return model.apply({"params": rest}, tokens, cache, in_turn)


def check_tokens(tokens: ArrayLike | Sequence[int], vocab_size: int) -> None:
    """Raise ValueError for token ids that have no row in the embedding.

    JAX would return NaN for ids that are too large and another token's row for negative ones.
    Traced ids pass, since their values are not known.

    Args:
      tokens: token ids, of any shape.
      vocab_size: number of rows of the embedding.
    """
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, got {ids.dtype}")
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids.max() if ids.min() >= 0 else ids.min()
        raise ValueError(
            f"token ids must lie in [0, {vocab_size}), the embedding's rows, got {wrong}; "
            f"encode the text with the tokenizer that belongs to this model"
        )


def _after(h, kept):
    """Return `kept` with an artificial dependence on h.

    XLA updates a cache in place only if it sees that nothing reads it later; otherwise every step
    copies the whole cache. XLA drops an optimization barrier before this analysis, so the
    dependence is a select whose condition it cannot evaluate.
    """
    never = h.ravel()[0] > jnp.inf
    return jax.tree.map(lambda a: jnp.where(never, jnp.zeros_like(a), a), kept)


def stacked(params):
    """Return the params with stacked layers, stacking them if necessary (`jaxquant.ptq.unstack`).

    Args:
      params: inner "params" tree.
    """
    return restack(params, "layers") if is_apart(params, "layers") else params
