"""Converts words of packed codes to operands of the matrix unit, in registers.

`pltpu.bitcast` of int32 words to a narrower type yields the codes in `layout.pack`'s order, with
native sign extension. This is why codes are in two's complement.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Num

from pallas_kernels.tpu import planes
from pallas_kernels.tpu.product import Decoder

_TYPES = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}


def decoder(bits: int, unit: str, name: str) -> Decoder:
    """Return the decoder of codes of 2, 3, 4 or 8 bits.

    Args:
      bits: number of bits per code.
      unit: dtype of the matrix unit's operands, one of `planes.UNITS`.
      name: name of the kernel.
    """
    if bits == 3:
        give = lambda words, _: [integers(nibbles_of_3_bits(words[0]), 4, unit)]
        return Decoder(
            give, (0.5,), (3,), name, order=order_of_3_bits, slice=256, longest=256, width=256,
            slow=True, ahead=1 if unit == planes.FLOAT8 else 2,
        )  # fmt: skip
    give = lambda words, _: [integers(words[0], bits, unit)]
    return Decoder(give, (1.0,), (bits,), name)


def integers(words: Int32[Array, "w n"], bits: int, unit: str) -> Num[Array, "k n"]:
    """Return the codes of words in the dtype of the unit.

    Args:
      words: int32 [w, n].
      bits: number of bits per code, 2, 4 or 8.
      unit: dtype of the matrix unit's operands.
    """
    codes = pltpu.bitcast(words, _TYPES[bits])
    if unit == planes.FLOAT8 and bits == 2:
        # Through int4, whose conversion is native. The cast to int32 and back keeps the compiler
        # from merging the two conversions into one that is not.
        codes = pltpu.bitcast(pltpu.bitcast(codes.astype(jnp.int4), jnp.int32), jnp.int4)
    return codes.astype(unit)


def nibbles_of_3_bits(words: Int32[Array, "w n"]) -> Int32[Array, "4*w/3 n"]:
    """Return words of eight nibbles, each twice a 3-bit code, in the order of `order_of_3_bits`.

    In the high bits of a nibble, a sign needs no extension.

    Args:
      words: int32 [w, n], w a multiple of 24.
    """
    chunks = [_of_24(words[i : i + 24]) for i in range(0, len(words), 24)]
    return jnp.concatenate(chunks)


def order_of_3_bits(x: Array) -> Array:
    """Reorder 8 runs of 32 codes: quarters 0, 1 and 3 of each run, then quarter 2 of all runs.

    Quarter 2 is taken from every third run in turn. A quarter is the 24 bits of 8 codes. The first
    of a run's words begins with quarter 0, the last ends with quarter 3, and the middle one has all
    but 8 bits of quarter 1. Quarter 2, half of it in the last word, goes to rows of its own, in the
    order in which the last words of the runs are arranged in registers of 8 rows.

    Args:
      x: [..., k], k a multiple of 256.
    """
    runs = x.reshape(*x.shape[:-1], -1, 8, 4, 8)
    first = jnp.concatenate([runs[..., :2, :], runs[..., 3:, :]], axis=-2)
    third = [runs[..., (3 * row + 2) % 8, 2, :] for row in range(8)]
    flat = lambda a: a.reshape(*a.shape[: x.ndim], -1)
    return flat(jnp.concatenate([flat(first), flat(jnp.stack(third, axis=-2))], -1)).reshape(
        x.shape
    )


def _of_24(words: Int32[Array, "24 n"]) -> Int32[Array, "32 n"]:
    right = jax.lax.shift_right_logical
    before = pltpu.roll(words, 1, 0)
    place = jax.lax.broadcasted_iota(jnp.int32, words.shape, 0) % 3
    straddling = right(before, jnp.int32(24)) | words << 8
    own = right(words, jnp.where(place == 2, 8, 0))
    first = jnp.where(place == 1, straddling, own)
    third = right(before, jnp.int32(16)) | words << 16
    here = lambda i: (place[8 * i : 8 * i + 8] == 2, third[8 * i : 8 * i + 8])
    (is_0, row_0), (is_1, row_1), (_, row_2) = here(0), here(1), here(2)
    third = jnp.where(is_0, row_0, jnp.where(is_1, row_1, row_2))
    return _spread(jnp.concatenate([first, third]))


def _spread(field: Int32[Array, "r n"]) -> Int32[Array, "r n"]:
    """Spread 24 bits to eight nibbles, filling the high three bits of each."""
    halves = (field & 0xFFF) | (field << 4) & 0xFFF0000
    quarters = (halves & 0x003F003F) | (halves << 2) & 0x3F003F00
    return (quarters << 1) & 0x0E0E0E0E | (quarters << 2) & jnp.int32(-0x1F1F1F20)
