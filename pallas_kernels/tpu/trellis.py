"""Products with tiles of the trellis code "vpu" (four weights per step), decoded in registers.

A vector register holds one word of each of eight tiles down a column of tiles, for 128 such
columns. Its bytes, widened, are the bytes of 4 x 8 steps. Each is multiplied once, and combined
with the product of the next word by an exclusive or. The result is four int8 weights per lane, in
the order of rows that the matrix unit requires: five vector operations for 4096 weights of one
column of the tiles (see `trellis`). A step therefore multiplies 16 matrices, one for every column c
of the tiles; these are the columns 16 t + c of w, reordered outside the kernel.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels.codecs import trellis
from pallas_kernels.tpu import planes
from pallas_kernels.tpu.blocks import whole

LANES = 128
ROWS = 8 * trellis.SIDE  # rows of w that a register of words covers
STACKED = 64  # rows of integers at a time; more do not fit the registers
STEP = 1024  # approximate rows of w per grid step: 2 M weights make its 200 cycles negligible
PAIR = 2  # columns of the tiles in one product: 256 lanes


class Blocks(NamedTuple):
    """Block sizes.

    Attributes:
      m: number of rows of x in a step.
      k: number of rows of w in a step.
      slice: number of rows of w in one product.
    """

    m: int
    k: int
    slice: int


def choose(m: int, k: int, groups: int, planes: int) -> Blocks:
    """Return blocks for x [m, k], each row of which is `planes` rows of integers.

    Args:
      m: number of rows of x.
      k: number of channels.
      groups: number of blocks of rows with a scale each.
      planes: number of integer rows per row of x.

    >>> choose(16, 4096, 1, 2), choose(200, 11008, 86, 2)
    (Blocks(m=16, k=1024, slice=512), Blocks(m=32, k=1024, slice=128))
    """
    rows = min(whole(STACKED // planes, planes), -(-m // 8) * 8)
    if groups == 1:
        steps = -(-k // STEP)
        return Blocks(rows, -(-k // steps // ROWS) * ROWS, 4 * ROWS)
    group = k // groups
    inside = max(d for d in range(ROWS, STEP + 1, ROWS) if d == ROWS or group % d == 0)
    size = next(size for size in (4 * ROWS, 2 * ROWS, ROWS) if group % size == 0)
    return Blocks(rows, group * (STEP // group) if group <= STEP else inside, size)


def trellis_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "k t"],
    scale: Float[Array, "b 1"],
    *,
    rates: tuple[int, ...],
    L: int,
    code: str,
    activations: str = "float",
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return x @ w for tiles of the code "vpu" at 2 bits.

    "float" activations are rounded to 16 bits relative to the largest of a row, as two int8 planes.

    Args:
      x, codes, scale, rates, L, code, activations: as in `ops.trellis_matmul`.
      blocks: sizes of the blocks, for tests; None computes them.
      interpret: whether to run in interpret mode, for tests.
    """
    (m, k), t, groups = x.shape, codes.shape[1], len(rates)
    split, row_scale = planes.split(x, activations, planes.INT8)
    count = len(split)
    b = blocks or choose(m, k, groups, count)
    tiles, steps, columns = -(-m // b.m), -(-k // b.k), -(-t // LANES)
    rows = jnp.pad(split, ((0, 0), (0, tiles * b.m - m), (0, steps * b.k - k)))
    rows = jnp.moveaxis(rows.reshape(count, tiles, b.m, -1), 1, 0).reshape(tiles * count * b.m, -1)
    # A block may extend past the edge of the words, but must not be larger than all of them.
    words = jnp.pad(codes, ((0, max(0, b.k - k)), (0, max(0, LANES - t))))
    unit = trellis.unit(code, L, trellis.CODES[code])
    group = k // groups if groups > 1 else steps * b.k
    y = pl.pallas_call(
        partial(_body, group=group, size=b.slice, count=count),
        grid=(tiles, columns, steps),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((count * b.m, b.k), lambda i, j, s: (i, s)),
            pl.BlockSpec((b.k, LANES), lambda i, j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((trellis.SIDE, b.m, LANES), lambda i, j, s: (0, i, j)),
        out_shape=jax.ShapeDtypeStruct((trellis.SIDE, tiles * b.m, words.shape[1]), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((trellis.SIDE, count * b.m, LANES), jnp.int32),
            pltpu.VMEM((2, b.slice, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * count * m * k * trellis.SIDE * t,
            bytes_accessed=4 * codes.size * tiles + rows.size * columns + 64 * m * t,
            transcendentals=0,
        ),
        interpret=interpret,
        name="trellis_matmul",
    )(scale[:, 0].astype(jnp.float32) * unit, rows, words)
    y = jnp.moveaxis(y[:, :m, :t], 0, -1).reshape(m, -1)
    return y * row_scale


# --- in the kernel --------------------------------------------------------------------------


def _body(scale, x, words, y, sums, turned, *, group: int, size: int, count: int):
    """Run one step, from words [k, 128] and x [planes * m, k] to y [16, m, 128].

    Sums are scaled at the end of each group.
    """
    step, depth = pl.program_id(2), words.shape[0]

    @pl.when(step == 0)
    def _():
        y[...] = jnp.zeros_like(y)
        sums[...] = jnp.zeros_like(sums)

    for i, first in enumerate(range(0, depth, size)):
        rows = min(size, depth - first)
        place = turned.at[i % 2]
        _turn(words, first, place, rows)
        _multiply(x[:, first : first + rows], place, sums, rows)
        last = first + rows
        if group < depth and last % group == 0:
            of = jnp.minimum(step * (depth // group) + last // group, scale.shape[0]) - 1
            _fold(sums, y, scale[of], count)
    if group >= depth:
        per = group // depth

        @pl.when(step % per == per - 1)
        def _():
            _fold(sums, y, scale[step // per], count)


def _turn(words, first: int, turned, rows: int) -> None:
    """Reorder words [16 tile + w, 128] of eight tiles at a time to [w, tile].

    The result has one register per w. Strided stores are used, because strided loads would cost
    vector operations.
    """
    for tile in range(rows // trellis.SIDE):
        for half in range(2):
            at = ROWS * (tile // 8) + tile % 8 + half * ROWS // 2
            from_ = first + trellis.SIDE * tile + 8 * half
            turned[pl.ds(at, 8, stride=8), :] = words[from_ : from_ + 8, :]


def _multiply(x: Int8[Array, "r k"], turned, sums, rows: int) -> None:
    """Add to sums [16, r, 128] the products of x and the columns of some rows of tiles."""
    starts = range(0, rows, ROWS)
    word = lambda w: jnp.concatenate([turned[i + 8 * w : i + 8 * w + 8, :] for i in starts])
    spread = _spread(word(0))
    columns = []
    for c in range(trellis.SIDE):
        if c + 1 < trellis.SIDE:
            after = word(c + 1)
        else:  # the first word again, shifted by a byte
            after = word(0)
            after = jax.lax.shift_right_logical(after, 8) | (after << 24)
        after = _spread(after)
        columns.append(_weights(spread, after))
        spread = after
        if len(columns) == PAIR:
            both = jnp.concatenate(columns, axis=1)
            product = jax.lax.dot_general(
                x, both, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
            )
            for i in range(PAIR):
                sums[c + 1 - PAIR + i] += product[:, i * LANES : (i + 1) * LANES]
            columns = []


def _spread(words: Int32[Array, "w l"]) -> Int32[Array, "4*w l"]:
    """Return each signed byte times a constant; two of the 32-bit products form a state's."""
    return pltpu.bitcast(words, jnp.int8).astype(jnp.int32) * jnp.int32(_signed(trellis.SPREAD))


def _weights(old: Int32[Array, "r l"], new: Int32[Array, "r l"]) -> Int8[Array, "4*r l"]:
    fields = (old ^ new) & jnp.int32(_signed(trellis.MASK))
    return pltpu.bitcast(fields * jnp.int32(trellis.FOLD), jnp.int8)


def _fold(sums, y, scale: Array, count: int) -> None:
    """Add a group's sums, times its scale, to y, and reset them.

    It is a loop so that the compiler does not keep the sums of a whole step in registers until
    here.
    """
    m = y.shape[1]

    def some(i: Array, _: None) -> None:
        for c in range(4):
            at = 4 * i + c
            total = sums[at, :m].astype(jnp.float32)
            for plane in range(1, count):
                low = sums[at, plane * m : (plane + 1) * m]
                total = total * planes.radix("float", planes.INT8) + low.astype(jnp.float32)
            y[at] += total * scale
            sums[at] = jnp.zeros_like(sums[at])

    jax.lax.fori_loop(0, trellis.SIDE // 4, some, None)


def _signed(word: int) -> int:
    """Return the int32 with the same bits."""
    return word - (word >> 31 << 32)
