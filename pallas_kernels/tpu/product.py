"""The TPU kernel of most formats: x @ w, with codes unpacked right before the matrix unit.

The unit multiplies slices of k exactly. Scales are applied to the sums, not to the weights, which
would take the vector unit an operation per weight.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Num

from pallas_kernels import row_tiles
from pallas_kernels.activations import BLOCK
from pallas_kernels.row_tiles import RowTiles
from pallas_kernels.tpu import planes
from pallas_kernels.tpu.blocks import STACKED, Blocks, choose, whole

# Rows of sums, before and after planes are combined, kept in registers while later products run.
REGISTERS = 120
_NN = (((1,), (0,)), ((), ()))


class Decoder(NamedTuple):
    """How weights are decoded from words.

    Attributes:
      planes: (words of each array, tables) -> the operands [rows, n] of the matrix unit, whose
        weighted sum is w.
      weights: the weights of the operands.
      bits: for each array of words, number of bits per weight; 0 for an array [1, n], which has a
        word for every column.
      name: name of the kernel.
      order: how the columns of x are reordered to match the order of the decoded rows; None if that
        is the order of k.
      slice: minimum number of rows at a time.
      longest: maximum number of rows at a time.
      width: number of columns at a time.
      slow: whether decoding takes longer than the product. If so, words, not rows of x, wait for
        sums.
      ahead: maximum number of slices in progress at a time.
    """

    planes: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]]
    weights: tuple[float, ...]
    bits: tuple[int, ...]
    name: str
    order: planes.Order | None = None
    slice: int = 128
    longest: int = 512
    width: int = 512
    slow: bool = False
    ahead: int = 5


class _Shape(NamedTuple):
    """Static parameters of a kernel's body."""

    decoder: Decoder
    grouped: bool  # whether a column has a scale for every group of rows
    planes: int
    parts: int
    radix: int
    size: int  # number of rows of w in a product
    steps: int  # number of steps along k
    blocked: bool  # whether a row has a scale for every 256 channels


def product(
    x: Float[Array, "m k"],
    words: Sequence[Int32[Array, "_ n"]],
    scale: Float[Array, "g n"],
    decoder: Decoder,
    *,
    group: int,
    activations: str,
    unit: str,
    tables: Sequence[Array] = (),
    blocks: Blocks | None = None,
    tiles: RowTiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return x @ (scale * the weights of the words), float32 [m, n].

    With `tiles`, every tile of rows of x meets the words of its expert, which the kernel takes from
    the stack; tiles without rows are skipped, and their results are undefined.

    Args:
      x: activations [m, k]; with `tiles`, the rows of all tiles.
      words: the arrays of words, with `tiles` [e, w, n].
      scale: [g, n], one row per group of rows of w, of which the last may be short; or [1, 1]. With
        `tiles` [t, g, n], the scales of each tile's expert.
      decoder: how weights are decoded from words.
      group: number of rows that share scales, a multiple of 128 or a power of two; ignored if g =
        1.
      activations: how x is rounded.
      unit: dtype of the matrix unit's operands, one of `planes.UNITS`.
      tables: arrays that the decoder looks up, available whole in every step.
      blocks: sizes of the blocks; None computes them. With `tiles`, they have the rows of a tile.
      tiles: the tiles of rows sorted by expert, for a stack of matrices.
      interpret: whether to run in interpret mode, on any device.
    """
    (m, k), n = x.shape, words[0].shape[-1]
    groups, blocked = scale.shape[-2], activations == "int8/256"
    group = group if groups > 1 else 1 << 20
    size, parts = _sliced(group, activations, decoder)
    count = planes.count(x.dtype, activations, unit)
    blocks = blocks or fitting(
        m, k, n, x.dtype, decoder, groups=groups, group=group, activations=activations, unit=unit
    )
    grid = blocks.steps(m, k, n)
    rows, row_scale = planes.split(x, activations, unit)
    rows = planes.stack(
        rows, tile=blocks.m, k=grid[2] * blocks.k, size=size, parts=parts, order=decoder.order
    )
    runs, slices = blocks.k // BLOCK if blocked else 1, blocks.k // size
    row_scale = row_scale.T[..., None]
    more = grid[2] * runs - len(row_scale) if blocked else 0
    row_scale = jnp.pad(row_scale, ((0, more), (0, -m % blocks.m), (0, 0)))
    shape = _Shape(
        decoder, groups > 1, count, parts, planes.radix(activations, unit), size, grid[2], blocked
    )
    stacked = blocks.m * count * parts
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (*scale.shape[:-2], groups, n))
    scale, per = by_slice(scale, group, size, slices, grid[2])
    of_weight = _Weight(groups > 1, grid, stack=tiles is not None)
    call = pl.pallas_call(
        partial(_body if tiles is None else _tile, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if tiles is None else 2,
            grid=grid,
            in_specs=[
                pl.BlockSpec((stacked, blocks.k), lambda i, j, s, *_: (i, s)),
                pl.BlockSpec((runs, blocks.m, 1), lambda i, j, s, *_: (s * blocked, i, 0)),
                of_weight.scales(per, blocks.n),
                *[of_weight.words(blocks.k * bits // 32, blocks.n) for bits in decoder.bits],
                *[pl.BlockSpec(t.shape, lambda *_: (0, 0)) for t in tables],
            ],
            out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, s, *_: (i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(rows) * k * n,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (rows, scale))
            + sum(4 * math.prod(w.shape[-2:]) for w in words) * (1 if tiles is None else grid[0])
            + 4 * m * n,
            transcendentals=0,
        ),
        name=decoder.name,
        interpret=interpret,
    )
    prefetched = () if tiles is None else (tiles.experts, tiles.used)
    return call(*prefetched, rows, row_scale, scale, *words, *tables)


class _Weight(NamedTuple):
    """Where the blocks of a weight are, or those of the weights of a stack that tiles meet.

    A tile without rows names the block that the tile before it ended with, which is there already.

    Attributes:
      grouped: whether a column has a scale for every group of rows.
      grid: the grid of the kernel.
      stack: whether there are tiles, each with an expert.
    """

    grouped: bool
    grid: tuple[int, int, int]
    stack: bool

    def words(self, rows: int, columns: int) -> pl.BlockSpec:
        """Return the specification of blocks of words."""
        if not rows:
            return pl.BlockSpec((1, columns), lambda i, j, s: (0, j))
        if not self.stack:
            return pl.BlockSpec((rows, columns), lambda i, j, s: (s, j))

        def place(i: Any, j: Any, s: Any, experts: Any, used: Any) -> tuple:
            held = i < used[0]
            last = (self.grid[2] - 1, self.grid[1] - 1)
            return experts[i], jnp.where(held, s, last[0]), jnp.where(held, j, last[1])

        return pl.BlockSpec((None, rows, columns), place)

    def scales(self, rows: int, columns: int) -> pl.BlockSpec:
        """Return the specification of blocks of scales."""
        if not self.stack:
            return pl.BlockSpec((rows, 1, columns), lambda i, j, s: (s * self.grouped, 0, j))
        place = lambda i, j, s, *_: (i, s * self.grouped, 0, j)
        return pl.BlockSpec((None, rows, 1, columns), place)


def fitting(
    m: int, k: int, n: int, dtype: jnp.dtype, decoder: Decoder, *, groups: int, group: int,
    activations: str, unit: str,
) -> Blocks:  # fmt: skip
    """Return the sizes of the blocks of a product; arguments as in `product`.

    Args:
      m, k, n: shape of the product.
      dtype: dtype of x.
      decoder: how weights are decoded from words.
      groups: number of groups.
      group, activations, unit: as in `product`.
    """
    stacked, bytes_ = _stacked(dtype, decoder, groups, group, activations, unit)
    return choose(m, k, n, stacked=stacked, size=bytes_)


def tile(
    m: int, experts: int, dtype: jnp.dtype, decoder: Decoder, *, groups: int, group: int,
    activations: str, unit: str,
) -> int:  # fmt: skip
    """Return the number of rows of the tiles of a grouped product.

    Args:
      m: number of rows.
      experts: number of experts.
      dtype: dtype of x.
      decoder: how weights are decoded from words.
      groups: number of groups.
      group, activations, unit: as in `product`.
    """
    stacked, _ = _stacked(dtype, decoder, groups, group, activations, unit)
    return whole(min(STACKED // stacked, row_tiles.size(m, experts)), stacked)


def _stacked(
    dtype: jnp.dtype, decoder: Decoder, groups: int, group: int, activations: str, unit: str
) -> tuple[int, int]:
    """Return the rows in the matrix unit for each row of x, and the bytes per entry of x."""
    _, parts = _sliced(group if groups > 1 else 1 << 20, activations, decoder)
    stacked = planes.count(dtype, activations, unit) * parts
    # Each scale takes a row of lanes of its own: 512 bytes for 256 channels.
    return stacked, stacked * jnp.dtype(unit).itemsize + 2 * (activations == "int8/256")


def _sliced(group: int, activations: str, decoder: Decoder) -> tuple[int, int]:
    """Return `sliced` of groups that share scales of w and of x."""
    blocked = activations == "int8/256" and group > BLOCK
    return sliced(math.gcd(group, BLOCK) if blocked else group, decoder)


def sliced(group: int, decoder: Decoder) -> tuple[int, int]:
    """Return the number of rows of w in a product, and the number of groups that share them.

    Args:
      group: number of rows that share scales.
      decoder: how weights are decoded from words.
    """
    if group % decoder.slice:
        return decoder.slice, decoder.slice // group
    sizes = (size for size in (512, 256) if size <= decoder.longest and group % size == 0)
    return next(sizes, decoder.slice), 1


def by_slice(
    scale: Float[Array, "*t g n"], group: int, size: int, slices: int, steps: int
) -> tuple[Float[Array, "*t s 1 n"], int]:
    """Return the scales of each step's slices of w, group by group, and their number per step.

    Each step then knows at compile time where each scale is; the compiler rejects dynamic indices
    into a tile of 8 rows and 128 columns. Each row is a tile of its own, because a block of fewer
    than 8 rows may not be cut out of tiles of 8. Past the last group all scales are zero. A single
    group of all rows is returned as it is, for all steps.

    Args:
      scale: [..., g, n].
      group: number of rows that share scales.
      size: number of rows of w in a product.
      slices: number of slices per step.
      steps: number of steps along k.
    """
    if scale.shape[-2] == 1:
        return scale[..., None, :], 1
    rows = jnp.repeat(scale, max(1, group // size), axis=-2)
    per = slices * max(1, size // group)
    more = [(0, 0)] * (scale.ndim - 2) + [(0, max(0, per * steps - rows.shape[-2])), (0, 0)]
    return jnp.pad(rows, more)[..., : per * steps, None, :], per


def _tile(experts, used, *refs, shape: _Shape):
    """Run one step of a tile of rows, if it has any."""

    @pl.when(pl.program_id(0) < used[0])
    def _() -> None:
        _body(*refs, shape=shape)


def _body(x_ref, r_ref, s_ref, *refs, shape: _Shape):
    """Run one step: multiply a block of words by the matching rows of x, and add to y."""
    *refs, o_ref = refs
    words, tables = refs[: len(shape.decoder.bits)], refs[len(shape.decoder.bits) :]
    step = pl.program_id(2)
    width = min(o_ref.shape[1], shape.decoder.width if x_ref.shape[0] <= 64 else 256)
    ahead = max(1, min(shape.decoder.ahead, REGISTERS // (x_ref.shape[0] + o_ref.shape[0])))
    history: list[Array] = []
    for start in range(0, o_ref.shape[1], width):
        columns = pl.ds(start, min(width, o_ref.shape[1] - start))
        total = jnp.zeros((o_ref.shape[0], columns.size), jnp.float32)
        for j in range(x_ref.shape[1] // shape.size):
            rows = x_ref[:, j * shape.size : (j + 1) * shape.size]
            taken = _words(words, j, columns, shape)
            if len(history) >= ahead and shape.decoder.slow:
                taken = [_after(w, history[-ahead]) for w in taken]
            elif len(history) >= ahead:
                rows = _after(rows, history[-ahead])
            weights = shape.decoder.planes(taken, [t[...] for t in tables])
            sums = _sums(rows, weights, shape)
            for part in range(shape.parts):
                scaled = sums[part]
                if shape.grouped:
                    scaled = scaled * s_ref[j * shape.parts + part, :, columns]
                if shape.blocked:
                    scaled = scaled * r_ref[j * shape.size // BLOCK]
                total = total + scaled
            history.append(total)
        last = 1.0 if shape.blocked else r_ref[0]
        if not shape.grouped:
            last = last * s_ref[0, :, columns]
        _add(o_ref, columns, total, last, step, shape.steps)


def _words(refs, j: int, columns, shape: _Shape) -> list[Array]:
    """Return the words of slice j, and those of its columns."""
    taken = []
    for ref, bits in zip(refs, shape.decoder.bits, strict=True):
        per = shape.size * bits // 32
        taken.append(ref[j * per : (j + 1) * per, columns] if bits else ref[:, columns])
    return taken


def _sums(rows: Array, weights: Sequence[Array], shape: _Shape) -> Array:
    """Return float32 [parts, m, n]: rows times weights, summed over planes."""
    total = 0.0
    exact = jnp.int32 if rows.dtype == jnp.int8 else jnp.float32
    for weight, w in zip(shape.decoder.weights, weights, strict=True):
        p = jax.lax.dot_general(rows, w, _NN, preferred_element_type=exact)
        p = p.reshape(shape.planes, shape.parts, -1, p.shape[1])
        value = p[0]
        for i in range(1, shape.planes):
            value = (value << 8) + p[i] if exact == jnp.int32 else value * shape.radix + p[i]
        value = value.astype(jnp.float32)
        total = total + (value if weight == 1 else value * weight)
    return total


def _after(rows: Num[Array, "r k"], total: Float[Array, "m n"]) -> Num[Array, "r k"]:
    """Return the rows, but not before the total is computed.

    Otherwise the compiler's scheduler would run matrix products ahead of the vector unit and spill
    their sums. The dependence is a test for a negative square, which never holds, but the compiler
    cannot know that. (The sign of a NaN square may be set.)
    """
    some = total[:8, :128]
    zero = (some * some < 0).astype(jnp.int32)
    words = rows if rows.dtype == jnp.int32 else pltpu.bitcast(rows, jnp.int32)
    r, c = words.shape
    zero = jnp.tile(zero, (-(-r // 8), c // 128))[:r]
    return words | zero if rows.dtype == jnp.int32 else pltpu.bitcast(words | zero, rows.dtype)


def _add(o_ref, columns, total: Array, row_scale: Any, step, steps: int) -> None:
    """Add to the block of y, which the last step along k multiplies by the rows' scales."""
    if steps == 1:
        o_ref[:, columns] = total * row_scale
        return

    @pl.when(step == 0)
    def _() -> None:
        o_ref[:, columns] = total

    @pl.when((step > 0) & (step < steps - 1))
    def _() -> None:
        o_ref[:, columns] += total

    @pl.when((step > 0) & (step == steps - 1))
    def _() -> None:
        o_ref[:, columns] = (o_ref[:, columns] + total) * row_scale
