"""The codes of packed weights as integers, with the scale group of each: what a coder would see."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxquant.core.protocols import Data, Format
from jaxquant.formats.additive import Additive
from jaxquant.formats.dual_scale import DualScale
from jaxquant.formats.e8p import E8P
from jaxquant.formats.entropy_coded import EntropyCoded
from jaxquant.formats.exact_format import ExactFormat
from jaxquant.formats.float_planes import FloatPlanes
from jaxquant.formats.integer import Integer
from jaxquant.formats.offset import Offset, levels
from jaxquant.formats.table import Table
from jaxquant.formats.trellis import SIDE, Trellis
from jaxquant.formats.vector import Vector
from pallas_kernels import dual_scale, streams
from pallas_kernels.codecs import (
    entropy_stream,
    float_fields,
    layout,
    lookup,
    trellis,
)


class Symbols(NamedTuple):
    """Codes of one kind; a decoder knows the kind of a code, and its group, before it reads it.

    Attributes:
      codes: the codes, in any order.
      groups: index of the group of each code: the weights that share a scale.
      alphabet: number of values that a code can take; of integers without bounds, the number of
        values between the smallest and the largest that are present.
      bits: number of bits that the format stores for each code.
    """

    codes: Int[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"]
    alphabet: int
    bits: float


@functools.singledispatch
def symbols(format: Any, data: Data, k: int) -> list[Symbols]:
    """Return the codes of one packed matrix [k, n]; it runs on the host.

    What is a code depends on the format:

      Integer, Ternary, Table    the code of every weight; groups are those of the scales
      Offset                     the codes of the format that is shifted
      DualScale                  the integer of every weight, escapes included; groups are rows
      E8P                        the 16 bits of eight rows of a column, and the residual code
      Additive                   the index into each codebook; groups are columns
      Vector                     the index into each codebook; outlier rows have codebooks apart
      Trellis                    the bits by which one step of the path advances, for each rate
      EntropyCoded               the integer that the arithmetic coder receives for every weight;
                                 groups are its classes, which follow from the scales of the row and
                                 of the column
      FloatPlanes, HuffmanLanes  the exponent of every weight, and its sign and mantissa, cut into
                                 bytes where they are longer; groups are columns

    Codes that a decoder can tell apart are of different kinds: those of different codebooks, of
    different rates, of the two quantizers between which a trellis alternates. Register a format of
    your own as these are registered, with the decorator that is this function's `register`.

    Args:
      format: the format of the matrix.
      data: its packed arrays, without batch axes; concrete arrays.
      k: number of rows.
    Returns:
      The codes by kind.
    Raises:
      ValueError: the format stores no codes, or none that this function knows; or the stream of an
        entropy-coded matrix is damaged.

    >>> import jax.numpy as jnp
    >>> format = Integer(bits=2, group_size=2, symmetric=True)
    >>> [found] = symbols(format, format.encode(jnp.array([[1.0], [0.0], [-1.0], [1.0]])), 4)
    >>> found.codes.tolist(), found.groups.tolist(), found.alphabet, found.bits
    ([1, 0, -1, 1], [0, 0, 1, 1], 4, 2)
    """
    if isinstance(format, Format):
        raise ValueError(
            f"{type(format).__name__} stores no codes that are known here; for a format of integer "
            "codes, call jaxquant.formats.symbols.symbols.register(its class, a function of the "
            "format, its data and k that returns a list of Symbols)"
        )
    raise ValueError(f"expected a format, such as Integer(bits=4), got {format!r}")


@symbols.register
def _(format: Integer, data: Data, k: int) -> list[Symbols]:
    bottom, top = format.limits
    return [_scalar(data, format.bits, k, format.rows_per_group(k), top - bottom + 1)]


@symbols.register
def _(format: Table, data: Data, k: int) -> list[Symbols]:
    values = 1 << format.bits if isinstance(format.table, str) else len(format.table)
    return [_scalar(data, format.bits, k, format.rows_per_group(k), values)]


def _scalar(data: Data, bits: int, k: int, rows: int, alphabet: int) -> Symbols:
    codes = np.asarray(_unpacked(data["codes"], bits, k))
    count, columns = data["scale"].shape  # [1, 1] if the matrix has one scale
    group = np.minimum(np.arange(k) // rows, count - 1)[:, None] * columns
    groups = group + np.arange(codes.shape[1]) % columns
    return Symbols(codes.ravel(), groups.ravel(), alphabet, bits)


@symbols.register
def _(format: ExactFormat, data: Data, k: int) -> list[Symbols]:
    exponent, rest = float_fields.fields(_bits(format, data, k), format.own)
    size, n = exponent.size, exponent.shape[1]
    groups = np.tile(np.arange(n), k)
    width, planes = float_fields.DTYPES[format.own]
    stored = format.bits if isinstance(format, FloatPlanes) else 32 * data["words"].size / size
    found = [Symbols(np.asarray(exponent).ravel(), groups, 1 << width, stored)]
    for plane in planes:
        codes = np.asarray(rest & ((1 << plane) - 1)).ravel()
        found.append(Symbols(codes, groups, 1 << plane, plane))
        rest = rest >> plane
    return found


@symbols.register
def _(format: Offset, data: Data, k: int) -> list[Symbols]:
    return symbols(format.format, levels(data), k)


@symbols.register
def _(format: DualScale, data: Data, k: int) -> list[Symbols]:
    ones = np.ones((1, data["codes"].shape[1]), np.float32), np.ones(k, np.float32)
    escapes = data["ranges"], data["escapes"]
    values = _dual_scale(data["codes"], *ones, *escapes, bits=format.bits, k=k)
    values = np.asarray(values).astype(np.int64)  # of 16 bits, so float32 held them exactly
    rows = np.broadcast_to(np.arange(k)[:, None], values.shape)
    return [_unbounded(values.ravel(), rows.ravel(), format.bits)]


@symbols.register
def _(format: E8P, data: Data, k: int) -> list[Symbols]:
    parts = [("codes", 16), ("residual", 8 * (format.bits - 2))]
    return [
        _ungrouped(_looked_up(data[name], bits, k // 8, 1), bits)
        for name, bits in parts
        if name in data
    ]


@symbols.register
def _(format: Additive, data: Data, k: int) -> list[Symbols]:
    codes = _looked_up(data["codes"], format.bits, k // format.group, format.codebooks)
    columns = np.broadcast_to(np.arange(codes.shape[2]), codes[:, 0].shape).ravel()
    alphabet, each = 1 << format.bits, range(format.codebooks)
    return [Symbols(codes[:, i].ravel(), columns, alphabet, format.bits) for i in each]


@symbols.register
def _(format: Vector, data: Data, k: int) -> list[Symbols]:
    outlier = np.zeros(k, np.uint8)
    if format.outliers:
        words = np.asarray(data["outliers"])
        outlier = np.unpackbits(words.view(np.uint8), bitorder="little")[:k]
    parts = [("codes", format.bits), ("residual", format.residual_bits)]
    return [
        _ungrouped(_looked_up(data[name], bits, k, 1)[outlier == kind], bits)
        for name, bits in parts
        for kind in np.unique(outlier)
        if bits
    ]


@symbols.register
def _(format: Trellis, data: Data, k: int) -> list[Symbols]:
    words, per = np.asarray(data["codes"]), k // SIDE // len(format.rates)
    ends = np.cumsum([8 * rate * per for rate in format.rates])
    blocks = [(i, b) for i, b in enumerate(np.split(words, ends[:-1])) if format.rates[i]]
    found = []
    for rate in sorted({format.rates[i] for i, _ in blocks}):
        mine = [(i, _steps(b, rate, format)) for i, b in blocks if format.rates[i] == rate]
        groups = np.concatenate([np.full(len(steps), i) for i, steps in mine])
        codes, bits = np.concatenate([steps for _, steps in mine]), rate * format.V
        found.append(Symbols(codes, groups, 1 << bits, bits))
    return found


def _steps(words: Int[np.ndarray, "w t"], rate: int, format: Trellis) -> Int[np.ndarray, " n"]:
    """Return the bits by which each step advances: the first ones of the window of its state."""
    tiles = np.moveaxis(words.reshape(-1, 8 * rate, words.shape[1]), 1, 2)
    states = np.asarray(_states(tiles, format.L, rate, format.V))
    return (states >> (format.L - rate * format.V)).ravel()


@symbols.register
def _(format: EntropyCoded, data: Data, k: int) -> list[Symbols]:
    words = np.asarray(data["codes"])
    n = words.shape[1]
    stream = streams.Stream(words.ravel(), k, n, format.lanes, format.states, format.chain)
    [(found, whole)] = streams.read([stream], 1)
    if not whole:
        raise ValueError("the entropy-coded stream is damaged; quantize the weight again")
    classes = np.asarray(_index(found.levels[:, None], found.columns))
    bits = max(0.0, 8 * words.nbytes - format.side_bits(k, n)) / (k * n)
    return list(_by_quantizer(np.asarray(found.values, np.int64), classes, bits))


def _by_quantizer(
    values: Int[np.ndarray, "k n"], classes: Int[np.ndarray, "k n"], bits: float
) -> Iterator[Symbols]:
    """Yield the codes of each of the two quantizers, v = 2 code - quantizer (`trellis_coded`)."""
    for quantizer in np.unique(values & 1):
        mine = (values & 1) == quantizer
        yield _unbounded((values[mine] + quantizer) >> 1, classes[mine], bits)


def _looked_up(words: Any, bits: int, groups: int, m: int) -> Int[np.ndarray, "g m n"]:
    return np.asarray(_codes(words, bits, groups, m))


def _ungrouped(codes: Int[np.ndarray, "..."], bits: int) -> Symbols:
    return Symbols(codes.ravel(), np.zeros(codes.size, np.int64), 1 << bits, bits)


def _unbounded(codes: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"], bits: float) -> Symbols:
    return Symbols(codes, groups, int(np.ptp(codes)) + 1, bits)


# Each is one program; op by op they would take a second.
_unpacked = jax.jit(layout.unpack, static_argnums=(1, 2))
_codes = jax.jit(lookup.unpack, static_argnums=(1, 2, 3))
_states = jax.jit(trellis.states, static_argnums=(1, 2, 3))
_bits = jax.jit(lambda format, data, k: format.decode_bits(data, k), static_argnums=(0, 2))
_dual_scale = jax.jit(dual_scale.dequantize, static_argnames=("bits", "k"))
_index = jax.jit(entropy_stream.index)
