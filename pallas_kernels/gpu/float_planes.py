"""bfloat16 weights stored without loss: 4-bit codes of exponents, and signs and mantissas.

The 16 exponents that codes can mean in a column fit the range of float16, whose products with the
rows of x are exact. So a weight becomes a float16 with the same sign and mantissa, and the column
is scaled by a power of two. Columns of a base beyond 240, which only hold weights above 2**113,
infinities and NaN, are NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8

from pallas_kernels import listed_floats
from pallas_kernels.gpu import contraction, lanes, tiles, triton
from pallas_kernels.kernel import Kernel

UNIT = 8  # rows of a word of codes, and of two words of rests
FIRST = 8  # exponent field of code 0 in float16, whose bias is 15


def provisional(x, codes, rest, base, *, activations: str = "float"):
    """Return x @ w, where escapes have the exponent base + 15.

    Args:
      x, codes, rest, base, activations: as in `ops.float_planes_matmul`.
    """
    shape, k = contraction.shape(x, activations), x.shape[1]
    high = tiles.depth(UNIT, k, k, activations, shape.depth) // UNIT
    inner = 1 if shape.rows == 8 else 4  # fewest instructions

    def decode(refs, step: Array, tile: Array) -> Array:
        (word,) = tiles.units(refs[0], codes.shape, tile, step * high, high)
        pair = tiles.units(refs[1], rest.shape, tile, step * high, high, 2)
        return lanes.weave([_halves(word, pair, i) for i in range(4)], 2, inner)

    weights = contraction.Weights(
        n=codes.shape[1],
        arrays=[codes, rest],
        blocks=[((len(codes), shape.columns), True), ((len(rest), shape.columns), True)],
        decode=decode,
        depth=UNIT * high,
        order=lanes.woven(lambda row, i, lane: UNIT * row + i + 4 * lane, high, 4, 2, inner),
        factor=None,
        shape=shape,
        offset=0.0,
        one=1.0,
        scale=_scale(base),
        group_size=k,
    )
    return contraction.product(x, weights, activations, "float_planes_matmul_4")


def _halves(codes: Int32[Array, "r n"], rest: list[Array], i: int) -> Int32[Array, "r n"]:
    """Return registers with the float16 weights i and i + 4 of every unit.

    Fields are disjoint, so that their sum is their union, and one addition of three terms adds the
    exponent of code 0 too.
    """
    both = triton.bytes_twice(*rest, i)  # byte i of each word, twice in each half
    sign_mantissa = triton.bit_and(both, 0x80008000) | triton.bit_and(both << 3, 0x03F803F8)
    at = 10 - 4 * i
    moved = codes << at if at > 0 else jax.lax.shift_right_logical(codes, jnp.int32(-at))
    return triton.bit_and(moved, 0x3C003C00) + (sign_mantissa + FIRST * 0x04000400)


def _scale(base: UInt8[Array, "1 n"]) -> Float32[Array, "1 n"]:
    """Return 2**(base - 127 + 15 - FIRST), or NaN for a base that may mean NaN."""
    bits = base.astype(jnp.int32) + (15 - FIRST) << 23
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(base > 240, jnp.nan, scale)


def serves(x, codes, rest, base, near, where, exponent, *, dtype: str, bits: int,
           activations: str = "float") -> str:  # fmt: skip
    """Return "" if the kernel supports these arguments of `float_planes_matmul`, or the reason."""
    return listed_floats.unfit(dtype, bits, "GPU") or triton.missing()


KERNELS = {"float_planes_matmul": Kernel(listed_floats.corrected(provisional), serves)}
