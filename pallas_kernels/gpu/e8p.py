"""E8P: a code's row is looked up as eight nibbles, which its signs negate all at once.

A coordinate of a point is (nibble - 7.5 - shift) / 2. No nibble is 0, so the shift can be
subtracted from all eight at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.codecs import e8p
from pallas_kernels.gpu import contraction, lanes, rows, tiles, triton
from pallas_kernels.kernel import Kernel

DEPTH = 128
_NIBBLES = lanes.Lanes(4, 2)


def points(code: Int32[Array, "r n"], ref) -> Int32[Array, "r n"]:
    """Return the nibbles of the points selected by the low 16 bits of codes.

    Args:
      code: codes, in the low 16 bits.
      ref: reference to the table.
    """
    s = code & 255
    shift = s ^ (s >> 4)
    shift = shift ^ (shift >> 2)
    shift = (shift ^ (shift >> 1)) & 1
    flips = s ^ shift  # bit j moves to bit 4 j
    for step, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        flips = (flips | flips << step) & mask
    word = triton.load(ref.at[(code >> 8) & 255])
    return (word ^ flips * 15) + flips - shift * 0x11111111


def fine_points(code: Int32[Array, "r n"], ref) -> Int32[Array, "r n"]:
    """Return the nibbles of the E81B points selected by the low 8 bits of codes.

    Args:
      code: codes, in the low 8 bits.
      ref: reference to the table.
    """
    return triton.load(ref.at[code & 255])


def _weights(
    codes: Array, table: np.ndarray, point, width: int, offset: float, scale: Array,
    shape: contraction.Shape, k: int,
) -> contraction.Weights:  # fmt: skip
    """Return the words of octets' codes of `width` bits as `contraction.Weights`."""
    per = 32 // width  # octets per word
    high = DEPTH // (8 * per)
    place = lambda r, register, lane: 8 * (per * r + register // 4) + 2 * (register % 4) + lane
    low = np.array([at for _, at in _NIBBLES.shifts()])

    def decode(refs, step: Array, tile: Array) -> Array:
        (words,) = tiles.units(refs[0], codes.shape, tile, step * high, high)
        registers = []
        for octet in range(per):
            code = jax.lax.shift_right_logical(words, jnp.int32(width * octet))
            registers += _NIBBLES.numbers([point(code, refs[1])], signed=False)
        return lanes.weave(registers, 2)

    return contraction.Weights(
        n=codes.shape[1],
        arrays=[codes, jnp.asarray(table.view(np.int32))],
        blocks=[((len(codes), shape.columns), True), (table.shape, False)],
        decode=decode,
        depth=DEPTH,
        order=lanes.woven(place, high, 4 * per, 2),
        factor=np.exp2(-lanes.woven(lambda r, c, lane: low[c % 4], high, 4 * per, 2)),
        shape=shape,
        offset=offset,
        one=rows.ONE,
        scale=scale.astype(jnp.float32) / 2,
        group_size=k,
    )


def e8p_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    residual: Int32[Array, "r n"] | None,
    scale: Float[Array, "1 1"],
    *,
    bits: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """Return the product; arguments as in `ops.e8p_matmul`. A residual is a second product."""
    shape = contraction.shape(x, activations)
    coarse = partial(_weights, table=e8p.WORDS, point=points, width=16, offset=7.5)
    weights = coarse(codes=codes, scale=scale, shape=shape, k=x.shape[1])
    y = contraction.product(x, weights, activations, "e8p_matmul")
    if residual is None:
        return y
    finer = scale.astype(jnp.float32) * e8p.FINE[bits]
    if bits == 4:
        weights = coarse(codes=residual, scale=finer, shape=shape, k=x.shape[1])
        return y + contraction.product(x, weights, activations, "e8p_matmul")
    weights = _weights(residual, e8p.E81B_WORDS, fine_points, 8, 8.0, finer, shape, x.shape[1])
    return y + contraction.product(x, weights, activations, "e81b_matmul")


def serves(x, codes, residual, scale, *, bits: int, activations: str = "float") -> str:
    """Return "" if the kernel supports the arguments of `e8p_matmul`, otherwise the reason."""
    return triton.missing()


KERNELS = {"e8p_matmul": Kernel(e8p_matmul, serves)}
