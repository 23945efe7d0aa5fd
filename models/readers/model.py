"""A language model in memory: architecture, parameters and tokenizer, with its pure functions."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.architectures.cache import AnyCache, FakeQuantizedCache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama, apply, check_tokens, stacked
from jaxquant_models.architectures.prefix import exact_prefix
from jaxquant_models.readers.tokenizer import Tokenizer

Apply = Callable[[PyTree, jax.Array], jax.Array]
ApplyCached = Callable[[PyTree, jax.Array, AnyCache], tuple[jax.Array, AnyCache]]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      name: what it was loaded from, for reports.
      config: the architecture.
      params: inner "params" tree of jax arrays; see `architectures.llama` for the paths.
      tokenizer: its tokenizer.
      dtype: dtype of parameters and activations.
      prefix: tokens at the beginning of a text whose activations are not rounded, see
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
        """(params, tokens int [b, t]) to logits float32 [b, t, V]; pure."""
        return _functions(self.config, jnp.dtype(self.dtype), self.prefix)[0]

    @property
    def apply_cached(self) -> ApplyCached:
        """The same with a key-value cache (`init_cache`), for `generate`."""
        return _functions(self.config, jnp.dtype(self.dtype), self.prefix)[1]

    def apply_kv(self, kv: KVFormat, strict: bool = True) -> Apply:
        """`apply_fn` with keys and values rounded as in a packed cache, to measure what that costs.

        A sequence given whole would be seen as it is (a prefill is): so its perplexity says nothing
        of the cache. Here every query sees rounded keys and values. An exact prefix comes in a call
        of its own: the ranges of the keys that its tokens see are theirs.

        Args:
          strict: all of them, its own too, but for the format's sinks and last `window`; else those
            that are in the codes when tokens are decoded one by one, which are up to a group fewer.
        Raises:
          ValueError: the format does not fit the model's heads.
        """
        kv.check(self.config.head_dim)
        return _rounding(self.config, jnp.dtype(self.dtype), self.prefix, kv, strict)

    def apply_training(self) -> Apply:
        """`apply_fn` that keeps only products for its backward pass: half the memory."""
        llama = Llama(self.config, self.dtype, remat=jax.checkpoint_policies.dots_saveable)
        run = lambda params, tokens: llama.apply({"params": params}, tokens)
        if self.prefix:
            run, _ = exact_prefix(llama, self.prefix)
        return lambda params, tokens: run(stacked(params), tokens)

    def sites(self) -> dict[str, jq.Site]:
        """Where the function uses the weights (`jaxquant.sites`)."""
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return jq.sites(self.apply_fn, self.params, tokens)

    @property
    def bos_ids(self) -> list[int]:
        """The token that every text begins with, [bos], or [] for a model trained without."""
        first = self.tokenizer.encode("", special=True)[:1]
        return first if first == [self.config.bos_id] else []


@functools.cache
def _functions(config: LlamaConfig, dtype: np.dtype, prefix: int) -> tuple[Apply, ApplyCached]:
    """One pair for each architecture: jit keeps its keys alive, and must not keep weights."""
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
