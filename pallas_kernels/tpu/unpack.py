"""Words of packed codes to operands of the matrix unit, in registers.

`pltpu.bitcast` of int32 words to a narrower type takes the codes in `layout.pack`'s order, and its
sign extension is native: that is why codes are two's complement.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Num

from pallas_kernels.tpu import planes
from pallas_kernels.tpu.product import Decoder

_TYPES = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}
# Of 3-bit codes: 8 runs of 32 codes come out as the first quarters of all runs, and so on.
_RUNS = ((8, 4, 8), (1, 0, 2))


def decoder(bits: int, unit: str, name: str) -> Decoder:
    """Codes of 2, 3, 4 or 8 bits."""
    if bits == 3:
        give = lambda words, _: [integers(nibbles_of_3_bits(words[0]), 4, unit)]
        return Decoder(give, (0.5,), (3,), name, order=_RUNS, slice=256)
    give = lambda words, _: [integers(words[0], bits, unit)]
    return Decoder(give, (1.0,), (bits,), name)


def integers(words: Int32[Array, "w n"], bits: int, unit: str) -> Num[Array, "k n"]:
    """The codes of some words, as the unit takes them."""
    codes = pltpu.bitcast(words, _TYPES[bits])
    if unit == planes.FLOAT8 and bits == 2:
        # By way of int4, whose conversion is native. The detour by words keeps the two
        # conversions from being joined into one that is not.
        codes = pltpu.bitcast(pltpu.bitcast(codes.astype(jnp.int4), jnp.int32), jnp.int4)
    return codes.astype(unit)


def nibbles_of_3_bits(words: Int32[Array, "w n"]) -> Int32[Array, "4*w/3 n"]:
    """Words of eight nibbles, twice the codes of 3 bits, of 24 words: 8 runs of 32 codes.

    Row 8 q + r holds codes 8 q to 8 q + 7 of run r. In a nibble's high bits a sign needs no
    extension.
    """
    chunks = [words[i : i + 24] for i in range(0, len(words), 24)]
    return jnp.concatenate([row for chunk in chunks for row in _quarters(chunk)])


def _quarters(words: Int32[Array, "24 n"]) -> list[Int32[Array, "8 n"]]:
    a, b, c = (words[i::3] for i in range(3))
    right = jax.lax.shift_right_logical
    fields = (a, right(a, jnp.int32(24)) | b << 8, right(b, jnp.int32(16)) | c << 16, right(c, jnp.int32(8)))
    return [_spread(field) for field in fields]


def _spread(field: Int32[Array, "r n"]) -> Int32[Array, "r n"]:
    """24 bits to eight nibbles, of which the high three bits are filled."""
    halves = (field & 0xFFF) | (field << 4) & 0xFFF0000
    quarters = (halves & 0x003F003F) | (halves << 2) & 0x3F003F00
    return (quarters << 1) & 0x0E0E0E0E | (quarters << 2) & jnp.int32(-0x1F1F1F20)
