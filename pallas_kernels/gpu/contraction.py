"""The one kernel of the backend: x times weights that a `decode` function makes in registers.

It computes w.T @ x.T, the weights on the left: a tensor core then wants 16 weights and as few as 8
rows of x, and takes the weights from registers. A program owns a block of columns, a block of rows
and a share of the channels (split K: in decoding there are few columns for many processors); the
shares are added up, in order, by XLA, hence twice the same bits.

Each step decodes a tile [columns, depth] of one group of rows. Codes are offset (`lanes`), and zero
points are an offset too: what they add is the offset times a sum of x, which is subtracted.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import activations as forms
from pallas_kernels.gpu import rows, triton

PROGRAMS = 512  # that keep all processors of an H100 (132) or A100 (108) at work
LEAST_STEPS = 4  # of a program, so that its pipeline of loads pays


class Shape(NamedTuple):
    """Rows of x and columns of w that a program takes, its warps, the most channels of a step.

    What fits 128 registers: a thread holds rows * columns / (16 warps) sums, and as many in a step.
    """

    rows: int
    columns: int
    warps: int
    depth: int


DECODE = (Shape(8, 128, 4, 256), Shape(16, 128, 4, 128), Shape(32, 128, 8, 128))
PREFILL = Shape(64, 64, 8, 128)


def shape(x: Float[Array, "m k"], activations: str) -> Shape:
    """By the rows that x becomes.

    >>> [shape(jnp.ones((m, 1), jnp.bfloat16), "float").rows for m in (1, 16, 33, 200)]
    [8, 16, 64, 64]
    """
    count = len(x) * rows.parts(x.dtype, activations)
    return next((one for one in DECODE if count <= one.rows), PREFILL)


class Weights(NamedTuple):
    """A packed matrix [k, n] and how a program decodes tiles of it.

    Attributes:
      arrays: what `decode` reads.
      blocks: of each array, a block's shape and whether the blocks follow the columns.
      decode: (references, step, tile of columns) -> numbers [columns, places].
      depth: channels of a step.
      order: channel of each place of a tile; one may have several.
      factor: what the places' x are multiplied by; None for ones.
      shape: of a program.
      offset: what every number is too large by.
      one: what the number 1 of `decode` is in its dtype.
      scale: [g, n], [g, 1] or [1, 1].
      group_size: channels that share a scale.
      zero: zero points of each group, a function of (reference, group, columns); and their array.
      integer: numbers are int8; else float16.
      columns: where in a tile each of its columns stands; None for in order.
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


def split(steps: int, programs: int) -> tuple[int, int]:
    """(shares, steps of a share), none empty, where there are so many programs without.

    >>> split(32, 32), split(32, 600), split(33, 8), split(3, 1)
    ((8, 4), (1, 32), (7, 5), (1, 3))
    """
    share = -(-steps // max(1, min(-(-PROGRAMS // programs), steps // LEAST_STEPS)))
    return -(-steps // share), share


def product(x: Float[Array, "m k"], weights: Weights, activations: str, name: str) -> Array:
    """x @ w, float32 [m, n]."""
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
    one_scale = weights.scale.shape[0] == 1
    stepwise = not one_scale or weights.zero is not None or made.scale is not None
    inputs = [placed.reshape(len(placed), -1)]
    blocks = [((block, steps * places), lambda i, j, r: (r, 0))]
    if stepwise:
        extra, where = _stepwise(weights, made, sums, pad[0][1], block, k)
        inputs, blocks = inputs + extra, blocks + where
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
    """Inputs that a step's epilogue reads: sums of x, scales, zero points, scales of x."""
    steps, columns = sums.shape[1], weights.shape.columns
    scale = jnp.broadcast_to(weights.scale, (len(weights.scale), weights.n))
    scale = jnp.pad(scale, ((0, 0), (0, -weights.n % columns)), mode="edge")  # read without a mask
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
    """The kernel: references to x, what `_stepwise` adds, the weights' arrays, the output."""
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

        def part(step: Array) -> Array:
            w = weights.decode(packed, step, tile)
            x = triton.load(x_ref.at[:, triton.span(step * places, places)])
            exact = jnp.int32 if weights.integer else jnp.float32
            return jax.lax.dot_general(
                w, x.T, (((1,), (0,)), ((), ())), preferred_element_type=exact
            )

        def plain(step: Array, total: Array) -> Array:
            return total + part(step)

        def read(step: Array) -> tuple[Array, ...]:
            """What the epilogue of a step needs."""
            group = step * depth // weights.group_size
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
            following = read(jnp.minimum(step + 1, last - 1))  # on its way while this one computes
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
