"""g @ w.T for scalar codebooks: the cotangent of x, on the packed words of w.

A program computes a tile of the channels of w, all of one group of rows, for a block of rows of g.
It looks codes up as `codebook` does, and scales g rather than w, by one multiplication for each
entry of g. XLA adds the shares of the columns in a fixed order, so results are deterministic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.codecs import layout
from pallas_kernels.gpu import codebook, contraction, lanes, rows, tiles, triton
from pallas_kernels.kernel import Kernel

COLUMNS = 32  # of w in a step
DEPTH = 64  # channels of a program, at most


def codebook_matmul_transposed(
    g: Float[Array, "m n"],
    codes: Array,
    scale: Float[Array, "g n"],
    *,
    table: tuple[float, ...] | str,
    bits: int,
    group_size: int,
    k: int,
) -> Float[Array, "m k"]:
    """Return g @ (scale * table[code]).T; see "codebook_matmul_transposed" in `reference.OPS`.

    Entries of the table, and scaled g in two parts, are float16.

    Args:
      g: [m, n], float32, bfloat16 or float16.
      codes, scale, table, bits, group_size: as in `ops.codebook_matmul`.
      k: number of rows of w.
    """
    (m, n), groups = g.shape, len(scale)
    unit, words = layout.unit(bits)
    depth = tiles.depth(unit, group_size, k, "float", DEPTH)
    high = depth // unit
    values, one = codebook.entries(table, bits)
    block = next((size for size in (16, 32) if m <= size), 64)
    deep, tall, steps = -(-k // depth), -(-m // block), -(-n // COLUMNS)
    made = rows.make(g.astype(jnp.float32), "float")  # two parts, of rows of at most 2**15
    first, rest = jnp.split(made.codes.astype(jnp.float32), 2)
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (groups, n))
    size = jnp.where(jnp.isfinite(scale), jnp.abs(scale), 0)
    largest = jnp.maximum(jnp.max(size), 2.0**-100)
    pad = ((0, 0), (0, steps * COLUMNS - n))
    whole = jnp.pad(first + rest, ((0, tall * block - m), pad[1]))
    scales = jnp.pad(scale / largest, pad)
    shares, share = contraction.split(steps, deep * tall)

    def body(g_ref, s_ref, w_ref, t_ref, out_ref) -> None:
        tile = triton.program(0)
        start = triton.program(1) * share
        group = jnp.minimum(tile * depth // group_size, groups - 1)

        def step(i: Array, total: Array) -> Array:
            at = triton.span(i * COLUMNS, COLUMNS)
            column = i * COLUMNS + jnp.arange(COLUMNS)
            found = [_words(w_ref, tile * high, high, words, j, column) for j in range(words)]
            w = lanes.weave(codebook.looked_up(t_ref, found, bits), 2)
            x = triton.load(g_ref.at[:, at]) * triton.load(s_ref.at[group, at])[None, :]
            top = x.astype(jnp.float16)
            low = (x - top.astype(jnp.float32)).astype(jnp.float16)
            for part in (top, low) if exact else (top,):
                total += jax.lax.dot_general(
                    part, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
            return total

        zero = jnp.zeros((block, depth), jnp.float32)
        total = jax.lax.fori_loop(start, jnp.minimum(start + share, steps), step, zero)
        triton.store(out_ref.at[:, :], total)

    exact = g.dtype == jnp.float32
    width = whole.shape[1]
    out = triton.launch(
        body, f"codebook_matmul_transposed_{bits}", grid=(deep, shares, tall),
        inputs=[whole, scales, codes, jnp.asarray(values)],
        blocks=[
            ((block, width), lambda i, j, r: (r, 0)), (scales.shape, lambda i, j, r: (0, 0)),
            (codes.shape, lambda i, j, r: (0, 0)), (values.shape, lambda i, j, r: (0,)),
        ],
        out=(
            jax.ShapeDtypeStruct((shares, tall * block, deep * depth), jnp.float32),
            (None, block, depth), lambda i, j, r: (j, r, i),
        ),
        warps=4, stages=3,
    )  # fmt: skip
    order = lanes.woven(lambda r, pair, lane: unit * r + 2 * pair + lane, high, unit // 2, 2)
    y = jnp.sum(out, axis=0)[:m].reshape(m, deep, depth)
    y = y[:, :, jnp.argsort(jnp.asarray(order))].reshape(m, -1)[:, :k]
    return y * (made.unit * (largest / one))


def _words(ref, start: Array, count: int, words: int, part: int, column: Array) -> Array:
    """Return word `part` of units start ... of the given columns, zero outside of the array."""
    shape = (count, len(column))
    row = (start + jnp.arange(count)) * words + part
    here = (row < ref.shape[0])[:, None] & (column < ref.shape[1])[None, :]
    at = (jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape))
    return triton.load(ref.at[at], here)


def serves(g, codes, scale, *, table, bits: int, group_size: int, k: int) -> str:
    """Return "" if the kernel supports the arguments of the op, otherwise the reason."""
    unit = layout.unit(bits)[0]
    if not tiles.depth(unit, group_size, k, "float"):
        return tiles.unfit(unit, group_size, "float")
    return triton.missing()


KERNELS = {"codebook_matmul_transposed": Kernel(codebook_matmul_transposed, serves)}
