"""A quantized matrix as one range-coded stream of 16-bit words.

    | header, HEADER words | states of the lanes | words | zeros |

A weight is step_i width_j v_ij, with steps and widths in quarter octaves and integers v = 2 k - q
(`trellis_coded`). Its code k is coded for a t source (`student_t`) of scale level_i + column_j
relative to step and width, in quarter octaves. The words hold, as codes too, the steps, the scales
level + step, the widths and the scales column + width, followed by the codes k, with row i in lane
i mod lanes. A row is split into `count` chains of at most `chain` weights, of which chain c has the
columns c, c + count, ...; each chain has a trellis of its own, starting from state 0.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int16, Int32, UInt16

from pallas_kernels.codecs import rans, student_t, trellis_coded

# Base, low and high word; shape; class and mean of the steps, and of the row scales; classes of the
# widths and of the column scales.
HEADER = 9
FINE = 1 << 16  # parts of an octave in which the base is given


class Coded(NamedTuple):
    """The contents of a stream.

    Attributes:
      base: logarithm of the unit of the steps, in 1 / FINE octaves.
      shape: index into `student_t.SHAPES`.
      steps: step of every row [k], in quarter octaves above the base.
      levels: scale of every row [k] relative to its step, in quarter octaves.
      widths: width of every column [n], in quarter octaves.
      columns: scale of every column [n] relative to its width, in quarter octaves.
      values: the integers v, int16 [k, n].
    """

    base: Int32[Array, ""]
    shape: Int32[Array, ""]
    steps: Int32[Array, " k"]
    levels: Int32[Array, " k"]
    widths: Int32[Array, " n"]
    columns: Int32[Array, " n"]
    values: Int16[Array, "k n"]


def scales(
    base: Int32[Array, ""], steps: Int32[Array, " k"], widths: Int32[Array, " n"]
) -> tuple[Float[Array, " k"], Float[Array, " n"]]:
    """Return the float32 steps of the rows and widths of the columns.

    The arguments are the logarithms in `Coded`.

    Args:
      base, steps, widths: the fields of `Coded`.
    """
    octave = base / FINE + steps / 4
    whole = jnp.floor(octave)  # split off, so that doubling the unit exactly doubles the steps
    step = jnp.ldexp(jnp.exp2(octave - whole), whole.astype(jnp.int32))
    return step.astype(jnp.float32), jnp.exp2(widths / 4)


def weights(coded: Coded) -> Float[Array, "k n"]:
    """Return the float32 matrix [k, n].

    Args:
      coded: the contents of a stream.
    """
    step, width = scales(coded.base, coded.steps, coded.widths)
    return step[:, None] * width * coded.values


def index(levels: Int[Array, "..."], columns: Int[Array, "..."]) -> Int32[Array, "..."]:
    """Return the class of a source, among those that can code anything.

    Args:
      levels, columns: scales relative to step and width, in quarter octaves.
    """
    return jnp.clip(levels + columns + student_t.UNIT, 1, student_t.CLASSES - 1)


def chains(n: int, chain: int) -> tuple[int, int]:
    """Return the number and length of the chains of a row of n weights.

    The last chains may be shorter by one.

    Args:
      n: number of weights in a row.
      chain: largest number of weights in a chain.

    >>> chains(576, 256)
    (3, 192)
    """
    count = -(-n // chain)
    return count, -(-n // count)


def laid(a: Array, chain: int) -> Array:
    """Return [..., n] as [..., length, count] with a chain in each column, zero-padded.

    Args:
      a: [..., n].
      chain: largest number of weights in a chain.

    >>> laid(jnp.arange(1, 6), 3).tolist()
    [[1, 2], [3, 4], [5, 0]]
    """
    n = a.shape[-1]
    count, length = chains(n, chain)
    a = jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, count * length - n),))
    return a.reshape(*a.shape[:-1], length, count)


class _Codes(NamedTuple):
    """Codes, the classes of their sources and their quantizers, each [steps, lanes]."""

    code: Int[Array, "steps lanes"]
    source: Int[Array, "steps lanes"]
    q: Int[Array, "steps lanes"]


@partial(jax.jit, static_argnames=("size", "lanes"))
def write(coded: Coded, size: int, lanes: int) -> tuple[UInt16[Array, " size"], Int32[Array, ""]]:
    """Return the stream, and the number of words that it actually takes.

    Args:
      coded: the contents.
      size: number of words to return; the stream is zero-padded or truncated to it.
      lanes: number of interleaved range-coder states.

    >>> row = jnp.arange(4) % 2
    >>> values = jnp.array([[2, 0, -4, 0]], jnp.int16)
    >>> coded = Coded(jnp.int32(0), jnp.int32(1), row[:1], row[:1], row * 0, row, values)
    >>> words, used = write(coded, 30, 1)
    >>> got, whole = read(words, 1, 4, lanes=1, states=1, chain=4)
    >>> int(used), bool(whole), weights(got).tolist()
    (12, True, [[2.0, 0.0, -4.0, 0.0]])
    """
    shape, values = coded.shape, coded.values.astype(jnp.int32)
    head: list[Array] = [coded.base, coded.base >> 16, shape]
    parts: list[_Codes] = []
    for side in (coded.steps, coded.levels + coded.steps):
        mean = jnp.round(jnp.mean(side)).astype(jnp.int32)
        parts.append(_side(side - mean, shape, lanes))
        head += [parts[-1].source[0, 0], mean]
    for side in (coded.widths, coded.columns + coded.widths):
        parts.append(_side(side, shape, lanes))
        head.append(parts[-1].source[0, 0])
    q = values & 1
    source = index(coded.levels[:, None], coded.columns)
    rows = (_by_lanes(a, lanes) for a in ((values + q) >> 1, source, q))
    parts.append(_Codes(*(a.swapaxes(1, 2).reshape(-1, lanes) for a in rows)))
    codes = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    words, used = rans.encode(*_symbols(codes, shape), size - HEADER)
    header = (jnp.stack(head) & 0xFFFF).astype(jnp.uint16)
    return jnp.concatenate([header, words]), used + HEADER


def _by_lanes(a: Array, lanes: int) -> Array:
    """Return [k, ...] as [k / lanes, lanes, ...], zero-padded."""
    a = jnp.pad(a, ((0, -len(a) % lanes), *((0, 0),) * (a.ndim - 1)))
    return a.reshape(-1, lanes, *a.shape[1:])


def _side(codes: Int[Array, " k"], shape: Array, lanes: int) -> _Codes:
    """Return side information in the class that codes it in the fewest bits."""
    count = jnp.zeros(student_t.SYMBOLS).at[student_t.symbol(codes)].add(1.0)
    best = 1 + jnp.argmin(jnp.asarray(student_t.prices())[shape, 1:, 0] @ count)
    codes, source = (_by_lanes(a, lanes) for a in (codes, jnp.full(len(codes), best, jnp.int32)))
    return _Codes(codes, source, jnp.zeros_like(codes))


def _symbols(codes: _Codes, shape: Array) -> tuple[Array, Array]:
    """Return starts and frequencies [2 steps, lanes] of symbols and plain bits, alternating."""
    symbol = student_t.symbol(codes.code)
    at = lambda table: jnp.asarray(table)[shape, codes.source, codes.q, symbol]
    plain = rans.SLOTS >> jnp.asarray(student_t.BITS)[symbol]
    rest = (codes.code - jnp.asarray(student_t.BASE)[symbol]) * plain
    turns = lambda a, b: jnp.stack([a, b], 1).astype(jnp.uint16).reshape(-1, symbol.shape[1])
    return turns(at(student_t.below()), rest), turns(at(student_t.frequencies()), plain)


def scaled(words: UInt16[Array, " size"], octaves: Int32[Array, ""]) -> UInt16[Array, " size"]:
    """Return the stream of the same matrix multiplied by 2**octaves.

    Args:
      words: the stream.
      octaves: exponent of the factor.
    """
    high = (words[1].astype(jnp.int32) + octaves) & 0xFFFF
    return words.at[1].set(high.astype(jnp.uint16))


@partial(jax.jit, static_argnames=("k", "n", "lanes", "states", "chain"))
def read(
    words: UInt16[Array, " size"], k: int, n: int, *, lanes: int, states: int, chain: int
) -> tuple[Coded, Bool[Array, ""]]:
    """Return the contents of a stream, and whether it is intact.

    A corrupt stream still decodes to some matrix.

    Args:
      words: the stream; missing words read as zeros.
      k, n: number of rows and columns.
      lanes: as in `write`.
      states: number of trellis states.
      chain: largest number of weights in a chain.
    """
    head = words[:HEADER].astype(jnp.int16).astype(jnp.int32)
    words = words[HEADER:]
    shape = jnp.clip(head[2], 0, len(student_t.SHAPES) - 1)
    pull = _puller(words, shape)
    start, sides = rans.start(words, lanes), zip((k, k, n, n), (3, 5, 7, 8), strict=True)
    classes = jnp.clip(head, 1, student_t.CLASSES - 1)
    source = [_by_lanes(jnp.full(count, classes[i]), lanes) for count, i in sides]
    reader, side = jax.lax.scan(lambda r, c: pull(r, c, 0), start, jnp.concatenate(source))
    cut = _cutter(side.reshape(-1), lanes)
    steps, scales = cut(k) + head[4], cut(k) + head[6]
    widths, columns = cut(n), cut(n)
    columns = columns - widths
    count, _ = chains(n, chain)

    def block(reader: rans.Reader, rows: tuple) -> tuple[rans.Reader, Array]:
        levels, there = rows

        def step(carry: tuple, column: tuple) -> tuple[tuple, Array]:
            (reader, state), (scale, chain) = carry, column
            q = state[chain] & 1
            reader, code = pull(reader, jnp.where(there, index(levels, scale), 0), q)
            state = state.at[chain].set(trellis_coded.advance(state[chain], code, states))
            return (reader, state), (2 * code - q).astype(jnp.int16)

        start = (reader, jnp.zeros((count, lanes), jnp.int32))
        (reader, _), values = jax.lax.scan(step, start, (columns, jnp.arange(n) % count))
        return reader, values.T

    levels, there = scales - steps, jnp.ones(k, bool)
    laid = _by_lanes(levels, lanes), _by_lanes(there, lanes)
    reader, out = jax.lax.scan(block, reader, laid)
    base = (head[0] & 0xFFFF) | head[1] << 16
    coded = Coded(base, shape, steps, levels, widths, columns, out.reshape(-1, n)[:k])
    return coded, rans.intact(reader, words)


def _cutter(side: Int[Array, " m"], lanes: int) -> Callable[[int], Array]:
    """Return a function that takes the next entries of side information.

    It skips the padding of the last lanes.
    """
    at = 0

    def cut(count: int) -> Array:
        nonlocal at
        part, at = side[at : at + count], at - (-count // lanes) * lanes
        return part

    return cut


def _puller(words: Array, shape: Array) -> Callable[..., tuple[rans.Reader, Array]]:
    """Return a function that decodes one code in every lane.

    It maps (reader, classes of the sources, quantizers) to the reader and the codes.
    """
    below = jnp.asarray(student_t.below())[shape]
    least, bits = jnp.asarray(student_t.BASE), jnp.asarray(student_t.BITS)

    def pull(reader: rans.Reader, source: Array, q: Array | int) -> tuple[rans.Reader, Array]:
        reader, symbol = rans.pull(words, reader, below[source, q])
        reader, plain = rans.pull_bits(words, reader, bits[symbol])
        return reader, least[symbol] + plain

    return pull
