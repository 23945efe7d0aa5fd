"""Text generation: one prefill, then the whole decode loop in a single `lax.while_loop`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.architectures.cache import AnyCache, init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import check_tokens
from jaxquant_models.readers.model import ApplyCached

SMALLEST_BUCKET = 32


class _State(NamedTuple):
    step: jax.Array  # number of tokens generated so far
    token: jax.Array  # the last token
    tokens: jax.Array  # int32 [bucket], all tokens
    cache: AnyCache
    key: jax.Array


def generate(
    apply_cached: ApplyCached,
    params: PyTree,
    config: LlamaConfig,
    prompt_ids: Sequence[int],
    max_tokens: int = 128,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    cache_dtype: DTypeLike = jnp.float32,
    kv: KVFormat | None = None,
) -> list[int]:
    """Return a model's continuation of a prompt.

    The lengths of prompt and answer are rounded up to powers of two (at least 32). One compilation
    is needed for each pair of these and each `apply_cached` object, so pass the same function
    again, not a new lambda.

    Args:
      apply_cached: pure function (params, tokens int32 [1, t], cache) -> (logits [1, t, V], cache),
        such as `Model.apply_cached` or that of a quantized model.
      params: its parameters, of any structure.
      config: the architecture: sizes of the cache, stop tokens and maximum length.
      prompt_ids: at least one token id.
      max_tokens: maximum number of new tokens; a token of `config.eos_ids` ends the text earlier.
      temperature: 0 selects the most likely token; otherwise samples softmax(logits / temperature).
      key: PRNG key, required if temperature > 0.
      cache_dtype: dtype of unquantized keys and values.
      kv: format in which keys and values are quantized; None leaves all unquantized. The tokens of
        the prompt see each other unrounded; the new tokens see them as the cache holds them.
    Returns:
      The new token ids, without the prompt and without the stop token.
    Raises:
      ValueError: an argument is out of range, prompt and answer exceed config.max_position, or the
        heads do not fit `kv`.
    """
    _check(config, prompt_ids, max_tokens, temperature, key)
    if max_tokens == 0:
        return []
    length = len(prompt_ids)
    prompt = jnp.zeros((1, _bucket(length)), jnp.int32).at[0, :length].set(jnp.asarray(prompt_ids))
    tokens, count = _run(
        apply_cached,
        config,
        _bucket(max_tokens),
        jnp.dtype(cache_dtype),
        params,
        prompt,
        jnp.int32(length),
        jnp.int32(max_tokens),
        jnp.float32(temperature),
        jax.random.key(0) if key is None else key,
        kv=kv,
    )
    answer = tokens[: int(count)].tolist()
    return answer[:-1] if answer[-1] in config.eos_ids else answer


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="kv")
def _run(
    apply_cached, config, room, cache_dtype, params, prompt, length, max_tokens, temperature, key,
    kv=None,
):  # fmt: skip
    """Return the tokens, int32 [room], and the number of them that are valid."""
    cache = init_cache(config, 1, prompt.shape[1] + room, cache_dtype, kv)
    logits, cache = apply_cached(params, prompt, cache.until(length))
    cache = cache.until(None)
    key, now = jax.random.split(key)
    first = _pick(logits[0, length - 1], temperature, now)
    tokens = jnp.zeros(room, jnp.int32).at[0].set(first)
    stops = jnp.asarray(config.eos_ids, jnp.int32)

    def unfinished(s: _State):
        return (s.step < max_tokens) & ~jnp.any(s.token == stops)

    def advance(s: _State) -> _State:
        logits, cache = apply_cached(params, s.token[None, None], s.cache)
        key, now = jax.random.split(s.key)
        token = _pick(logits[0, 0], temperature, now)
        return _State(s.step + 1, token, s.tokens.at[s.step].set(token), cache, key)

    start = _State(jnp.int32(1), first, tokens, cache, key)
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.tokens, end.step


def _pick(logits, temperature, key):
    """Return a token id, int32 scalar, selected from logits [V]."""

    def greedy():
        return jnp.argmax(logits).astype(jnp.int32)

    def sample():
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sample, greedy)


def _bucket(n: int) -> int:
    """Return the smallest power of two that is at least n and at least SMALLEST_BUCKET."""
    return max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def _check(config: LlamaConfig, prompt_ids, max_tokens, temperature, key) -> None:
    length = len(prompt_ids)
    if length == 0:
        raise ValueError("the prompt is empty; give at least one token, such as config.bos_id")
    check_tokens(prompt_ids, config.vocab_size)
    if max_tokens < 0:
        raise ValueError(f"max_tokens must not be negative, got {max_tokens}")
    if length + max_tokens > config.max_position:
        raise ValueError(
            f"prompt ({length}) and max_tokens ({max_tokens}) exceed the model's "
            f"{config.max_position} positions; shorten one of them"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError("temperature > 0 samples, so it needs a key: jax.random.key(seed)")
