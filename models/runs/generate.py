"""Text generation: prefill, then decoding in a `lax.while_loop`; the cache may outlive both."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxquant.core.hosts import on_host
from jaxquant.formats.kv_cache import KVFormat
from jaxquant.ptq.layer_stacks import is_apart
from jaxquant_models.architectures.cache import AnyCache, Cache, init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import check_tokens
from jaxquant_models.readers.model import ApplyCached
from jaxquant_models.runs.measuring import Phase

SMALLEST_BUCKET = 32


class _State(NamedTuple):
    step: jax.Array  # number of tokens generated so far
    token: jax.Array  # the last token
    tokens: jax.Array  # int32 [room], all tokens
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
    session = Session(apply_cached, params, config, cache_dtype, kv)
    parts = session.stream(prompt_ids, max_tokens, temperature, key)
    return [token for part in parts for token in part]


class Session:
    """A text that grows: generation that keeps the keys and values of the tokens it has seen.

    Attributes:
      prefill: what the prefills have taken.
      decode: what the decode steps have taken.

    Args:
      apply_cached, params, config, cache_dtype, kv: as in `generate`.
      size: minimum number of tokens for which the cache has room.
      keeps: whether a text that begins like the previous one is processed from where they differ,
        on the first device; otherwise every call begins anew.
    """

    def __init__(
        self,
        apply_cached: ApplyCached,
        params: PyTree,
        config: LlamaConfig,
        cache_dtype: DTypeLike = jnp.float32,
        kv: KVFormat | None = None,
        *,
        size: int = 0,
        keeps: bool = False,
    ) -> None:
        self.apply_cached, self.params, self.config = apply_cached, params, config
        self.size, self.keeps, self.prefill, self.decode = size, keeps, Phase(), Phase()
        # What a program returns may be committed to a device. A first cache that is not would make
        # JAX compile the prefill twice.
        self._device = jax.devices()[0] if keeps else None
        self._make = lambda size: init_cache(config, 1, size, cache_dtype, kv)
        self._cache: AnyCache | None = None
        self._held: list[int] = []  # the tokens whose keys and values the cache holds

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int = 128,
        temperature: float = 0.0,
        key: jax.Array | None = None,
        stride: int | None = None,
    ) -> Iterator[list[int]]:
        """Yield the new token ids of a continuation as they are generated, without the stop token.

        Args:
          prompt_ids: the whole text, including what earlier calls have processed.
          max_tokens, temperature, key: as in `generate`.
          stride: maximum number of tokens between two results; by default all come at once.
        Raises:
          ValueError: as `generate`.
        """
        prompt = [int(i) for i in prompt_ids]
        _check(self.config, prompt, max_tokens, temperature, key)
        if max_tokens == 0:
            return
        heat, key = jnp.float32(temperature), jax.random.key(0) if key is None else key
        room, count = stride or _bucket(max_tokens), 0
        new, key = self._prefilled(prompt, max_tokens, heat, key)
        while True:
            count += len(new)
            ended = new[-1] in self.config.eos_ids
            if part := new[:-1] if ended else new:
                yield part
            if ended or count == max_tokens:
                return
            new, key = self._decoded(new[-1], min(room, max_tokens - count), room, heat, key)

    def _prefilled(self, prompt: list[int], max_tokens: int, heat, key) -> tuple[list[int], Any]:
        """Process the tokens of the prompt that the cache lacks; return [next token] and a key."""
        new = prompt[self._kept(prompt, max_tokens) :]
        tokens = np.zeros((1, _bucket(len(new))), np.int32)
        tokens[0, : len(new)] = new
        cache, self._cache = self._cache, None  # the program consumes it
        with self.prefill.timed():
            token, self._cache, key = _prefill(
                self.apply_cached, self.params, tokens, jnp.int32(len(new)), heat, key, cache=cache
            )
            first = [int(on_host(token))]
        self.prefill.tokens += len(new)
        self._held = prompt
        return first, key

    def _decoded(self, last: int, count: int, room: int, heat, key) -> tuple[list[int], Any]:
        """Return at least one and at most `count` further tokens, and a key."""
        stops = jnp.asarray(self.config.eos_ids, jnp.int32)
        cache, self._cache = self._cache, None
        with self.decode.timed():
            tokens, steps, self._cache, key = _decode(
                self.apply_cached, room, self.params, jnp.int32(last), jnp.int32(count), stops,
                heat, key, cache=cache,
            )  # fmt: skip
            new = on_host(tokens)[: int(on_host(steps))].tolist()
        self.decode.tokens += len(new)
        self._held = [*self._held, last, *new[:-1]]
        return new, key

    def _kept(self, prompt: list[int], max_tokens: int) -> int:
        """Return how many tokens the cache holds already, making one where none has the room."""
        kept = self._common(prompt) if self.keeps and self._cache is not None else 0
        needed = max(kept + _bucket(len(prompt) - kept), len(prompt) + max_tokens)
        if kept and needed <= self._cache.size:
            if kept < len(self._held):  # the slots of the others are written again before use
                length = jax.device_put(np.int32(kept), self._device)
                self._cache = self._cache._replace(length=length)
            return kept
        if kept:
            self.size = 2 * needed  # a text that grows needs a larger cache only now and then
        self._cache = None  # frees the memory of the old one first
        cache = self._make(max(self.size, _bucket(len(prompt)) + _bucket(max_tokens)))
        cache = cache.apart() if is_apart(self.params, "layers") else cache
        cache = jax.tree.map(jnp.copy, cache)  # a program consumes no array twice
        self._cache = jax.device_put(cache, self._device)
        return 0

    def _common(self, prompt: list[int]) -> int:
        """Return how many leading tokens can stay in the cache; at least one is left to process."""
        shared = min(len(prompt) - 1, len(self._held))
        pairs = enumerate(zip(prompt[:shared], self._held, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), shared)
        rounded = not isinstance(self._cache, Cache)  # tokens cannot be removed from its codes
        return 0 if rounded and common < len(self._held) else common


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _prefill(apply_cached, params, tokens, count, temperature, key, *, cache):
    """Return the token after `count` tokens, the cache and a key."""
    logits, cache = apply_cached(params, tokens, cache.until(cache.length + count))
    key, now = jax.random.split(key)
    return _pick(logits[0, count - 1], temperature, now), cache.until(None), key


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _decode(apply_cached, room, params, token, count, stops, temperature, key, *, cache):
    """Return up to `count` tokens, int32 [room], the number of valid ones, the cache and a key."""

    def unfinished(s: _State):
        return (s.step < count) & ~jnp.any(s.token == stops)

    def advance(s: _State) -> _State:
        logits, cache = apply_cached(params, s.token[None, None], s.cache)
        key, now = jax.random.split(s.key)
        token = _pick(logits[0, 0], temperature, now)
        return _State(s.step + 1, token, s.tokens.at[s.step].set(token), cache, key)

    start = _State(jnp.int32(0), token, jnp.zeros(room, jnp.int32), cache, key)
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.tokens, end.step, end.cache, end.key


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
