"""Quantized key-value caches: their format, and how groups of tokens are rounded.

Keys have a scale per channel, since a few of their channels are large, and the same ones for all
tokens. Values have no such channels and get scales per token (KIVI, arXiv:2402.02750). Keys may be
rounded before RoPE (KVQuant, arXiv:2401.18079): RoPE moves outliers between the two channels of a
pair, whereas channels before RoPE keep their ranges. The first tokens (attention sinks) receive
most of the attention and have keys unlike all others. They stay in floating point, and do not
enter the range of their group.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float16, Int32

from jaxquant.core.fields import check_fields
from pallas_kernels.codecs import kv_layout, layout

ROPE = ("pre", "post")
_LARGEST = float(jnp.finfo(jnp.float16).max)


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored; hashable and compared by value.

    Attributes:
      bits: number of bits per code: 2, 3, 4 or 8.
      rope: "pre" or "post": whether keys are rounded before or after RoPE.
      window: minimum number of recent tokens that stay in floating point, a multiple of `group`.
        Between `window` and `window + group - 1` do, since tokens are quantized by whole groups.
      sinks: number of first tokens that stay in floating point for good.
      group: number of tokens that share a range of a key channel; their codes must fill whole
        words.
      channels: number of channels that share a range of a token's values.

    Raises:
      ValueError: a field has an invalid value.

    >>> KVFormat(3).bits_per_value
    4.0
    """

    bits: int = 4
    rope: str = "pre"
    window: int = 32
    sinks: int = 1
    group: int = 32
    channels: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits not in layout.BITS:
            raise ValueError(f"bits must be one of {layout.BITS}, got {self.bits}")
        if self.rope not in ROPE:
            raise ValueError(f"rope must be one of {ROPE}, got {self.rope!r}")
        whole = layout.unit(self.bits)[0]
        if self.group < 1 or self.group % whole:
            raise ValueError(
                f"group must be a positive multiple of {whole} tokens, which fill whole words at "
                f"{self.bits} bits, got {self.group}"
            )
        if self.channels < 1:
            raise ValueError(f"channels must be positive, got {self.channels}")
        if self.window < 0 or self.window % self.group:
            raise ValueError(
                f"window must be 0 or a multiple of the group, {self.group}, got {self.window}"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @property
    def bits_per_value(self) -> float:
        """The average number of bits per quantized key or value, including scales and offsets."""
        return self.bits + 32 * (1 / self.group + 1 / self.channels) / 2

    def bytes_per_token(self, layers: int, heads: int, head_dim: int) -> float:
        """Return the bytes of a token's quantized keys and values, including scales and offsets.

        Args:
          layers: number of layers.
          heads: number of key-value heads.
          head_dim: number of channels of a head.

        >>> KVFormat(4).bytes_per_token(layers=30, heads=3, head_dim=64)
        7200.0
        """
        return 2 * layers * heads * head_dim * self.bits_per_value / 8

    def check(self, head_dim: int) -> None:
        """Raise ValueError unless `channels` divides the number of channels of a head."""
        if head_dim % self.channels:
            raise ValueError(
                f"channels = {self.channels} must divide the {head_dim} channels of a head"
            )


def empty(
    form: KVFormat, shape: tuple[int, int, int], head_dim: int, size: int, dtype: DTypeLike
) -> kv_layout.Past:
    """Return a cache that holds no tokens, with room for `size`.

    Args:
      form: format of the cache.
      shape: (layers, sequences, key heads).
      head_dim: number of channels of a head.
      size: number of tokens to make room for.
      dtype: dtype of the tokens that stay in floating point.
    Raises:
      ValueError: the format does not fit heads of `head_dim` channels.

    >>> past = empty(KVFormat(4), (2, 1, 3), 64, 256, jnp.float32)
    >>> past.slots, past.key_codes.shape, past.value_scale.shape
    (224, (2, 1, 3, 28, 64), (2, 1, 3, 2, 224))
    """
    form.check(head_dim)
    slots = max(form.group, (size - form.window) // form.group * form.group)
    exact = lambda tokens: jnp.zeros((*shape, tokens, head_dim), dtype)
    codes = jnp.zeros((*shape, layout.words(slots, form.bits), head_dim), jnp.int32)
    per_group = jnp.zeros((*shape, slots // form.group, head_dim), jnp.float16)
    per_token = jnp.zeros((*shape, head_dim // form.channels, slots), jnp.float16)
    sink, ring = exact(form.sinks), exact(form.window + form.group)
    return kv_layout.Past(
        sink, sink, ring, ring, codes, per_group, per_group, codes, per_token, per_token
    )


def quantize_keys(
    keys: Float[Array, "*b t hd"], valid: Bool[Array, " t"], form: KVFormat
) -> tuple[Int32[Array, "*b w hd"], Float16[Array, "*b g hd"], Float16[Array, "*b g hd"]]:
    """Return codes, scales and offsets of whole groups of keys.

    `kv_layout.decode_keys` is the inverse.

    Args:
      keys: keys [..., t, head_dim]; `form.group` divides t.
      valid: bool [t], false for tokens that do not exist or are stored elsewhere, which do not
        enter the ranges.
      form: format of the cache.
    Returns:
      Packed int32 codes [..., words, head_dim], and float16 scales and offsets [..., groups,
      head_dim].
    """
    *batch, tokens, hd = keys.shape
    grouped = keys.astype(jnp.float32).reshape(*batch, -1, form.group, hd)
    codes, scale, offset = _rounded(grouped, valid.reshape(-1, form.group, 1), form.bits, axis=-2)
    packed = layout.pack(codes.reshape(*batch, tokens, hd), form.bits)
    return packed, scale.squeeze(-2), offset.squeeze(-2)


def quantize_values(
    values: Float[Array, "*b t hd"], form: KVFormat
) -> tuple[Int32[Array, "*b w hd"], Float16[Array, "*b c t"], Float16[Array, "*b c t"]]:
    """Return codes, scales and offsets of values.

    `pallas_kernels.codecs.kv_layout.decode_values` is the inverse.

    Args:
      values: values [..., t, head_dim]; `form.channels` divides head_dim.
      form: format of the cache.
    Returns:
      Packed int32 codes [..., words, head_dim], and float16 scales and offsets
      [..., head_dim / channels, t].
    """
    *batch, tokens, hd = values.shape
    runs = values.astype(jnp.float32).reshape(*batch, tokens, -1, form.channels)
    codes, scale, offset = _rounded(runs, jnp.ones(form.channels, bool), form.bits, axis=-1)
    packed = layout.pack(codes.reshape(*batch, tokens, hd), form.bits)
    across = lambda a: a.squeeze(-1).swapaxes(-1, -2)
    return packed, across(scale), across(offset)


def rounded_keys(
    keys: Float[Array, "*b t hd"], form: KVFormat, frequencies: Float[Array, " half"]
) -> Float[Array, "*b t hd"]:
    """Return keys after RoPE as the cache would give them back; sinks are unchanged.

    Args:
      keys: keys after RoPE [..., t, head_dim], at positions 0 ... t - 1. Groups begin at position
        0; the last one may be short.
      form: format of the cache.
      frequencies: RoPE frequencies [head_dim / 2].
    Returns:
      Keys [..., t, head_dim], in the dtype of `keys`.
    """
    tokens = keys.shape[-2]
    positions = jnp.arange(-(-tokens // form.group) * form.group)
    angles = positions[:, None] * frequencies
    padding = [(0, 0)] * (keys.ndim - 2) + [(0, len(positions) - tokens), (0, 0)]
    padded = _unturned(jnp.pad(keys, padding), angles, form)
    there = (positions >= form.sinks) & (positions < tokens)
    known = kv_layout.decode_keys(*quantize_keys(padded, there, form), form.bits)
    known = kv_layout.turned(known, angles) if form.rope == "pre" else known
    sink = jnp.arange(tokens)[:, None] < form.sinks
    return jnp.where(sink, keys, known[..., :tokens, :].astype(keys.dtype))


def rounded_values(values: Float[Array, "*b t hd"], form: KVFormat) -> Float[Array, "*b t hd"]:
    """Return values at positions 0 ... t - 1 as the cache would give them back; see `rounded_keys`.

    Args:
      values: values [..., t, head_dim].
      form: format of the cache.
    """
    tokens = values.shape[-2]
    padding = [(0, 0)] * (values.ndim - 2) + [(0, -tokens % form.group), (0, 0)]
    known = kv_layout.decode_values(*quantize_values(jnp.pad(values, padding), form), form.bits)
    sink = jnp.arange(tokens)[:, None] < form.sinks
    return jnp.where(sink, values, known[..., :tokens, :].astype(values.dtype))


def store(
    past: kv_layout.Past,
    k: Float[Array, "L b kv t hd"],
    v: Float[Array, "L b kv t hd"],
    start: Int32[Array, ""],
    stop: Int32[Array, ""],
    form: KVFormat,
    frequencies: Float[Array, " half"],
) -> kv_layout.Past:
    """Return the cache with the tokens at positions start ... stop - 1 added in all layers.

    Each token goes into the ring buffer or, if it is one of the first, to the sinks. When a group
    is complete, the group one window before it is quantized. Nothing else in `past` changes, so
    inside a loop the cache is updated in place.

    Args:
      past: the cache.
      k, v: keys (after RoPE) and values [L, b, kv, t, head_dim] of tokens from `start` on; those
        from `stop` on are padding and are ignored.
      start: number of tokens in `past`.
      stop: number of tokens after the call.
      form: format of the cache.
      frequencies: RoPE frequencies [head_dim / 2].
    """
    chunks = form.window // form.group + 1  # number of groups that the ring holds

    def put(held: Array, new: Array, at: Array, positions: Array) -> Array:
        """Write the new tokens at these positions to `held`, from index `at` on."""
        is_new = (start <= positions) & (positions < stop)
        index = jnp.clip(positions - start, 0, new.shape[-2] - 1)
        old = jax.lax.dynamic_slice_in_dim(held, at, len(positions), axis=-2)
        rows = jnp.take(new, index, axis=-2).astype(held.dtype)
        rows = jnp.where(is_new[:, None], rows, old)
        return jax.lax.dynamic_update_slice_in_dim(held, rows, at, axis=-2)

    def chunk(i: Array, past: kv_layout.Past) -> kv_layout.Past:
        positions = i * form.group + jnp.arange(form.group)
        at = i % chunks * form.group
        past = past._replace(
            ring_k=put(past.ring_k, k, at, positions), ring_v=put(past.ring_v, v, at, positions)
        )
        leaves = ((i + 1) * form.group <= stop) & (i >= chunks - 1)
        retire = lambda _, past: _retire(past, i - chunks + 1, form, frequencies)
        return jax.lax.fori_loop(0, leaves.astype(jnp.int32), retire, past)

    if form.sinks:
        first = (jnp.int32(0), jnp.arange(form.sinks))
        past = past._replace(sink_k=put(past.sink_k, k, *first), sink_v=put(past.sink_v, v, *first))
    return jax.lax.fori_loop(start // form.group, -(-stop // form.group), chunk, past)


def _retire(
    past: kv_layout.Past, group: Array, form: KVFormat, frequencies: Array
) -> kv_layout.Past:
    """Quantize group number `group`, moving it from the ring to the codes."""
    size, first = form.group, group * form.group
    at = first % past.ring_k.shape[-2]
    held = lambda ring: jax.lax.dynamic_slice_in_dim(ring, at, size, axis=-2)
    positions = first + jnp.arange(size)
    keys = _unturned(held(past.ring_k), positions[:, None] * frequencies, form)
    coded = (
        *quantize_keys(keys, positions >= form.sinks, form),
        *quantize_values(held(past.ring_v), form),
    )

    def put(a: Array, new: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(a, new, group * new.shape[axis], axis)

    return kv_layout.Past(*past[:4], *map(put, past[4:], coded, (3, 3, 3, 3, 4, 4)))


def _unturned(keys: Array, angles: Array, form: KVFormat) -> Array:
    """Return keys in float32 as they are rounded: with RoPE undone if `form.rope` is "pre"."""
    keys = keys.astype(jnp.float32)
    return kv_layout.turned(keys, -angles) if form.rope == "pre" else keys


def _rounded(x: Array, valid: Array, bits: int, axis: int) -> tuple[Array, Array, Array]:
    """Round by the range of valid entries along an axis; return codes, float16 scales and offsets.

    Scale and offset have size 1 along the axis. Both are NaN if a valid entry is NaN or infinite.
    """
    # Tested separately: compiled for a CPU, minima and maxima of many numbers may ignore NaN.
    finite = jnp.all(jnp.isfinite(x) | ~valid, axis, keepdims=True)
    x = jnp.where(jnp.isfinite(x), x, 0.0)
    any_valid = jnp.any(valid, axis, keepdims=True)
    least = jnp.min(jnp.where(valid, x, jnp.inf), axis, keepdims=True)
    most = jnp.max(jnp.where(valid, x, -jnp.inf), axis, keepdims=True)
    least, most = jnp.where(any_valid, least, 0.0), jnp.where(any_valid, most, 0.0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    half = lambda a: jnp.clip(a, -_LARGEST, _LARGEST).astype(jnp.float16)
    scale = half((most - least) / (high - low))
    step = scale.astype(jnp.float32)
    offset = half(least - low * step)
    steps = (x - offset.astype(jnp.float32)) / jnp.where(step > 0, step, 1.0)
    scale, offset = (jnp.where(finite, a, jnp.float16(jnp.nan)) for a in (scale, offset))
    return jnp.clip(jnp.round(steps), low, high).astype(jnp.int32), scale, offset
