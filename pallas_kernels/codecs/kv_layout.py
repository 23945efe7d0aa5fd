"""The layout of a packed key-value cache, and what its codes stand for.

A *group* is so many consecutive tokens, quantized together once they leave the window of recent
ones. Codes of one channel run along the tokens of a group, of keys and values alike, so that a
vector of channels is read at once; scales are those of KIVI (arXiv:2402.02750): of a key one for
each channel and group, of a value one for each token and some channels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int32

from pallas_kernels.codecs import layout


class Past(NamedTuple):
    """Keys and values of the tokens before a call, of all layers; b sequences, kv heads.

    Token t stands at `sink[t]` if there is such a place; else at `ring[t % R]` while it is recent;
    else in the codes. What its codes stand for is `code * scale + offset`. With S slots, groups
    of G tokens, R = window + G, and scales for C channels of a value:

    Attributes:
      sink_k, sink_v: [L, b, kv, sinks, hd], the first tokens as they are.
      ring_k, ring_v: [L, b, kv, R, hd], the recent ones.
      key_codes: int32 words [L, b, kv, words(S), hd], packed along tokens (`layout.pack`).
      key_scale, key_offset: float16 [L, b, kv, S / G, hd].
      value_codes: as key_codes, of as many bits or of others.
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
        """S: tokens that there are codes for."""
        return self.value_scale.shape[4]

    @property
    def group(self) -> int:
        """G: tokens that are quantized together."""
        return self.slots // self.key_scale.shape[3]

    @property
    def sinks(self) -> int:
        """First tokens that stay as they are."""
        return self.sink_k.shape[3]

    @property
    def window(self) -> int:
        """Recent tokens that are never in the codes."""
        return self.ring_k.shape[3] - self.group

    @property
    def key_bits(self) -> int:
        """Bits of a code of a key."""
        return 32 * self.key_codes.shape[3] // self.slots

    @property
    def value_bits(self) -> int:
        """Bits of a code of a value."""
        return 32 * self.value_codes.shape[3] // self.slots


def retired(length: Int32[Array, ""] | int, window: int, group: int) -> Int32[Array, ""]:
    """How many of so many tokens are in the codes: the whole groups before the window.

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
    """Keys of whole groups, float32: a scale for each group and channel.

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
    """Values of some tokens, float32: a scale for each token and run of channels."""
    values, _ = _decoded(codes, bits)
    width = codes.shape[-1] // scale.shape[-2]
    spread = lambda a: jnp.repeat(a.astype(jnp.float32).swapaxes(-1, -2), width, axis=-1)
    return values * spread(scale) + spread(offset)


def _decoded(codes: Array, bits: int) -> tuple[Array, int]:
    tokens = 32 * codes.shape[-2] // bits
    return layout.unpack(codes, bits, tokens).astype(jnp.float32), tokens


def turned(x: Float[Array, "*b hd"], angles: Float[Array, "*c half"]) -> Float[Array, "*b hd"]:
    """Each pair (i, i + hd / 2) of x turned by its angle (RoPE), float32.

    >>> turned(jnp.array([1.0, 0.0]), jnp.array([jnp.pi / 2])).round(3).tolist()
    [-0.0, 1.0]
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
