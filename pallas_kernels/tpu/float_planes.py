"""Products with bfloat16 weights stored without loss: 4-bit codes of exponents, and the other bits.

A word of `rest` holds signs and mantissas of four weights. Their exponents are formed in the bytes
of a word too, by one addition, and both words are merged into two words of two weights each.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import listed_floats
from pallas_kernels.tpu import planes
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.product import Decoder, product

_LOW = 0x00FF00FF  # the low byte of each half
_MANTISSA, _EXPONENT = 0x007F007F, 0x7F807F80
_SIGN = -0x7FFF8000  # 0x80008000 as int32


def provisional(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    rest: Int32[Array, "r n"],
    base: UInt8[Array, "1 n"],
    *,
    activations: str = "float",
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return x @ w, where escapes have the exponent base + 15.

    Args:
      x, codes, rest, base, activations: as in `ops.float_planes_matmul`.
      blocks: sizes of the blocks; None computes them.
      interpret: whether to run in interpret mode, on any device.
    """
    bases = base.astype(jnp.int32) * 0x01010101
    decoder = Decoder(
        lambda words, _: [_weights(*words)], (1.0,), (4, 8, 0), "float_planes_matmul_4",
        order=_even_first, width=256,
    )  # fmt: skip
    return product(
        x, (codes, rest, bases), jnp.ones((1, 1)), decoder, group=0, activations=activations,
        unit=planes.BFLOAT16, blocks=blocks, interpret=interpret,
    )  # fmt: skip


def _weights(
    codes: Int32[Array, "w n"], rest: Int32[Array, "2*w n"], bases: Int32[Array, "1 n"]
) -> Array:
    """Return bfloat16 weights [8 w, n], in the order of `_even_first`.

    Multiplication by 257 copies the low byte of each half to the high one, so that the sign is in
    its place there and the mantissa in its place here.
    """
    nibbles = pltpu.bitcast(pltpu.bitcast(codes, jnp.int4).astype(jnp.int8), jnp.int32)
    exponents = (nibbles & 0x0F0F0F0F) + bases
    even = (rest & _LOW) * 0x101 & (_SIGN | _MANTISSA) | (exponents & _LOW) << 7
    odd = rest & _SIGN | rest >> 8 & _MANTISSA | exponents >> 1 & _EXPONENT
    # By registers of 8 rows, which are not moved.
    runs = [half[at : at + 8] for at in range(0, len(rest), 8) for half in (even, odd)]
    return pltpu.bitcast(jnp.concatenate(runs), jnp.bfloat16)


def _even_first(x: Array) -> Array:
    """Reorder runs of 32 columns: the even ones, then the odd ones."""
    runs = x.reshape(*x.shape[:-1], -1, 16, 2)
    return jnp.swapaxes(runs, -1, -2).reshape(x.shape)


float_planes_matmul = listed_floats.corrected(provisional)
