"""Additive codebooks: each code looks up a group of rows, two float16 at a time.

The sum over the codebooks of a group is not formed. Each entry is multiplied by x separately, and
accumulated in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu import contraction, lanes, tiles, triton
from pallas_kernels.kernel import Kernel

PLACES = 128  # places per step: every channel has one for each codebook


def additive_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    codebooks: Float[Array, "c K g"],
    scale: Float[Array, "1 n"],
    *,
    bits: int,
    group: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """Return the product; arguments as in `ops.additive_matmul`."""
    shape, count = contraction.shape(x, activations), len(codebooks)
    pairs, size = group // 2, 1 << bits
    per = 32 // (bits * count)  # groups per word
    depth = PLACES // count
    high = depth // (per * group)
    inner = 2 if high == 4 else 1

    def decode(refs, step: Array, tile: Array) -> Array:
        (words,) = tiles.units(refs[0], codes.shape, tile, step * high, high)
        registers = []
        for i in range(per * count):
            code = jax.lax.shift_right_logical(words, jnp.int32(bits * i)) & (size - 1)
            entry = (code + size * (i % count)) * pairs
            registers += [triton.load(refs[1].at[entry + pair]) for pair in range(pairs)]
        return lanes.weave(registers, 2, inner)

    def place(row, register, lane):
        code, pair = register // pairs, register % pairs
        return group * (per * row + code // count) + 2 * pair + lane

    entries = jax.lax.bitcast_convert_type(codebooks.astype(jnp.float16).reshape(-1, 2), jnp.int32)
    weights = contraction.Weights(
        n=codes.shape[1],
        arrays=[codes, entries],
        blocks=[((len(codes), shape.columns), True), (entries.shape, False)],
        decode=decode,
        depth=depth,
        order=lanes.woven(place, high, per * count * pairs, 2, inner),
        factor=None,
        shape=shape,
        offset=0.0,
        one=1.0,
        scale=scale,
        group_size=x.shape[1],
    )
    return contraction.product(x, weights, activations, "additive_matmul")


def serves(x, codes, codebooks, scale, *, bits: int, group: int, activations: str = "float") -> str:
    """Return "" if the kernel supports the arguments of `additive_matmul`, otherwise the reason."""
    held = bits * codebooks.shape[0]
    if held & (held - 1) or held > 32:
        return f"on a GPU, the codes of a group must take 4, 8, 16 or 32 bits, not {held}"
    if group not in (2, 4, 8, 16) or 32 // held * group * codebooks.shape[0] > PLACES:
        return f"on a GPU, a group must have 2, 4, 8 or 16 rows, not {group}"
    if codebooks.dtype != jnp.float16:
        return f"on a GPU, codebooks must be float16, not {codebooks.dtype}"
    return triton.missing()


KERNELS = {"additive_matmul": Kernel(additive_matmul, serves)}
