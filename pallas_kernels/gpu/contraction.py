"""The GPU kernel of all formats: x times weights that a `decode` function makes in registers.

It computes w.T @ x.T with the weights on the left, because a tensor core instruction then takes 16
weights by as few as 8 rows of x, and reads the weights from registers. A program processes a block
of columns, a block of rows and a share of the channels (split K, since decoding has few columns for
the number of processors). XLA adds the shares in a fixed order, so results are deterministic.

Each step decodes a tile [columns, depth] of one group of rows. Codes have an offset (`lanes`), and
zero points are an offset too; their contribution, the offset times a sum of x, is subtracted.

A stack of matrices is one tall matrix, of which every block of rows meets the band of its expert.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import activations as forms
from pallas_kernels.gpu import rows, triton

PROGRAMS = 512  # number that keeps all processors of an H100 (132) or A100 (108) busy
LEAST_STEPS = 4  # minimum per program, so that pipelining its loads pays off


class Shape(NamedTuple):
    """The size of a program's block.

    It fits 128 registers: a thread holds rows * columns / (32 warps) sums, and as many within a
    step.

    Attributes:
      rows: number of rows of x.
      columns: number of columns of w.
      warps: number of warps.
      depth: maximum number of channels per step.
    """

    rows: int
    columns: int
    warps: int
    depth: int


DECODE = (Shape(8, 128, 4, 256), Shape(16, 128, 4, 128), Shape(32, 128, 8, 128))
PREFILL = Shape(64, 64, 8, 128)


def shape(x: Float[Array, "m k"], activations: str) -> Shape:
    """Return the block shape for the number of rows that x becomes.

    Args:
      x: activations [m, k].
      activations: how x is rounded.

    >>> [shape(jnp.ones((m, 1), jnp.bfloat16), "float").rows for m in (1, 16, 33, 200)]
    [8, 16, 64, 64]
    """
    return of_rows(len(x) * rows.parts(x.dtype, activations))


def of_rows(count: int) -> Shape:
    """Return the block shape for a number of rows.

    Args:
      count: number of rows.
    """
    return next((one for one in DECODE if count <= one.rows), PREFILL)


class Weights(NamedTuple):
    """A packed matrix [k, n], and how a program decodes tiles of it.

    Attributes:
      n: number of columns.
      arrays: the arrays that `decode` reads.
      blocks: for each array, the shape of a block and whether blocks advance with the columns.
      decode: (references, step, tile of columns) -> numbers [columns, places].
      depth: number of channels per step.
      order: channel of each place of a tile; a channel may have several places.
      factor: factors of x at each place; None for ones.
      shape: the block shape of a program.
      offset: what every number exceeds its code by.
      one: the value that the number 1 has in the dtype of `decode`.
      scale: [g, n], [g, 1] or [1, 1].
      group_size: number of channels that share a scale.
      zero: function of (reference, group, columns) that returns zero points, and their array; or
        None.
      integer: whether numbers are int8; otherwise they are float16.
      columns: position of each column within a tile; None if they are in order.
      experts: for a stack of matrices, the expert of each block of rows, -1 where there are no
        rows; else None. `arrays` then hold the matrices one below the other, of whole steps each,
        and `scale` and `zero` those of the blocks' experts.
    """

    n: int
    arrays: Sequence[Array]
    blocks: Sequence[tuple[tuple[int, int], bool]]
    decode: Callable
    depth: int
    order: np.ndarray
    factor: np.ndarray | None
    shape: Shape
    offset: float
    one: float
    scale: Float[Array, "g n"]
    group_size: int
    zero: tuple[Callable, Array] | None = None
    integer: bool = False
    columns: np.ndarray | None = None
    experts: Array | None = None

    @property
    def groups(self) -> int:
        """Number of groups of one matrix that have scales of their own."""
        return len(self.scale) // (1 if self.experts is None else len(self.experts))


def split(steps: int, programs: int) -> tuple[int, int]:
    """Return (number of shares, steps per share), with no share empty.

    Args:
      steps: number of steps along the channels.
      programs: number of programs without a split.

    >>> split(32, 32), split(32, 600), split(33, 8), split(3, 1)
    ((8, 4), (1, 32), (7, 5), (1, 3))
    """
    share = -(-steps // max(1, min(-(-PROGRAMS // programs), steps // LEAST_STEPS)))
    return -(-steps // share), share


def product(x: Float[Array, "m k"], weights: Weights, activations: str, name: str) -> Array:
    """Return x @ w, float32 [m, n].

    Args:
      x: activations [m, k].
      weights: the packed matrix.
      activations: how x is rounded.
      name: name of the kernel.
    """
    m, k = x.shape
    made = rows.make(x, activations, weights.integer)
    block, depth, places = weights.shape.rows, weights.depth, len(weights.order)
    steps, tall = -(-k // depth), -(-len(made.codes) // block)
    pad = ((0, tall * block - len(made.codes)), (0, steps * depth - k))
    codes = jnp.pad(made.codes, pad).reshape(-1, steps, depth)
    sums = jnp.sum(codes, axis=2, dtype=jnp.float32) * weights.one
    placed = codes[:, :, weights.order]
    if weights.factor is not None:
        placed = placed * weights.factor.astype(placed.dtype)
    one_scale = weights.scale.shape[0] == 1 and weights.experts is None
    stepwise = not one_scale or weights.zero is not None or made.scale is not None
    inputs = [placed.reshape(len(placed), -1)]
    blocks = [((block, steps * places), lambda i, j, r: (r, 0))]
    if stepwise:
        extra, where = _stepwise(weights, made, sums, pad[0][1], block, k)
        inputs, blocks = inputs + extra, blocks + where
    if weights.experts is not None:
        inputs.append(weights.experts)
        blocks.append((weights.experts.shape, lambda i, j, r: (0,)))
    columns = weights.shape.columns
    tiles = -(-weights.n // columns)
    shares, share = split(steps, tiles * tall)
    for array, (shape, along) in zip(weights.arrays, weights.blocks, strict=True):
        inputs.append(array)
        whole = (0,) * len(shape)
        blocks.append((shape, (lambda i, j, r: (0, i)) if along else lambda i, j, r, at=whole: at))
    body = _body(weights, steps, share, block, k, made.scale is not None, stepwise)
    out = triton.launch(
        body, name, grid=(tiles, shares, tall), inputs=inputs, blocks=blocks,
        out=(
            jax.ShapeDtypeStruct((shares, tiles * columns, tall * block), jnp.float32),
            (None, columns, block), lambda i, j, r: (j, i, r),
        ),
        warps=weights.shape.warps, stages=3 if block == 64 else 4,
    )  # fmt: skip
    y = jnp.sum(out, axis=0)
    if weights.columns is not None:
        y = y.reshape(tiles, -1, y.shape[-1])[:, weights.columns].reshape(y.shape)
    y = y[: weights.n, : len(made.codes)].T
    if not stepwise:
        y = y - weights.offset * jnp.sum(sums, axis=1)[: len(y), None]
        y = y * weights.scale.astype(jnp.float32)
    return jnp.sum(y.reshape(-1, m, weights.n), axis=0) * (made.unit / weights.one)


def _stepwise(weights: Weights, made: rows.Rows, sums: Array, short: int, block: int, k: int):
    """Return the inputs of a step's epilogue: sums of x, scales, zero points, scales of x."""
    steps, columns = sums.shape[1], weights.shape.columns
    scale = jnp.broadcast_to(weights.scale, (len(weights.scale), weights.n))
    scale = jnp.pad(scale, ((0, 0), (0, -weights.n % columns)), mode="edge")  # avoids a mask
    if weights.zero is None:
        sums = sums * weights.offset
    inputs = [sums.T, scale]
    blocks = [
        ((steps, block), lambda i, j, r: (0, r)),
        ((len(scale), columns), lambda i, j, r: (0, i)),
    ]
    if weights.zero is not None:
        inputs.append(weights.zero[1])
        blocks.append((weights.zero[1].shape, lambda i, j, r: (0, 0)))
    if made.scale is not None:
        own = jnp.pad(made.scale.T, ((0, 0), (0, len(sums) - len(made.codes))))
        inputs.append(own)
        blocks.append(((len(own), block), lambda i, j, r: (0, r)))
    return inputs, blocks


def _body(
    weights: Weights, steps: int, share: int, block: int, k: int, scaled_rows: bool, stepwise: bool
) -> Callable:
    """Return the kernel.

    Its arguments are references to x, the inputs of `_stepwise`, the experts (for a stack), the
    weights' arrays, and the output.
    """
    depth, places, columns = weights.depth, len(weights.order), weights.shape.columns

    def body(x_ref, *refs) -> None:
        *refs, out_ref = refs
        first = triton.program(1) * share
        last = jnp.minimum(first + share, steps)
        tile = triton.program(0)
        at = tile * columns + jnp.arange(columns)
        extra = 2 + (weights.zero is not None) + scaled_rows if stepwise else 0
        epilogue = refs[:extra]
        packed = refs[extra:]
        above, band = 0, 0  # steps and groups of the matrices above this block's
        if weights.experts is not None:
            experts, *packed = packed
            place = triton.program(2) % len(weights.experts)
            expert = triton.load(experts.at[place])
            above, band = expert * steps, place * weights.groups
            last = jnp.where(expert < 0, first, last)

        def part(step: Array) -> Array:
            w = weights.decode(packed, above + step, tile)
            x = triton.load(x_ref.at[:, triton.span(step * places, places)])
            exact = jnp.int32 if weights.integer else jnp.float32
            return jax.lax.dot_general(
                w, x.T, (((1,), (0,)), ((), ())), preferred_element_type=exact
            )

        def plain(step: Array, total: Array) -> Array:
            return total + part(step)

        def read(step: Array) -> tuple[Array, ...]:
            """Return the inputs of a step's epilogue."""
            group = band + step * depth // weights.group_size
            found = [
                triton.load(epilogue[0].at[step, :]),
                triton.load(epilogue[1].at[group, :]).astype(jnp.float32),
            ]
            if weights.zero is not None:
                found.append(weights.zero[0](epilogue[2], group, at).astype(jnp.float32))
            if scaled_rows:
                found.append(triton.load(epilogue[-1].at[step * depth // forms.BLOCK, :]))
            return tuple(found)

        def scaled(step: Array, carry: tuple) -> tuple:
            total, (sums, scale, *more) = carry
            following = read(jnp.minimum(step + 1, last - 1))  # loads during this computation
            y = part(step).astype(jnp.float32)
            if weights.zero is not None:
                y = triton.multiply_add(-(more[0] + weights.offset)[:, None], sums[None, :], y)
            elif weights.offset:
                y = y - sums[None, :]
            if scaled_rows:
                y = y * more[-1][None, :]
            return triton.multiply_add(y, scale[:, None], total), following

        start = jnp.zeros((columns, block), jnp.float32)
        if stepwise:
            total, _ = jax.lax.fori_loop(first, last, scaled, (start, read(first)))
        else:
            exact = jnp.int32 if weights.integer else jnp.float32
            total = jax.lax.fori_loop(first, last, plain, start.astype(exact))
        triton.store(out_ref.at[:, :], total.astype(jnp.float32))

    return body
