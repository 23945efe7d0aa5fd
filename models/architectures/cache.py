"""Key-value caches: unquantized, packed, and simulated.

A cache passes through the layers: `attend(layer, ...)` lets the queries of a layer's new tokens see
those tokens and the cached ones. A cache may store the new tokens then, or after the last layer in
`advanced`, which receives from all layers what their `attend` returned to be kept.
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
    """Unquantized keys and values of the tokens seen so far.

    For unstacked layers, k and v are tuples of L arrays [b, n_kv_heads, S, head_dim]: a step then
    writes one slot of each in place, whereas a layer would be copied out of a stack.

    Attributes:
      k, v: [L, b, n_kv_heads, S, head_dim].
      length: int32 scalar, number of tokens seen so far.
      end: position from which tokens are padding, or None.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    length: jax.Array
    end: jax.Array | None = None

    @property
    def size(self) -> int:
        """S, the maximum number of tokens."""
        return self.k[0].shape[2]

    def until(self, end: jax.Array | None) -> "Cache":
        """Return a cache that treats tokens at position `end` or later as padding.

        Args:
          end: the position, int32 scalar; None if no further token is padding.
        """
        return self._replace(end=end)

    def apart(self) -> "Cache":
        """Return the cache in the form for unstacked layers."""
        return self._replace(k=tuple(self.k), v=tuple(self.v))

    def attend(self, layer, q, k, v, positions, config: LlamaConfig):
        """Return the attention output, the cache, and what `advanced` is to receive.

        Args:
          layer: number of the layer.
          q: queries [b, t, heads, hd] of the new tokens.
          k, v: their keys and values [b, kv, t, hd].
          positions: their positions, int32 [t].
          config: the architecture.
        """
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
        """Return the cache after a call of `tokens` tokens.

        Keys of padding lie beyond the end, and every slot is overwritten before a later query sees
        it.

        Args:
          tokens: number of tokens, padding included.
          kept: unused, since `attend` stores keys and values.
          config: the architecture.
        """
        return self._replace(length=_advanced(self, tokens))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Quantized keys and values of stacked layers; also used for unstacked layers.

    The tokens of one call see each other unrounded. They see earlier tokens as the cache holds
    them: the first few and the recent ones unrounded, the others rounded. A prefill therefore sees
    everything unrounded, as in KIVI.

    Attributes:
      past: the arrays; see `pallas_kernels.codecs.kv_layout.Past`.
      length: int32 scalar, number of tokens seen so far.
      form: the format of keys and values.
      size: maximum number of tokens.
      end: as in `Cache.until`.
    """

    past: Past
    length: jax.Array
    form: KVFormat = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    end: jax.Array | None = None

    def until(self, end: jax.Array | None) -> "PackedCache":
        """As `Cache.until`; padding is stored neither in the codes nor among the recent tokens."""
        return dataclasses.replace(self, end=end)

    def apart(self) -> "PackedCache":
        """Return the cache itself, since its kernel reads a layer in place from the stack."""
        return self

    def attend(self, layer, q, k, v, positions, config: LlamaConfig):
        """As `Cache.attend`; k and v are to be kept."""
        turns = _radians(config) if self.form.rope == "pre" else None
        return kv_attention(q, k, v, self.past, layer, self.length, turns), self, (k, v)

    def advanced(self, tokens: int, kept: tuple, config: LlamaConfig) -> "PackedCache":
        """As `Cache.advanced`; kept are the keys and values [L, b, kv, t, hd] of the call.

        Storing all layers at once takes one small program, and no layer sees a cache already
        modified.
        """
        after = _advanced(self, tokens)
        past = kv_cache.store(self.past, *kept, self.length, after, self.form, _radians(config))
        return dataclasses.replace(self, past=past, length=after)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantizedCache:
    """Simulates, on whole sequences, what each query would see in a packed cache.

    All keys and values are kept unrounded. If a sequence comes in several calls, the keys of each
    call are rounded together with the earlier ones, whose groups they complete.

    Attributes:
      form: the format of keys and values.
      strict: if True, every query sees all tokens rounded except the sinks and the last
        `form.window` tokens up to and including its own. If False, it sees rounded only the tokens
        that would be in the codes in token-by-token decoding.
      past: keys and values [L, b, kv, length, hd] of earlier calls, or None.
    """

    form: KVFormat = dataclasses.field(metadata={"static": True})
    strict: bool = dataclasses.field(metadata={"static": True}, default=True)
    past: tuple[jax.Array, jax.Array] | None = None

    size = float("inf")

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        return 0 if self.past is None else self.past[0].shape[3]

    def apart(self) -> "FakeQuantizedCache":
        """Return the cache itself."""
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
    """Return tokens [..., t, hd] appended to earlier ones."""
    return jnp.concatenate([held, new], axis=-2)


AnyCache = Cache | PackedCache | FakeQuantizedCache


def init_cache(
    config: LlamaConfig,
    batch: int,
    size: int,
    dtype: DTypeLike = jnp.float32,
    kv: KVFormat | None = None,
) -> Cache | PackedCache:
    """Return an empty cache with room for `size` tokens in each of `batch` sequences.

    Args:
      config: the architecture.
      batch: number of sequences.
      size: maximum number of tokens per sequence.
      dtype: dtype of unquantized keys and values.
      kv: format in which keys and values are quantized; None leaves all unquantized.
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
