"""Read entropy-coded streams on the host, natively where a compiler is available, else with JAX."""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt16

from pallas_kernels.codecs import entropy_stream, student_t, trellis_coded
from pallas_kernels.codecs.entropy_stream import Coded
from pallas_kernels.cpu import native


class Stream(NamedTuple):
    """A stream and the properties of its matrix [k, n] known in advance; see `entropy_stream.read`.

    Attributes:
      words: the stream.
      k, n: number of rows and columns of the matrix.
      lanes: number of interleaved range-coder states.
      states: number of trellis states.
      chain: largest number of weights in a chain.
    """

    words: UInt16[np.ndarray, " size"]
    k: int
    n: int
    lanes: int
    states: int
    chain: int


def read(streams: list[Stream], threads: int) -> list[tuple[Coded, bool]]:
    """Return, for every stream, its decoded contents as NumPy arrays and whether it is intact.

    A corrupt stream still decodes to some matrix.

    Args:
      streams: the streams, of any sizes.
      threads: number of streams read at a time.

    >>> values = np.array([[2, 0, -4, 0]], np.int16)
    >>> row = np.arange(4) % 2
    >>> one = Coded(np.int32(0), np.int32(1), row[:1], row[:1], row * 0, row, values)
    >>> words, _ = entropy_stream.write(one, 30, 1)
    >>> [(got, whole)] = read([Stream(np.asarray(words), 1, 4, lanes=1, states=1, chain=4)], 2)
    >>> whole, got.values.tolist()
    (True, [[2, 0, -4, 0]])
    """
    one = _plain if native.load() else _native
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, streams))


def _plain(s: Stream) -> tuple[Coded, bool]:
    words = jnp.asarray(s.words)
    got, whole = entropy_stream.read(words, s.k, s.n, lanes=s.lanes, states=s.states, chain=s.chain)
    return jax.tree.map(np.asarray, got), bool(whole)


# --- the native reader: native/coded.cc -----------------------------------------------------


class _Tables(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("below", "least", "bits")),
        *((name, ctypes.c_int32) for name in ("classes", "symbols", "unit", "g", "f")),
    )


class _Stream(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("size", "k", "n", "lanes", "chains")),
        *((name, ctypes.c_void_p) for name in ("base", "steps", "levels", "widths", "columns")),
        ("values", ctypes.c_void_p),
    )


@functools.cache
def _reader() -> ctypes._CFuncPtr:
    call = ctypes.CDLL(str(native.shared_object())).jaxquant_read_coded
    call.argtypes = ctypes.POINTER(_Stream), ctypes.POINTER(_Tables)
    return call


def _native(s: Stream) -> tuple[Coded, bool]:
    """Return the result of `entropy_stream.read`, bit for bit, from the native reader."""
    words = np.ascontiguousarray(s.words, np.uint16)
    if words.size < entropy_stream.HEADER:
        return _plain(s)
    shape = int(np.clip(words[2].astype(np.int16), 0, len(student_t.SHAPES) - 1))
    below = np.ascontiguousarray(student_t.below()[shape])
    of = lambda count: np.empty(count, np.int32)
    base, steps, levels, widths, columns = (of(count) for count in (1, s.k, s.k, s.n, s.n))
    values = np.empty((s.k, s.n), np.int16)
    at = lambda *arrays: (a.ctypes.data for a in arrays)
    count, _ = entropy_stream.chains(s.n, s.chain)
    sizes = student_t.CLASSES, student_t.SYMBOLS, student_t.UNIT
    tables = _Tables(
        *at(below, student_t.BASE, student_t.BITS), *sizes, *trellis_coded.generators(s.states)
    )
    stream = _Stream(
        *at(words), words.size, s.k, s.n, s.lanes, count,
        *at(base, steps, levels, widths, columns, values),
    )  # fmt: skip
    found = _reader()(stream, tables)
    if found < 0:
        raise MemoryError("not enough memory to read an entropy-coded stream")
    parts = steps, levels, widths, columns, values
    return Coded(base[0], np.int32(shape), *parts), bool(found)
