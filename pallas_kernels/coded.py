"""A quantized matrix as one range-coded stream of 16-bit words.

    | header, HEADER words | states of the lanes | words | zeros |

A weight is step_i v_ij, with steps of quarter octaves and integers v = 2 k - q (`tcq`). Its code k
is that of a t source (`student`) of scale level_i + column_j steps, in quarter octaves. The words
hold, as codes too, the steps, the scales level + step and the columns; then k, row i in lane i mod
lanes. Chains of at most `chain` weights of a row begin in state 0 of the trellis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int16, Int32, UInt16

from pallas_kernels import rans, student, tcq

HEADER = 7  # base; shape; class and mean of the steps, of the scales; class of the columns
FINE = 1024  # parts of an octave, of the base


class Coded(NamedTuple):
    """What a stream holds.

    Attributes:
      base: logarithm of the unit of the steps, in 1 / FINE octaves.
      shape: index into `student.SHAPES`.
      steps: of every row, quarter octaves above the base.
      levels: scale of every row over its step, in quarter octaves.
      columns: scale of every column, in quarter octaves.
      values: v, in steps.
    """

    base: Int32[Array, ""]
    shape: Int32[Array, ""]
    steps: Int32[Array, " k"]
    levels: Int32[Array, " k"]
    columns: Int32[Array, " n"]
    values: Int16[Array, "k n"]


def weights(coded: Coded) -> Float[Array, "k n"]:
    """The matrix, in float32."""
    step = jnp.exp2(coded.base / FINE + coded.steps / 4).astype(jnp.float32)
    return step[:, None] * coded.values


def index(levels: Int[Array, "..."], columns: Int[Array, "..."]) -> Int32[Array, "..."]:
    """The class of a source, of those that can code anything."""
    return jnp.clip(levels + columns + student.UNIT, 1, student.CLASSES - 1)


def chains(n: int, chain: int) -> tuple[int, int]:
    """Number and length of the chains of a row of n weights; the last may be shorter.

    >>> chains(576, 256)
    (3, 192)
    """
    count = -(-n // chain)
    return count, -(-n // count)


class _Codes(NamedTuple):
    """Codes, the classes of their sources, their quantizers: [steps, lanes]."""

    code: Int[Array, "steps lanes"]
    index: Int[Array, "steps lanes"]
    q: Int[Array, "steps lanes"]


def write(coded: Coded, size: int, lanes: int) -> tuple[UInt16[Array, " size"], Int32[Array, ""]]:
    """The stream, filled with zeros or cut off at `size` words; the words it takes in truth."""
    shape, values = coded.shape, coded.values.astype(jnp.int32)
    n = values.shape[1]
    head, parts = [coded.base, shape], []
    for side in (coded.steps, coded.levels + coded.steps):
        mean = jnp.round(jnp.mean(side)).astype(jnp.int32)
        parts.append(_side(side - mean, shape, lanes))
        head += [parts[-1].index[0, 0], mean]
    parts.append(_side(coded.columns, shape, lanes))
    head.append(parts[-1].index[0, 0])
    q = values & 1
    source = index(coded.levels[:, None], coded.columns)
    rows = (_by_lanes(a, lanes) for a in ((values + q) >> 1, source, q))
    parts.append(_Codes(*(a.swapaxes(1, 2).reshape(-1, lanes) for a in rows)))
    starts, frequencies = _symbols(_Codes(*(jnp.concatenate(a) for a in zip(*parts))), shape)
    words, used = rans.encode(starts, frequencies, size - HEADER)
    header = (jnp.stack(head) & 0xFFFF).astype(jnp.uint16)
    return jnp.concatenate([header, words]), used + HEADER


def _by_lanes(a: Array, lanes: int) -> Array:
    """[k, ...] -> [k / lanes, lanes, ...], filled up with zeros."""
    a = jnp.pad(a, ((0, -len(a) % lanes), *((0, 0),) * (a.ndim - 1)))
    return a.reshape(-1, lanes, *a.shape[1:])


def _side(codes: Int[Array, " k"], shape: Array, lanes: int) -> _Codes:
    """Side information, in the class that codes it in the fewest bits."""
    count = jnp.zeros(student.SYMBOLS).at[student.symbol(codes)].add(1.0)
    best = 1 + jnp.argmin(jnp.asarray(student.prices())[shape, 1:, 0] @ count)
    codes = _by_lanes(codes, lanes)
    source = _by_lanes(jnp.full(codes.size, best, jnp.int32), lanes)
    return _Codes(codes, source, jnp.zeros_like(codes))


def _symbols(codes: _Codes, shape: Array) -> tuple[Array, Array]:
    """Starts and frequencies [2 steps, lanes] of symbols and plain bits in turn."""
    symbol = student.symbol(codes.code)
    at = lambda table: jnp.asarray(table)[shape, codes.index, codes.q, symbol]
    plain = rans.SLOTS >> jnp.asarray(student.BITS)[symbol]
    rest = (codes.code - jnp.asarray(student.BASE)[symbol]) * plain
    turns = lambda a, b: jnp.stack([a, b], 1).astype(jnp.uint16).reshape(-1, symbol.shape[1])
    return turns(at(student.below()), rest), turns(at(student.frequencies()), plain)


def read(
    words: UInt16[Array, " size"], k: int, n: int, *, lanes: int, states: int, chain: int
) -> tuple[Coded, Bool[Array, ""]]:
    """Inverse of `write`, and whether the stream is whole; of noise, some matrix."""
    head = words[:HEADER].astype(jnp.int16).astype(jnp.int32)
    words = words[HEADER:]
    shape = jnp.clip(head[1], 0, len(student.SHAPES) - 1)
    table = jnp.asarray(student.below())[shape]
    base, bits = jnp.asarray(student.BASE), jnp.asarray(student.BITS)

    def pull(reader: rans.Reader, source: Array, q: Array | int) -> tuple[rans.Reader, Array]:
        reader, symbol = rans.pull(words, reader, table[source, q])
        reader, plain = rans.pull_bits(words, reader, bits[symbol])
        return reader, base[symbol] + plain

    def side(reader: rans.Reader, count: int, source: Array) -> tuple[rans.Reader, Array]:
        steps = -(-count // lanes)
        source = jnp.full((steps, lanes), jnp.clip(source, 1, student.CLASSES - 1))
        reader, codes = jax.lax.scan(lambda r, source: pull(r, source, 0), reader, source)
        return reader, codes.reshape(-1)[:count]

    reader, steps = side(rans.start(words, lanes), k, head[2])
    reader, scales = side(reader, k, head[4])
    reader, columns = side(reader, n, head[6])
    steps, scales = steps + head[3], scales + head[5]
    first = jnp.arange(n) % chains(n, chain)[1] == 0

    def rows(reader: rans.Reader, rows: tuple) -> tuple[rans.Reader, Array]:
        levels, there = rows

        def step(carry: tuple, column: tuple) -> tuple:
            (reader, state), (scale, first) = carry, column
            state = jnp.where(first, 0, state)
            q = state & 1
            reader, code = pull(reader, jnp.where(there, index(levels, scale), 0), q)
            state = tcq.advance(state, code, states)
            return (reader, state), (2 * code - q).astype(jnp.int16)

        start = (reader, jnp.zeros(lanes, jnp.int32))
        (reader, _), values = jax.lax.scan(step, start, (columns, first))
        return reader, values.T

    levels = scales - steps
    there = _by_lanes(jnp.ones(k, bool), lanes)
    reader, values = jax.lax.scan(rows, reader, (_by_lanes(levels, lanes), there))
    values = values.reshape(-1, n)[:k]
    return Coded(head[0], shape, steps, levels, columns, values), rans.intact(reader, words)
