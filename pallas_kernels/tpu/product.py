"""x @ w for w whose codes are unpacked right before the matrix unit: the one grid of every format.

The unit multiplies slices of k exactly; scales meet the sums, not the weights, which would cost
the vector unit an operation for every weight.
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

from pallas_kernels.activations import BLOCK
from pallas_kernels.tpu import planes
from pallas_kernels.tpu.blocks import Blocks, choose

# Rows of sums, before and after planes are joined, that stay in registers while later products run.
REGISTERS = 120
_NN = (((1,), (0,)), ((), ()))


class Decoder(NamedTuple):
    """How weights come out of words.

    Attributes:
      planes: (words of each array, tables) -> the operands [rows, n] of the matrix unit whose
        sum, weighted, is w.
      weights: of the operands.
      bits: of each array of words, per weight.
      name: of the kernel.
      order: of the rows, if not that of k: what is done to the columns of x.
      slice: rows at a time at least.
      longest: and at most.
      width: columns at a time.
      slow: takes longer than the product: then words, not rows of x, wait for sums.
      ahead: slices at most that are under way at a time.
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
    """Statics of a kernel's body."""

    decoder: Decoder
    grouped: bool  # a column has a scale for every group of rows
    planes: int
    parts: int
    radix: int
    size: int  # rows of w in a product
    steps: int  # along k
    blocked: bool  # a row has a scale for every 256 channels


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
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """x @ (scale * the weights of the words), in float32.

    Args:
      scale: [g, n], or [1, 1]; groups of rows, of which the last may be short.
      group: rows that share scales. A multiple of 128, or a power of two; of no account if g = 1.
      tables: what the decoder looks up, whole in every step.
      unit: the type of the matrix unit's operands, one of `planes.UNITS`.
      blocks: by closed form if None.
    """
    (m, k), n = x.shape, words[0].shape[1]
    groups, blocked = scale.shape[0], activations == "int8/256"
    group = group if groups > 1 else 1 << 20
    size, parts = sliced(math.gcd(group, BLOCK) if blocked and group > BLOCK else group, decoder)
    count = planes.count(x.dtype, activations, unit)
    # A scale has a row of lanes of its own: 512 bytes for 256 channels.
    bytes_ = count * parts * jnp.dtype(unit).itemsize + 2 * blocked
    blocks = blocks or choose(m, k, n, stacked=count * parts, size=bytes_)
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
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (groups, n))
    scale, per = by_slice(scale, group, size, slices, grid[2])
    call = pl.pallas_call(
        partial(_body, shape=shape),
        grid=grid,
        in_specs=[
            pl.BlockSpec((stacked, blocks.k), lambda i, j, s: (i, s)),
            pl.BlockSpec((runs, blocks.m, 1), lambda i, j, s: (s * blocked, i, 0)),
            pl.BlockSpec((per, 1, blocks.n), lambda i, j, s: (s * (groups > 1), 0, j)),
            *[
                pl.BlockSpec((blocks.k * bits // 32, blocks.n), lambda i, j, s: (s, j))
                for bits in decoder.bits
            ],
            *[pl.BlockSpec(t.shape, lambda i, j, s: (0, 0)) for t in tables],
        ],
        out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(rows) * k * n,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (rows, scale, *words))
            + 4 * m * n,
            transcendentals=0,
        ),
        name=decoder.name,
        interpret=interpret,
    )
    return call(rows, row_scale, scale, *words, *tables)


def sliced(group: int, decoder: Decoder) -> tuple[int, int]:
    """Rows of w in a product, and the groups that share them."""
    if group % decoder.slice:
        return decoder.slice, decoder.slice // group
    sizes = (size for size in (512, 256) if size <= decoder.longest and group % size == 0)
    return next(sizes, decoder.slice), 1


def by_slice(
    scale: Float[Array, "g n"], group: int, size: int, slices: int, steps: int
) -> tuple[Float[Array, "s 1 n"], int]:
    """The scales of each step's slices of w, a slice's groups one after the other; how many a step.

    So a step knows where each lies when it is compiled: the compiler takes no index into a tile, of
    8 rows and 128 columns, that is not known then. A row is a tile of its own, for a block of fewer
    than 8 may not be cut out of tiles of 8. Past the last group all are zero. One group, of all
    rows, stays as it is, for all steps.
    """
    if len(scale) == 1:
        return scale[:, None], 1
    rows = jnp.repeat(scale, max(1, group // size), axis=0)
    per = slices * max(1, size // group)
    return jnp.pad(rows, ((0, max(0, per * steps - len(rows))), (0, 0)))[: per * steps, None], per


def _body(x_ref, r_ref, s_ref, *refs, shape: _Shape):
    """One step: a block of words with the rows of x that meet it, added to the block of y."""
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
    """Of slice j."""
    taken = []
    for ref, bits in zip(refs, shape.decoder.bits, strict=True):
        per = shape.size * bits // 32
        taken.append(ref[j * per : (j + 1) * per, columns])
    return taken


def _sums(rows: Array, weights: Sequence[Array], shape: _Shape) -> Array:
    """float32 [parts, m, n]: rows times weights, of all planes."""
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
    """The rows, but not before the total is there.

    The compiler's scheduler would run ahead with matrix products, whose sums the vector unit has
    no time for, and store them away: spills. No square is negative, which it cannot know. (The sign
    of one may be set where it is NaN.)
    """
    some = total[:8, :128]
    zero = (some * some < 0).astype(jnp.int32)
    words = rows if rows.dtype == jnp.int32 else pltpu.bitcast(rows, jnp.int32)
    r, c = words.shape
    zero = jnp.tile(zero, (-(-r // 8), c // 128))[:r]
    return words | zero if rows.dtype == jnp.int32 else pltpu.bitcast(words | zero, rows.dtype)


def _add(o_ref, columns, total: Array, row_scale: Any, step, steps: int) -> None:
    """Into the block of y, which the last step along k multiplies by the rows' scales."""
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
