"""Quantized key-value caches: which format, and how groups of tokens are rounded.

Keys have a scale for each channel, for theirs are a few large channels, the same for all tokens;
values, which have none, one for each token (KIVI, arXiv:2402.02750). Keys may be rounded as they
are before RoPE turns them (KVQuant, arXiv:2401.18079): a turned pair of channels swaps its
outliers about, one that is not keeps its range. The first tokens take most of the attention and
have keys unlike all others: they stay as they are, and out of the ranges of their group.
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
    """How keys and values are kept; hashable, compared by value.

    Attributes:
      bits: of a code: 2, 3, 4 or 8.
      rope: "pre" or "post": keys are rounded before or after RoPE turns them.
      window: recent tokens that stay as they are, a multiple of `group`. Between `window` and
        `window + group - 1` do: the oldest leave by whole groups.
      sinks: first tokens that stay as they are for good.
      group: tokens of one range of a channel of keys; whole words of codes.
      channels: channels of one range of a token's values.

    Raises:
      ValueError: a value is none of these.

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
        """Of a key or value in the codes, its share of scales and offsets included, on average."""
        return self.bits + 32 * (1 / self.group + 1 / self.channels) / 2

    def bytes_per_token(self, layers: int, heads: int, head_dim: int) -> float:
        """What a token's keys and values take in the codes, scales and offsets included.

        >>> KVFormat(4).bytes_per_token(layers=30, heads=3, head_dim=64)
        7200.0
        """
        return 2 * layers * heads * head_dim * self.bits_per_value / 8

    def check(self, head_dim: int) -> None:
        """Raise ValueError unless heads of so many channels can be kept."""
        if head_dim % self.channels:
            raise ValueError(
                f"channels, {self.channels}, does not divide the {head_dim} of a head; give one "
                "that does"
            )


def empty(
    form: KVFormat, shape: tuple[int, int, int], head_dim: int, size: int, dtype: DTypeLike
) -> kv_layout.Past:
    """A cache of no tokens, with room for `size`.

    Args:
      shape: (layers, sequences, heads of keys).
      dtype: of the tokens that stay as they are.
    Raises:
      ValueError: the format does not fit heads of `head_dim`.

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
    """Codes, scales and offsets of whole groups of keys; see `kv_layout.decode_keys`.

    Args:
      valid: which tokens there are and not kept elsewhere: others enter no range.
    """
    *batch, tokens, hd = keys.shape
    grouped = keys.astype(jnp.float32).reshape(*batch, -1, form.group, hd)
    codes, scale, offset = _rounded(grouped, valid.reshape(-1, form.group, 1), form.bits, axis=-2)
    packed = layout.pack(codes.reshape(*batch, tokens, hd), form.bits)
    return packed, scale.squeeze(-2), offset.squeeze(-2)


def quantize_values(
    values: Float[Array, "*b t hd"], form: KVFormat
) -> tuple[Int32[Array, "*b w hd"], Float16[Array, "*b c t"], Float16[Array, "*b c t"]]:
    """Codes, scales and offsets of values; see `pallas_kernels.codecs.kv_layout.decode_values`."""
    *batch, tokens, hd = values.shape
    runs = values.astype(jnp.float32).reshape(*batch, tokens, -1, form.channels)
    codes, scale, offset = _rounded(runs, jnp.ones(form.channels, bool), form.bits, axis=-1)
    packed = layout.pack(codes.reshape(*batch, tokens, hd), form.bits)
    across = lambda a: a.squeeze(-1).swapaxes(-1, -2)
    return packed, across(scale), across(offset)


def rounded_keys(
    keys: Float[Array, "*b t hd"], form: KVFormat, frequencies: Float[Array, " half"]
) -> Float[Array, "*b t hd"]:
    """Turned keys of positions 0 ... t - 1 as the cache would give them back, sinks as they are.

    Groups begin at position 0; the last may be short. dtype of keys.
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
    """Values of positions 0 ... t - 1 as the cache would give them back; as `rounded_keys`."""
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
    """The cache with the tokens at positions start ... stop - 1 of all layers, group by group.

    Each goes into the ring (or, one of the first, to the sinks); when a group is full, that which
    is a window before it leaves for the codes. Nothing else of `past` changes, so that inside a
    loop it is written in place.

    Args:
      k, v: of tokens from `start` on; those from `stop` on are padding and enter nothing.
        Keys are turned.
      start: the number of tokens that are in `past`.
    """
    chunks = form.window // form.group + 1  # of the ring

    def put(held: Array, new: Array, at: Array, positions: Array) -> Array:
        """The tokens of some positions to where the first of them stands."""
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
    """Group number `group` from the ring to the codes."""
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
    """Keys as they are rounded, float32."""
    keys = keys.astype(jnp.float32)
    return kv_layout.turned(keys, -angles) if form.rope == "pre" else keys


def _rounded(x: Array, valid: Array, bits: int, axis: int) -> tuple[Array, Array, Array]:
    """Codes by the range of what is valid along an axis; scale and offset, float16, of size 1.

    Both are NaN where something valid is NaN or infinite.
    """
    # By a test of its own: compiled for a CPU, minima and maxima of many numbers may pass over NaN.
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
