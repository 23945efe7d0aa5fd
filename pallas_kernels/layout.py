"""Bit packing: the one definition of every packed layout.

Codes of `bits` bits are stored along one axis as a dense little-endian bit stream in int32
words, low bits first, two's complement. 2, 4 and 8 bits never straddle a word; 3 bits take
32 codes in exactly 3 words. It is the order of a TPU sublane bitcast, and (apart from the
axis) that of GPTQ and compressed-tensors.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

BITS = (2, 3, 4, 8)


def unit(bits: int) -> tuple[int, int]:
    """(codes, words) of the smallest run of whole words: (16, 1) at 2 bits, (32, 3) at 3.

    >>> unit(2), unit(3), unit(4), unit(8)
    ((16, 1), (32, 3), (8, 1), (4, 1))
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    codes = math.lcm(bits, 32) // bits
    return codes, codes * bits // 32


def words(length: int, bits: int) -> int:
    """Number of int32 words that hold `length` codes (the last run is zero-padded).

    >>> words(576, 3), words(20, 2)
    (54, 2)
    """
    codes, per = unit(bits)
    return -(-length // codes) * per


def pack(codes: Int[Array, "... k n"], bits: int) -> Int32[Array, "... w n"]:
    """Pack integer codes along axis -2.

    Args:
      codes: [..., k, n], each in [-2**(bits-1), 2**(bits-1)).
      bits: 2, 3, 4 or 8.
    Returns:
      int32 [..., words(k, bits), n].

    >>> import jax.numpy as jnp
    >>> pack(jnp.array([[1], [-1], [0], [-2]]), 2).tolist()
    [[141]]
    """
    run, per = unit(bits)
    *batch, k, n = codes.shape
    pad = -k % run
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, pad), (0, 0)])
    u = (codes.astype(jnp.int32) & ((1 << bits) - 1)).astype(jnp.uint32)
    u = u.reshape(*batch, (k + pad) // run, run, n)
    columns = []
    for word in range(per):
        value = jnp.zeros(u[..., 0, :].shape, jnp.uint32)
        for i in range(run):
            shift = i * bits - 32 * word
            if -bits < shift < 32:
                c = u[..., i, :]
                value = value | (c << shift if shift >= 0 else c >> -shift)
        columns.append(value)
    packed = jnp.stack(columns, axis=-2).reshape(*batch, (k + pad) // run * per, n)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def unpack(packed: Int32[Array, "... w n"], bits: int, length: int) -> Int32[Array, "... k n"]:
    """Inverse of `pack`: int32 codes [..., length, n], sign-extended.

    >>> import jax.numpy as jnp
    >>> unpack(jnp.array([[141]]), 2, 4).ravel().tolist()
    [1, -1, 0, -2]
    """
    run, per = unit(bits)
    *batch, w, n = packed.shape
    if w != words(length, bits):
        raise ValueError(f"{length} codes of {bits} bits take {words(length, bits)} words, got {w}")
    p = packed.reshape(*batch, w // per, per, n)
    codes = jnp.stack([_code(p, i, bits) for i in range(run)], axis=-2)
    return codes.reshape(*batch, w // per * run, n)[..., :length, :]


def _code(p: Int32[Array, "... per n"], i: int, bits: int) -> Int32[Array, "... n"]:
    """Code i of every run: move its top bit to bit 31, then shift back with the sign."""
    word, low = divmod(i * bits, 32)
    top = low + bits
    if top <= 32:
        return (p[..., word, :] << (32 - top)) >> (32 - bits)
    # The code straddles two words: its high part is the low end of the next word.
    below = jax.lax.shift_right_logical(p[..., word, :], jnp.int32(low))
    high = (p[..., word + 1, :] << (32 - (top - 32))) >> (32 - bits)
    return high | below
