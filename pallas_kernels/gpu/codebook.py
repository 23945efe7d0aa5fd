"""Scalar codebooks: pairs of codes are looked up in a table, two weights at a time.

The table of pairs is in global memory and soon in the L1 cache. Its entries are float16, which is
exact for float8 and the like, and rounds NormalFloat at the 12th bit.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.codecs import layout
from pallas_kernels.gpu import contraction, lanes, tiles, triton
from pallas_kernels.kernel import Kernel


def entries(table: tuple[float, ...] | str, bits: int) -> tuple[Int[np.ndarray, "e"], float]:
    """Return the words that codes or pairs of codes select, and the value of 1.0 in them.

    The first code of a pair is in the low half of a word.

    Args:
      table: as in `ops.codebook_matmul`.
      bits: number of bits per code.

    >>> entries((0.0, 1.0, 2.0, 4.0), 2)[0].shape
    (16,)
    """
    values = np.asarray(table, np.float64) if isinstance(table, tuple) else _of_bytes(table)
    finite = np.abs(values[np.isfinite(values)])
    one = 2.0 ** -math.frexp(np.max(finite, initial=2.0**-100))[1]  # all entries below 1
    halves = (values * one).astype(np.float16).view(np.uint16).astype(np.int64)
    if 2 * bits <= 8:
        halves = (halves[:, None] << 16 | halves[None, :]).reshape(-1)  # low half first
    return halves.astype(np.uint32).view(np.int32), one


def _of_bytes(dtype: str) -> Float[np.ndarray, "256"]:
    """Return the values of all bytes as float8.

    NumPy is used, since nothing can be computed by JAX when tracing for a described GPU.
    """
    return np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float64)


def looked_up(ref, words: Sequence[Array], bits: int) -> list[Int32[Array, "r n"]]:
    """Return registers with pairs of the weights of each unit, in order.

    Args:
      ref: reference to the table.
      words: the words of each unit, in order.
      bits: number of bits per code.
    """
    unit, _ = layout.unit(bits)
    width = 2 * bits if 2 * bits <= 8 else bits
    found = []
    for at in range(0, unit * bits, width):
        word, low = divmod(at, 32)
        index = jax.lax.shift_right_logical(words[word], jnp.int32(low))
        if low + width > 32:
            index |= words[word + 1] << (32 - low)
        found.append(triton.load(ref.at[index & ((1 << width) - 1)]))
    if width == bits:
        found = [a | b << 16 for a, b in zip(found[::2], found[1::2], strict=True)]
    return found


def codebook_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    *,
    table: tuple[float, ...] | str,
    bits: int,
    group_size: int,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """Return the product; arguments as in `ops.codebook_matmul`."""
    shape, k = contraction.shape(x, activations), x.shape[1]
    unit, words = layout.unit(bits)
    depth = tiles.depth(unit, group_size, k, activations, 64)
    high, count = depth // unit, unit // 2
    values, one = entries(table, bits)

    def decode(refs, step: Array, tile: Array) -> Array:
        found = tiles.units(refs[0], codes.shape, tile, step * high, high, words)
        return lanes.weave(looked_up(refs[1], found, bits), 2)

    weights = contraction.Weights(
        n=codes.shape[1],
        arrays=[codes, jnp.asarray(values)],
        blocks=[((len(codes), shape.columns), True), (values.shape, False)],
        decode=decode,
        depth=depth,
        order=lanes.woven(lambda r, pair, lane: unit * r + 2 * pair + lane, high, count, 2),
        factor=None,
        shape=shape,
        offset=0.0,
        one=one,
        scale=scale,
        group_size=min(group_size, k),
    )
    return contraction.product(x, weights, activations, f"codebook_matmul_{bits}")


def serves(x, codes, scale, *, table, bits: int, group_size: int, activations="float") -> str:
    """Return "" if the kernel supports the arguments of `codebook_matmul`, otherwise the reason."""
    unit = layout.unit(bits)[0]
    if not tiles.depth(unit, group_size, x.shape[1], activations):
        return tiles.unfit(unit, group_size, activations)
    return triton.missing()


KERNELS = {"codebook_matmul": Kernel(codebook_matmul, serves)}
