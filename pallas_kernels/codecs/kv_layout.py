"""Layout and decoding of a packed key-value cache.

A *group* is a fixed number of consecutive tokens that are quantized together once they leave the
window of recent ones. The codes of one channel run along the tokens of a group, for keys and values
alike, so that a vector of channels can be read at once. Scales are those of KIVI
(arXiv:2402.02750): keys have one per channel and group, values one per token and run of channels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int32

from pallas_kernels.codecs import layout


class Past(NamedTuple):
    """Keys and values of the tokens before a call, for all L layers, b sequences and kv heads.

    Token t is stored in sink slot t if there is one; else in ring slot t % R while it is recent;
    else in the codes, which represent `code * scale + offset`. There are S slots of codes, groups
    of G tokens, R = window + G ring slots, and C value channels per scale.

    Attributes:
      sink_k, sink_v: [L, b, kv, sinks, hd], the first tokens, unquantized.
      ring_k, ring_v: [L, b, kv, R, hd], the recent tokens, unquantized.
      key_codes: int32 words [L, b, kv, words(S), hd], packed along tokens (`layout.pack`).
      key_scale, key_offset: float16 [L, b, kv, S / G, hd].
      value_codes: as key_codes, possibly with another number of bits.
      value_scale, value_offset: float16 [L, b, kv, hd / C, S].
    """

    sink_k: Float[Array, "L b kv sinks hd"]
    sink_v: Float[Array, "L b kv sinks hd"]
    ring_k: Float[Array, "L b kv R hd"]
    ring_v: Float[Array, "L b kv R hd"]
    key_codes: Int32[Array, "L b kv kw hd"]
    key_scale: Float16[Array, "L b kv g hd"]
    key_offset: Float16[Array, "L b kv g hd"]
    value_codes: Int32[Array, "L b kv vw hd"]
    value_scale: Float16[Array, "L b kv c S"]
    value_offset: Float16[Array, "L b kv c S"]

    @property
    def slots(self) -> int:
        """S, the number of tokens for which there are codes."""
        return self.value_scale.shape[4]

    @property
    def group(self) -> int:
        """G, the number of tokens that are quantized together."""
        return self.slots // self.key_scale.shape[3]

    @property
    def sinks(self) -> int:
        """The number of first tokens that stay unquantized."""
        return self.sink_k.shape[3]

    @property
    def window(self) -> int:
        """The number of recent tokens that are never in the codes."""
        return self.ring_k.shape[3] - self.group

    @property
    def key_bits(self) -> int:
        """Number of bits per code of a key."""
        return 32 * self.key_codes.shape[3] // self.slots

    @property
    def value_bits(self) -> int:
        """Number of bits per code of a value."""
        return 32 * self.value_codes.shape[3] // self.slots


def retired(length: Int32[Array, ""] | int, window: int, group: int) -> Int32[Array, ""]:
    """Return how many of `length` tokens are in the codes: the whole groups before the window.

    Args:
      length: number of tokens.
      window: number of recent tokens that are never in the codes.
      group: number of tokens that are quantized together.

    >>> [int(retired(n, 32, 32)) for n in (0, 63, 64, 95, 96)]
    [0, 0, 32, 32, 64]
    """
    return jnp.maximum(length - window, 0) // group * group


def decode_keys(
    codes: Int32[Array, "*b w hd"],
    scale: Float16[Array, "*b g hd"],
    offset: Float16[Array, "*b g hd"],
    bits: int,
) -> Float[Array, "*b t hd"]:
    """Return the float32 keys of whole groups, which have a scale per group and channel.

    Args:
      codes: int32 words [..., w, hd], packed along tokens.
      scale, offset: float16 [..., groups, hd].
      bits: number of bits per code.
    Returns:
      [..., t, hd].

    >>> half = jnp.ones((1, 1), jnp.float16)
    >>> decode_keys(layout.pack(jnp.array([[1], [-2]] * 8), 2), half, half, 2)[:3].ravel().tolist()
    [2.0, -1.0, 2.0]
    """
    values, tokens = _decoded(codes, bits)
    spread = lambda a: jnp.repeat(a.astype(jnp.float32), tokens // a.shape[-2], axis=-2)
    return values * spread(scale) + spread(offset)


def decode_values(
    codes: Int32[Array, "*b w hd"],
    scale: Float16[Array, "*b c t"],
    offset: Float16[Array, "*b c t"],
    bits: int,
) -> Float[Array, "*b t hd"]:
    """Return float32 values, which have a scale per token and run of channels.

    Args:
      codes: int32 words [..., w, hd], packed along tokens.
      scale, offset: float16 [..., runs, t].
      bits: number of bits per code.
    Returns:
      [..., t, hd].
    """
    values, _ = _decoded(codes, bits)
    width = codes.shape[-1] // scale.shape[-2]
    spread = lambda a: jnp.repeat(a.astype(jnp.float32).swapaxes(-1, -2), width, axis=-1)
    return values * spread(scale) + spread(offset)


def _decoded(codes: Array, bits: int) -> tuple[Array, int]:
    tokens = 32 * codes.shape[-2] // bits
    return layout.unpack(codes, bits, tokens).astype(jnp.float32), tokens


def turned(x: Float[Array, "*b hd"], angles: Float[Array, "*c half"]) -> Float[Array, "*b hd"]:
    """Return x in float32 with each pair (i, i + hd / 2) rotated by its angle (RoPE).

    Args:
      x: [..., hd].
      angles: [..., hd / 2], in radians.

    >>> turned(jnp.array([1.0, 0.0]), jnp.array([jnp.pi / 2])).round(3).tolist()
    [-0.0, 1.0]
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
