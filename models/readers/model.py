"""A language model in memory: architecture, parameters, tokenizer and pure functions."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.core.products import PRODUCT
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.architectures.cache import AnyCache, FakeQuantizedCache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama, apply, check_tokens, stacked
from jaxquant_models.architectures.prefix import exact_prefix
from jaxquant_models.readers.tokenizer import Tokenizer

Apply = Callable[[PyTree, jax.Array], jax.Array]
ApplyCached = Callable[[PyTree, jax.Array, AnyCache], tuple[jax.Array, AnyCache]]

KEPT = 2**31  # bytes of results of products that training keeps for the backward pass


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded language model.

    Attributes:
      name: the spec it was loaded from, used in reports.
      config: the architecture.
      params: inner "params" tree of jax arrays; see `architectures.llama` for the paths.
      tokenizer: the tokenizer.
      dtype: dtype of parameters and activations.
      prefix: number of tokens at the beginning of a text whose activations are not rounded; see
        `architectures.prefix`.
    """

    name: str
    config: LlamaConfig
    params: PyTree
    tokenizer: Tokenizer
    dtype: DTypeLike = jnp.float32
    prefix: int = 0

    @property
    def apply_fn(self) -> Apply:
        """The pure function (params, tokens int [b, t]) -> float32 logits [b, t, V]."""
        return _functions(self.config, jnp.dtype(self.dtype), self.prefix)[0]

    @property
    def apply_cached(self) -> ApplyCached:
        """The same with a key-value cache (`init_cache`), as `generate` uses it."""
        return _functions(self.config, jnp.dtype(self.dtype), self.prefix)[1]

    def apply_kv(self, kv: KVFormat, strict: bool = True) -> Apply:
        """Return `apply_fn` with keys and values rounded as in a packed cache.

        It measures the effect of the cache format. A packed cache leaves the tokens of one call
        unrounded among themselves, as in a prefill, so the perplexity of a sequence passed in one
        call would not reflect the format. Here every query sees rounded keys and values. An exact
        prefix is processed in a call of its own, so its keys are rounded in ranges computed from
        them alone.

        Args:
          kv: the cache format.
          strict: if True, every query sees all tokens rounded except the format's sinks and the
            last `window` tokens up to and including its own. If False, it sees rounded only the
            tokens that would be in the codes in token-by-token decoding, which are up to a group
            fewer.
        Raises:
          ValueError: the format does not fit the model's heads.
        """
        kv.check(self.config.head_dim)
        return _rounding(self.config, jnp.dtype(self.dtype), self.prefix, kv, strict)

    def apply_training(self, tokens: int = 0) -> Apply:
        """Return `apply_fn` with rematerialization, for training.

        Only the results of matrix products are kept for the backward pass, which halves the memory.
        If they would take more than `KEPT` bytes, only the inputs of the layers are kept, and every
        layer is computed again.

        Args:
          tokens: number of tokens of a batch, [b, t] flattened; 0 if they are few.
        """
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(PRODUCT)
        )
        c = self.config
        widths = 3 * c.d_model + 2 * c.n_kv_heads * c.head_dim + 2 * c.active_d_ff
        scores = c.n_heads * min(tokens, c.max_position)
        kept = 4 * tokens * c.n_layers * (widths + scores)
        llama = Llama(c, self.dtype, remat=policy if kept <= KEPT else True)
        run = lambda params, tokens: llama.apply({"params": params}, tokens)
        if self.prefix:
            run, _ = exact_prefix(llama, self.prefix)
        return lambda params, tokens: run(stacked(params), tokens)

    def sites(self) -> dict[str, jq.core.Site]:
        """Return where the function uses the weights (`jaxquant.sites`)."""
        return dict(self._sites)

    @functools.cached_property
    def _sites(self) -> dict[str, jq.core.Site]:
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return jq.sites(self.apply_fn, self.params, tokens)

    @property
    def bos_ids(self) -> list[int]:
        """[bos], the token that every text begins with, or [] if the model was trained without."""
        first = self.tokenizer.encode("", special=True)[:1]
        return first if first == [self.config.bos_id] else []


@functools.cache
def _functions(config: LlamaConfig, dtype: np.dtype, prefix: int) -> tuple[Apply, ApplyCached]:
    """Return one pair of functions per architecture.

    jit keeps its functions alive, so they must not hold weights.
    """
    model = Llama(config, dtype)

    def apply_fn(params, tokens):
        check_tokens(tokens, config.vocab_size)
        return apply(model, params, tokens)

    def apply_cached(params, tokens, cache):
        check_tokens(tokens, config.vocab_size)
        return apply(model, params, tokens, cache)

    return exact_prefix(model, prefix) if prefix else (apply_fn, apply_cached)


@functools.cache
def _rounding(
    config: LlamaConfig, dtype: np.dtype, prefix: int, kv: KVFormat, strict: bool
) -> Apply:
    apply_cached = _functions(config, dtype, prefix)[1]

    def apply_fn(params, tokens):
        return apply_cached(params, tokens, FakeQuantizedCache(kv, strict))[0]

    return apply_fn
