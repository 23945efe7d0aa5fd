"""Bit packing: the single definition of every packed layout.

Codes of `bits` bits are stored along one axis as a dense little-endian bit stream in int32 words,
low bits first, in two's complement. Codes of 2, 4 and 8 bits never straddle a word; 32 codes of 3
bits take exactly 3 words. The order is that of a TPU sublane bitcast and, apart from the axis, that
of GPTQ and compressed-tensors.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, UInt8

BITS = (2, 3, 4, 8)


def unit(bits: int) -> tuple[int, int]:
    """Return (codes, words) of the smallest run of whole words: (16, 1) at 2 bits, (32, 3) at 3.

    Args:
      bits: number of bits per code.
    Raises:
      ValueError: bits is not 2, 3, 4 or 8.

    >>> unit(2), unit(3), unit(4), unit(8)
    ((16, 1), (32, 3), (8, 1), (4, 1))
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    codes = math.lcm(bits, 32) // bits
    return codes, codes * bits // 32


def words(length: int, bits: int) -> int:
    """Return the number of int32 words for `length` codes; the last run is zero-padded.

    Args:
      length: number of codes.
      bits: number of bits per code.

    >>> words(576, 3), words(20, 2)
    (54, 2)
    """
    codes, per = unit(bits)
    return -(-length // codes) * per


@partial(jax.jit, static_argnums=1, inline=True)  # one program instead of a dozen when eager
def pack(codes: Int[Array, "... k n"], bits: int) -> Int32[Array, "... w n"]:
    """Pack integer codes along axis -2.

    Args:
      codes: [..., k, n], each in [-2**(bits-1), 2**(bits-1)).
      bits: number of bits per code, 2, 3, 4 or 8.
    Returns:
      int32 [..., words(k, bits), n].

    >>> import jax.numpy as jnp
    >>> pack(jnp.array([[1], [-1], [0], [-2]]), 2).tolist()
    [[141]]
    """
    run, per = unit(bits)
    *batch, k, n = codes.shape
    groups = -(-k // run)
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, groups * run - k), (0, 0)])
    u = (codes.astype(jnp.int32) & ((1 << bits) - 1)).astype(jnp.uint32)
    u = u.reshape(*batch, groups, run, n)
    word, low, crosses = _places(bits, run)
    here = u << low[:, None]
    # The remainder goes to the next word. Bits are disjoint, so that a sum is their union.
    there = u >> (32 - low)[:, None] % 32
    total = lambda part, mask: jnp.sum(part[..., mask, :], axis=-2, dtype=jnp.uint32)
    columns = [total(here, word == i) + total(there, crosses & (word == i - 1)) for i in range(per)]
    packed = jnp.stack(columns, axis=-2).reshape(*batch, groups * per, n)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def unpack(packed: Int32[Array, "... w n"], bits: int, length: int) -> Int32[Array, "... k n"]:
    """Return the int32 codes [..., length, n] that `pack` packed, sign-extended.

    Args:
      packed: int32 words [..., w, n].
      bits: number of bits per code.
      length: number of codes.
    Raises:
      ValueError: the number of words does not match.

    >>> import jax.numpy as jnp
    >>> unpack(jnp.array([[141]]), 2, 4).ravel().tolist()
    [1, -1, 0, -2]
    """
    run, per = unit(bits)
    *batch, w, n = packed.shape
    if w != words(length, bits):
        raise ValueError(f"{length} codes of {bits} bits take {words(length, bits)} words, got {w}")
    p = packed.reshape(*batch, w // per, per, n)
    word, low, crosses = _places(bits, run)
    at = lambda word: p if per == 1 else p[..., word, :]
    # Move the top bit of every code to bit 31, then shift back with sign extension.
    codes = (at(word + crosses) << (-low - bits)[:, None] % 32) >> (32 - bits)
    if crosses.any():  # the low bits are at the end of the previous word
        mask = np.where(crosses, (1 << (32 - low) % 32) - 1, 0)
        codes = codes | ((at(word) >> low[:, None]) & mask[:, None])
    return codes.reshape(*batch, w // per * run, n)[..., :length, :]


def unpack_rows(
    packed: Int32[Array, "w n"], bits: int, ids: Int[Array, "i"]
) -> Int32[Array, "i n"]:
    """Return rows `ids` of the unpacked codes, unpacking only the words that hold them.

    Args:
      packed: int32 words [w, n].
      bits: number of bits per code.
      ids: row indices [i].
    Returns:
      int32 [i, n].

    >>> import jax.numpy as jnp
    >>> unpack_rows(jnp.array([[141]]), 2, jnp.array([3, 0])).ravel().tolist()
    [-2, 1]
    """
    run, per = unit(bits)
    runs = packed.reshape(-1, per, packed.shape[-1])[ids // run]
    return jax.vmap(lambda words, i: unpack(words, bits, run)[i])(runs, ids % run)


def _places(bits: int, run: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each code's word, its lowest bit there, and whether it crosses into the next word."""
    word, low = np.divmod(np.arange(run, dtype=np.int32) * bits, 32)
    return word, low, low + bits > 32


# --- ternary codes, five to a byte ----------------------------------------------------------
# 3^5 = 243 <= 256, so 1.6 bits per code. This form is for storage only: in a product, five
# divisions per byte would cost more than the saved bytes, so it is unpacked on loading.

_POWERS = 3 ** np.arange(5, dtype=np.int32)


def pack_base3(words: Int32[Array, "... w n"], k: int) -> UInt8[Array, "... b n"]:
    """Return k codes in {-1, 0, 1} as ceil(k / 5) bytes sum_i (code_i + 1) 3^i.

    Args:
      words: int32 words [..., w, n] of 2-bit codes.
      k: number of codes.
    Returns:
      uint8 [..., ceil(k / 5), n].

    >>> pack_base3(pack(jnp.array([[1], [-1], [0]]), 2), 3).ravel().tolist()
    [119]
    """
    codes = unpack(words, 2, k) + 1
    pad = [(0, 0)] * (codes.ndim - 2) + [(0, -k % 5), (0, 0)]
    fives = jnp.pad(codes, pad, constant_values=1)
    fives = fives.reshape(*codes.shape[:-2], -1, 5, codes.shape[-1])
    return jnp.sum(fives * _POWERS[:, None], axis=-2).astype(jnp.uint8)


def unpack_base3(stored: UInt8[Array, "... b n"], k: int) -> Int32[Array, "... w n"]:
    """Return the 2-bit words that `pack_base3` packed.

    Args:
      stored: uint8 [..., ceil(k / 5), n].
      k: number of codes.
    Raises:
      ValueError: the number of bytes does not match k.

    >>> unpack(unpack_base3(jnp.array([[119]], jnp.uint8), 3), 2, 3).ravel().tolist()
    [1, -1, 0]
    """
    if stored.shape[-2] != -(-k // 5):
        raise ValueError(f"{k} codes take {-(-k // 5)} bytes, got {stored.shape[-2]}")
    codes = stored.astype(jnp.int32)[..., None, :] // _POWERS[:, None] % 3 - 1
    return pack(codes.reshape(*stored.shape[:-2], -1, stored.shape[-1])[..., :k, :], 2)
