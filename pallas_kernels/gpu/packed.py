"""Uniform codes of 2, 3, 4 and 8 bits, symmetric or with zero points; ternary ones are of 2 bits."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels import layout
from pallas_kernels.gpu import adapter, contraction, lanes, rows
from pallas_kernels.kernel import Kernel

LEAST_DEPTH = {"float": 16, "int8": 32, "int8/256": 32}  # of one tensor core instruction


def depth(unit: int, group_size: int, k: int, activations: str, most: int = 128) -> int:
    """Channels of a tile: a power of two, so many that it lies in one group; 0 if there is none.

    >>> depth(16, 128, 4096, "float"), depth(16, 96, 4096, "float"), depth(16, 40, 4096, "int8")
    (128, 32, 0)
    """
    fits = group_size & -group_size if group_size < k else 1 << 30
    if activations == "int8/256":
        fits = min(fits, forms.BLOCK)
    size = min(fits, most, 16 * unit, 1 << (k - 1).bit_length())
    least = max(unit, LEAST_DEPTH[activations])
    return 0 if fits < least else max(size, least)


def weights(
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    zero: Int32[Array, "g wn"] | None,
    *,
    bits: int,
    group_size: int,
    activations: str,
    k: int,
    shape: contraction.Shape,
) -> contraction.Weights:
    """Words of uniform codes for `contraction`."""
    form = lanes.Lanes(bits, 2 if activations == "float" else 4)
    high = depth(form.unit, group_size, k, activations, shape.depth) // form.unit
    inner = 2 if high == 4 and form.steps > 1 else 1
    place = lambda row, step, lane: form.unit * row + form.steps * lane + step
    order = lanes.woven(place, high, form.steps, form.lanes, inner)
    shift = np.array([at for _, at in form.shifts()])
    low = lanes.woven(lambda row, step, lane: shift[step], high, form.steps, form.lanes, inner)

    def decode(refs, step: Array, mask: Array | None) -> Array:
        (ref,) = refs
        words = units(ref, step * high, high, form.words, len(codes), mask)
        return lanes.weave(form.numbers(words), form.lanes, inner)

    return contraction.Weights(
        n=codes.shape[1],
        arrays=[codes],
        blocks=[((len(codes), shape.columns), True)],
        decode=decode,
        order=order,
        factor=None if form.lanes == 4 else np.exp2(-low),
        shape=shape,
        offset=form.offset,
        one=rows.ONE if form.lanes == 2 else 1.0,
        scale=scale,
        group_size=min(group_size, k),
        zero=None if zero is None else (partial(along, bits=bits), zero),
    )


def units(
    ref, start: Array, count: int, words: int, length: int, mask: Array | None
) -> list[Int32[Array, "count columns"]]:
    """The words of units start ... start + count of a block, one array for each word of a unit.

    Args:
      length: words down a column; past it is zero.
      mask: of columns that there are.
    """
    shape = (count, ref.shape[1])
    found = []
    for i in range(words):
        row = ((start + jnp.arange(count)) * words + i)[:, None]
        here = row < length if length % (count * words) else None
        if mask is not None:
            here = mask[None, :] if here is None else here & mask[None, :]
        if here is not None:
            here = jnp.broadcast_to(here, shape)
        at = (adapter.span(start, count), slice(None))
        if words > 1:
            at = tuple(jnp.broadcast_to(t, shape) for t in (row, jnp.arange(shape[1])))
        found.append(adapter.load(ref.at[at], here))
    return found


def along(ref, row: Array, columns: Int32[Array, "c"], *, bits: int) -> Int32[Array, "c"]:
    """Codes of a row of words packed along n, at these columns."""
    word, at = columns * bits >> 5, columns * bits & 31
    last = ref.shape[1] - 1
    code = jax.lax.shift_right_logical(ref[row, jnp.minimum(word, last)], at)
    if 32 % bits:
        code |= ref[row, jnp.minimum(word + 1, last)] << 1 << (31 - at)
    return code << (32 - bits) >> (32 - bits)


def packed_matmul(x, codes, scale, zero, *, bits: int, group_size: int, activations: str = "float"):
    """See `reference.packed_matmul`."""
    made = weights(
        codes, scale, zero, bits=bits, group_size=group_size, activations=activations,
        k=x.shape[1], shape=contraction.shape(x, activations),
    )  # fmt: skip
    return contraction.product(x, made, activations, f"packed_matmul_{bits}")


def serves(x, codes, scale, zero, *, bits: int, group_size: int, activations: str = "float") -> str:
    """"", or why these arguments are not served."""
    least = max(layout.unit(bits)[0], LEAST_DEPTH[activations])
    if not depth(layout.unit(bits)[0], group_size, x.shape[1], activations):
        return f"on a GPU, {least} must divide the group size, {group_size}"
    return adapter.missing()


def ternary_matmul(x, codes, scale, *, group_size: int, activations: str = "float"):
    """See `reference.ternary_matmul`."""
    return packed_matmul(
        x, codes, scale, None, bits=2, group_size=group_size, activations=activations
    )


def serves_ternary(x, codes, scale, *, group_size: int, activations: str = "float") -> str:
    """"", or why these arguments are not served."""
    return serves(x, codes, scale, None, bits=2, group_size=group_size, activations=activations)


KERNELS = {
    "packed_matmul": Kernel(packed_matmul, serves),
    "ternary_matmul": Kernel(ternary_matmul, serves_ternary),
}
