"""What a model keeps of the tokens it has seen: keys and values as they are, or quantized.

A cache goes from layer to layer: `attend(layer, ...)` lets the queries of a layer's new tokens see
them and what is kept of those before. It may keep the new ones then, or, after the last layer, in
`advanced`, which gets of all layers what `attend` gave to be kept.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.formats import kv_cache
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.rope import frequencies
from pallas_kernels.attention import attention
from pallas_kernels.codecs.kv_layout import Past, retired
from pallas_kernels.kv_attention import kv_attention


class Cache(NamedTuple):
    """Keys and values seen so far; k, v: [L, b, n_kv_heads, S, head_dim], length: int32 scalar.

    Where layers are apart, k and v are tuples of L arrays [b, n_kv_heads, S, head_dim]: a step then
    writes one slot of each in place, where a layer would be copied out of a stack.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    length: jax.Array
    end: jax.Array | None = None

    @property
    def size(self) -> int:
        """The most tokens, S."""
        return self.k[0].shape[2]

    def until(self, end: jax.Array | None) -> "Cache":
        """From now on tokens at position `end` or after it are padding; None: no more."""
        return self._replace(end=end)

    def apart(self) -> "Cache":
        """As layers apart want it."""
        return self._replace(k=tuple(self.k), v=tuple(self.v))

    def attend(self, layer, q, k, v, positions, config: LlamaConfig):
        """For queries [b, t, heads, hd] and new keys and values [b, kv, t, hd]: mixed values, the
        cache, and what `advanced` is to get."""
        if isinstance(self.k, tuple):
            put = lambda held, new: jax.lax.dynamic_update_slice(
                held[layer], new.astype(held[layer].dtype), (0, 0, positions[0], 0)
            )
            keys, values = put(self.k, k), put(self.v, v)
            among = lambda held, new: (*held[:layer], new, *held[layer + 1 :])
            kept = self._replace(k=among(self.k, keys), v=among(self.v, values))
            return attention(q, keys, values, positions), kept, None
        put = lambda held, new: jax.lax.dynamic_update_slice(
            held, new.astype(held.dtype)[None], (layer, 0, 0, positions[0], 0)
        )
        kept = self._replace(k=put(self.k, k), v=put(self.v, v))
        return attention(q, kept.k[layer], kept.v[layer], positions), kept, None

    def advanced(self, tokens: int, kept: None, config: LlamaConfig) -> "Cache":
        """After a call of so many. The padding's keys lie after the end: no later query sees a
        slot before overwriting it."""
        return self._replace(length=_advanced(self, tokens))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Quantized keys and values; a stack of layers, also for layers that are apart.

    The tokens of one call see each other as they are, and those before as the cache holds them: the
    first few and the recent ones as they are, the others rounded. So a prefill sees everything as
    it is, as in KIVI.

    Attributes:
      past: the arrays; see `pallas_kernels.codecs.kv_layout.Past`.
      length: int32 scalar, tokens seen so far.
      form: how keys and values are kept.
      size: the most tokens.
      end: as of `Cache.until`.
    """

    past: Past
    length: jax.Array
    form: KVFormat = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    end: jax.Array | None = None

    def until(self, end: jax.Array | None) -> "PackedCache":
        """As `Cache.until`; padding enters neither the codes nor the recent tokens."""
        return dataclasses.replace(self, end=end)

    def apart(self) -> "PackedCache":
        """Itself: its kernel reads a layer where it lies in the stack."""
        return self

    def attend(self, layer, q, k, v, positions, config: LlamaConfig):
        """As `Cache.attend`; k and v are to be kept."""
        turns = _radians(config) if self.form.rope == "pre" else None
        return kv_attention(q, k, v, self.past, layer, self.length, turns), self, (k, v)

    def advanced(self, tokens: int, kept: tuple, config: LlamaConfig) -> "PackedCache":
        """As `Cache.advanced`; kept: keys and values [L, b, kv, t, hd] of the call.

        All layers at once: it is one small program, and what a layer sees was not touched yet.
        """
        after = _advanced(self, tokens)
        past = kv_cache.store(self.past, *kept, self.length, after, self.form, _radians(config))
        return dataclasses.replace(self, past=past, length=after)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantizedCache:
    """Shows each query of a whole sequence what a packed cache would show it.

    It keeps everything as it is: of a sequence that comes in several calls, the keys of each are
    rounded with those before, whose groups they fill.

    Attributes:
      form: how keys and values would be kept.
      strict: every query sees all tokens rounded, its own too, but for the sinks and the last
        `form.window` before and with it; else those that would be in the codes by then, were the
        tokens decoded one by one.
      past: keys and values [L, b, kv, length, hd] of the calls before, if any.
    """

    form: KVFormat = dataclasses.field(metadata={"static": True})
    strict: bool = dataclasses.field(metadata={"static": True}, default=True)
    past: tuple[jax.Array, jax.Array] | None = None

    size = float("inf")

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.past is None else self.past[0].shape[3]

    def apart(self) -> "FakeQuantizedCache":
        """Itself."""
        return self

    def attend(self, layer, q, k, v, positions, config: LlamaConfig):
        """As `Cache.attend`; k and v are to be kept."""
        form, new = self.form, (k, v)
        if self.past is not None:
            k, v = (_appended(of[layer], a) for of, a in zip(self.past, new, strict=True))
        form.check(q.shape[3])
        rows = q.astype(jnp.float32).reshape(*q.shape[:2], k.shape[1], -1, q.shape[3])
        rows *= q.shape[3] ** -0.5
        scores = lambda keys: jnp.einsum("btkrd,bksd->bkrts", rows, keys.astype(jnp.float32))
        query, key = positions[:, None], jnp.arange(k.shape[2])
        if self.strict:
            exact = key > query - form.window
        else:
            exact = key >= retired(query, form.window, form.group)
        keys = kv_cache.rounded_keys(k, form, _radians(config))
        seen = jnp.where(exact, scores(k), scores(keys))
        weights = jax.nn.softmax(jnp.where(key <= query, seen, -jnp.inf), axis=-1)
        mix = lambda w, values: jnp.einsum("bkrts,bksd->btkrd", w, values.astype(jnp.float32))
        mixed = mix(jnp.where(exact, weights, 0), v)
        mixed += mix(jnp.where(exact, 0, weights), kv_cache.rounded_values(v, form))
        return mixed.reshape(q.shape).astype(q.dtype), self, new

    def advanced(self, tokens: int, kept: tuple, config: LlamaConfig) -> "FakeQuantizedCache":
        """As `PackedCache.advanced`."""
        past = kept if self.past is None else tuple(map(_appended, self.past, kept))
        return dataclasses.replace(self, past=past)


def _appended(held: jax.Array, new: jax.Array) -> jax.Array:
    """Tokens [..., t, hd] behind others."""
    return jnp.concatenate([held, new], axis=-2)


AnyCache = Cache | PackedCache | FakeQuantizedCache


def init_cache(
    config: LlamaConfig,
    batch: int,
    size: int,
    dtype: DTypeLike = jnp.float32,
    kv: KVFormat | None = None,
) -> Cache | PackedCache:
    """An empty cache with room for `size` tokens in each of `batch` sequences.

    Args:
      dtype: of what is kept as it is.
      kv: quantize keys and values in this format; None keeps all as they are.
    Raises:
      ValueError: the format does not fit the model's heads.
    """
    nothing = jnp.zeros((), jnp.int32)
    stack = (config.n_layers, batch, config.n_kv_heads)
    if kv is not None:
        past = kv_cache.empty(kv, stack, config.head_dim, size, dtype)
        return PackedCache(past, nothing, kv, size)
    zeros = jnp.zeros((*stack, size, config.head_dim), dtype)
    return Cache(zeros, zeros, nothing)


def _radians(config: LlamaConfig) -> jax.Array:
    return jnp.asarray(frequencies(config), jnp.float32)


def _advanced(cache: Cache | PackedCache, tokens: int) -> jax.Array:
    after = cache.length + tokens
    return after if cache.end is None else jnp.minimum(after, cache.end)
