"""g @ w.T for codes that select entries of a table of up to 16 values, on the packed words of w.

Scaled weights are made in registers, in the order of k, and rounded as the reference rounds them.
Scaling g instead, as `transposed` does, would take a product for each group that shares a slice,
and groups of 64 are usual here.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.tpu import planes
from pallas_kernels.tpu.blocks import DEPTH, LANES
from pallas_kernels.tpu.product import by_slice

_NT = (((1,), (1,)), ((), ()))
ROWS = 512  # rows of g at a time, planes included
TILE = 16  # rows of bfloat16 in a tile
COLUMNS = 512  # columns of w in a step
K = 1024  # rows of w in a step
SLICE = 128  # rows of w in a product
RUN = 16  # rows of w in a register of bfloat16
_HIGH = np.int32(-1 << 16)


def codebook_matmul_transposed(
    g: Float[Array, "m n"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    *,
    table: tuple[float, ...],
    bits: int,
    group_size: int,
    k: int,
    interpret: bool = False,
) -> Float[Array, "m k"]:
    """Return g @ (scale * table[code]).T; see "codebook_matmul_transposed" in `reference.OPS`.

    Scaled weights are rounded to bfloat16, as in the reference, if g is bfloat16. Otherwise g and
    the weights are rounded to 16 bits each.

    Args:
      g: [m, n], float32, bfloat16 or float16.
      codes, scale, table, bits, group_size: as in `ops.codebook_matmul`; bits is 2, 3 or 4.
      k: number of rows of w.
      interpret: whether to run in interpret mode, on any device.
    """
    (m, n), groups = g.shape, scale.shape[0]
    parts, factor = planes.split(g, "float", planes.BFLOAT16)
    rows = _balanced(m, ROWS // len(parts), TILE)
    block = _balanced(k, K, DEPTH)
    columns = _balanced(n, COLUMNS, LANES)
    grid = (-(-m // rows), -(-k // block), -(-n // columns))
    width = grid[2] * columns
    stacked = planes.stack(parts, tile=rows, k=width, size=width, parts=1, order=None)
    share = math.gcd(group_size, SLICE) if groups > 1 else SLICE  # rows with a scale of their own
    # Padded, since memory past the end may hold infinities.
    scales = jnp.broadcast_to(scale.astype(jnp.float32), (groups, n))
    scales = jnp.pad(scales, ((0, 0), (0, width - n)))
    scales, per = by_slice(scales, group_size, share, block // share, grid[1])
    values = entries(table)
    y = pl.pallas_call(
        partial(_body, bits=bits, share=share if groups > 1 else 0, parts=len(parts)),
        grid=grid,
        in_specs=[
            pl.BlockSpec((len(parts) * rows, columns), lambda i, j, s: (i, s)),
            pl.BlockSpec((block * bits // 32, columns), lambda i, j, s: (j, s)),
            pl.BlockSpec((per, 1, columns), lambda i, j, s: (j * (groups > 1), 0, s)),
            pl.BlockSpec(values.shape, lambda i, j, s: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, block), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, k), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * (2 * len(parts) - 1) * m * k * n,
            bytes_accessed=grid[0] * (codes.size + scales.size) * 4
            + grid[1] * stacked.size * 2 + 4 * m * k,
            transcendentals=0,
        ),
        name=f"codebook_matmul_transposed_{bits}",
        interpret=interpret,
    )(stacked, codes, scales, jnp.asarray(values))  # fmt: skip
    return y * factor


def _balanced(size: int, most: int, unit: int) -> int:
    """Return the length, a multiple of a unit, of the fewest blocks; no block is nearly empty."""
    return -(-size // (-(-size // most) * unit)) * unit


def entries(table: tuple[float, ...]) -> Float[np.ndarray, "r 128"]:
    """Return the registers of a table, one for every 8 entries: [8, 128] or [16, 128].

    Args:
      table: the 4, 8 or 16 values, in code order.

    >>> entries((0.0, 0.5, 1.0, -1.5))[:5, 0].tolist()
    [0.0, 0.5, 1.0, -1.5, 0.0]
    """
    values = np.resize(np.asarray(table, np.float32), max(8, len(table)))
    return np.repeat(values[:, None], LANES, axis=1)


def _body(g_ref, w_ref, s_ref, t_ref, o_ref, *, bits: int, share: int, parts: int) -> None:
    step, rows = pl.program_id(2), o_ref.shape[0]
    product = partial(
        jax.lax.dot_general, dimension_numbers=_NT, preferred_element_type=jnp.float32
    )
    width = w_ref.shape[1]
    registers = [jnp.tile(t_ref[i : i + 8], (1, width // LANES)) for i in range(0, len(t_ref), 8)]

    @pl.when(step == 0)
    def _() -> None:
        o_ref[...] = jnp.zeros(o_ref.shape, jnp.float32)

    for at in range(0, o_ref.shape[1], SLICE):
        runs = []
        for first in range(at, at + SLICE, RUN):
            scale = s_ref[first // share if share else 0]
            runs.append([v * scale for v in _values(w_ref, first, registers, bits)])
        total = product(g_ref[...], _joined(runs))
        if parts == 2:
            low = [[v - _floats(_rounded(v) & _HIGH) for v in run] for run in runs]
            total = total[:rows] + total[rows:] + product(g_ref[:rows], _joined(low))
        o_ref[:, at : at + SLICE] += total


def _values(w_ref, first: int, registers: list[Array], bits: int) -> list[Float32[Array, "8 n"]]:
    """Return the entries that the codes of a run select: those of even rows, those of odd rows.

    Args:
      w_ref: reference to the words.
      first: first row of the run.
      registers: the table.
      bits: number of bits per code.
    """
    word, low = divmod(first * bits, 32)
    start = min(word // 8 * 8 if RUN * bits % 32 == 0 else word, w_ref.shape[0] - 8)
    words = w_ref[start : start + 8]
    # Row r of a register takes the codes 2 r and 2 r + 1.
    bit = low + 2 * bits * jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    at, low = (bit >> 5) + (word - start), bit & 31
    code = jax.lax.shift_right_logical(_taken(words, at), low)
    if 32 % bits:  # codes may continue in the next word
        code = code | _taken(words, jnp.minimum(at + 1, 7)) << 1 << (31 - low)
    return [_looked_up(code >> bits * odd, registers, bits) for odd in (0, 1)]


def _looked_up(code: Int32[Array, "8 n"], registers: list[Array], bits: int) -> Array:
    index = code & min(7, (1 << bits) - 1)
    found = [_taken(register, index) for register in registers]
    return found[0] if len(found) == 1 else jnp.where(code & 8 == 0, *found)


def _taken(register: Array, row: Int32[Array, "8 n"]) -> Array:
    """Return the entries of given rows; without the promise, it would look for negative rows."""
    return jnp.take_along_axis(register, row, axis=0, mode="promise_in_bounds")


def _joined(runs: list[list[Float32[Array, "8 n"]]]) -> Array:
    """Return the rows of runs as bfloat16 [k, n], in order.

    A chip without bfloat16 arithmetic takes three times as many operations for a cast.
    """
    right = jax.lax.shift_right_logical
    words = [right(_rounded(even), 16) | _rounded(odd) & _HIGH for even, odd in runs]
    return pltpu.bitcast(jnp.concatenate(words), jnp.bfloat16)


def _rounded(x: Float32[Array, "8 n"]) -> Int32[Array, "8 n"]:
    """Return words whose high halves are x as bfloat16, halves rounded away from zero."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) + 0x8000


def _floats(words: Int32[Array, "8 n"]) -> Float32[Array, "8 n"]:
    return jax.lax.bitcast_convert_type(words, jnp.float32)
