"""Uniform codes of 2, 3, 4 and 8 bits, with or without zero points; ternary codes take 2 bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import row_tiles
from pallas_kernels.codecs import layout
from pallas_kernels.gpu import contraction, lanes, rows, tiles, triton
from pallas_kernels.kernel import Kernel


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
    """Return the words of uniform codes as `contraction.Weights`.

    Args:
      codes, scale, zero, bits, group_size, activations: as in `ops.packed_matmul`.
      k: number of rows.
      shape: the block shape of a program.
    """
    form = lanes.Lanes(bits, 2 if activations == "float" else 4)
    high = tiles.depth(form.unit, group_size, k, activations, shape.depth) // form.unit
    inner = 2 if high == 4 and form.steps > 1 else 1
    place = lambda row, step, lane: form.unit * row + form.steps * lane + step
    order = lanes.woven(place, high, form.steps, form.lanes, inner)
    shift = np.array([at for _, at in form.shifts()])
    low = lanes.woven(lambda row, step, lane: shift[step], high, form.steps, form.lanes, inner)

    def decode(refs, step: Array, tile: Array) -> Array:
        words = tiles.units(refs[0], codes.shape, tile, step * high, high, form.words)
        return lanes.weave(form.numbers(words), form.lanes, inner)

    return contraction.Weights(
        n=codes.shape[1],
        arrays=[codes],
        blocks=[((len(codes), shape.columns), True)],
        decode=decode,
        order=order,
        factor=None if form.lanes == 4 else np.exp2(-low),
        depth=form.unit * high,
        shape=shape,
        offset=form.offset,
        one=rows.ONE if form.lanes == 2 else 1.0,
        scale=scale,
        group_size=min(group_size, k),
        zero=None if zero is None else (partial(along, bits=bits, n=scale.shape[1]), zero),
        integer=form.lanes == 4,
    )


def along(ref, row: Array, columns: Int32[Array, "c"], *, bits: int, n: int) -> Int32[Array, "c"]:
    """Return the codes at given columns of a row of n packed codes.

    Columns past the last one read the last code.

    Args:
      ref: reference to the words.
      row: index of the row.
      columns: column indices.
      bits: number of bits per code.
      n: number of columns.
    """
    columns = jnp.minimum(columns, n - 1)
    word, at = columns * bits >> 5, columns * bits & 31
    last = ref.shape[1] - 1
    code = jax.lax.shift_right_logical(ref[row, jnp.minimum(word, last)], at)
    if 32 % bits:
        code |= ref[row, jnp.minimum(word + 1, last)] << 1 << (31 - at)
    return code << (32 - bits) >> (32 - bits)


def packed_matmul(x, codes, scale, zero, *, bits: int, group_size: int, activations: str = "float"):
    """Return the product; arguments as in `ops.packed_matmul`."""
    made = weights(
        codes, scale, zero, bits=bits, group_size=group_size, activations=activations,
        k=x.shape[1], shape=contraction.shape(x, activations),
    )  # fmt: skip
    return contraction.product(x, made, activations, f"packed_matmul_{bits}")


def grouped_packed_matmul(
    x, codes, scale, zero, group_sizes, *, bits: int, group_size: int, activations: str = "float"
):
    """Return the products of rows with the matrices of their experts.

    Args:
      x, bits, group_size, activations: as in `ops.packed_matmul`.
      codes, scale, zero: as in `ops.packed_matmul`, each with a leading axis of experts.
      group_sizes: number of rows of each expert.
    """
    (m, k), (experts, _, n) = x.shape, codes.shape
    shape = _of_tiles(m, k, experts)
    cut = row_tiles.cut(group_sizes, m, shape.rows)
    band = lambda a: a[cut.experts].reshape(-1, a.shape[-1])
    made = weights(
        codes.reshape(-1, n), band(scale), None if zero is None else band(zero), bits=bits,
        group_size=group_size, activations=activations, k=k, shape=shape,
    )  # fmt: skip
    held = jnp.arange(len(cut.experts)) < cut.used
    made = made._replace(experts=jnp.where(held, cut.experts, -1))
    rows = cut.gathered(x).reshape(-1, k)
    y = contraction.product(rows, made, activations, f"grouped_packed_matmul_{bits}")
    return cut.scattered(y.reshape(-1, shape.rows, n))


def _of_tiles(m: int, k: int, experts: int) -> contraction.Shape:
    """Return the block shape of tiles of rows; steps divide k, or bands would not be whole."""
    shape = contraction.of_rows(row_tiles.size(m, experts))
    return shape._replace(depth=min(shape.depth, k & -k))


def serves_grouped(x, *arrays, bits: int, group_size: int, activations: str = "float") -> str:
    """Return "" if the kernel supports the arguments of `grouped_packed_matmul`, or the reason."""
    *stacks, group_sizes = arrays
    m, k = x.shape
    most = _of_tiles(m, k, len(group_sizes)).depth
    depth = tiles.depth(layout.unit(bits)[0], group_size, k, activations, most)
    if depth > most:
        return f"on a GPU, experts of k = {k} rows must be multiples of {depth}"
    return serves(
        x, *row_tiles.one(stacks), bits=bits, group_size=group_size, activations=activations
    )


def serves(x, codes, scale, zero, *, bits: int, group_size: int, activations: str = "float") -> str:
    """Return "" if the kernel supports the arguments of `packed_matmul`, otherwise the reason."""
    unit = layout.unit(bits)[0]
    if not tiles.depth(unit, group_size, x.shape[1], activations):
        return tiles.unfit(unit, group_size, activations)
    return triton.missing()


def ternary_matmul(x, codes, scale, *, group_size: int, activations: str = "float"):
    """Return the product; arguments as in `ops.ternary_matmul`."""
    return packed_matmul(
        x, codes, scale, None, bits=2, group_size=group_size, activations=activations
    )


def serves_ternary(x, codes, scale, *, group_size: int, activations: str = "float") -> str:
    """Return "" if the kernel supports the arguments of `ternary_matmul`, otherwise the reason."""
    return serves(x, codes, scale, None, bits=2, group_size=group_size, activations=activations)


KERNELS = {
    "packed_matmul": Kernel(packed_matmul, serves),
    "grouped_packed_matmul": Kernel(grouped_packed_matmul, serves_grouped),
    "ternary_matmul": Kernel(ternary_matmul, serves_ternary),
}
