"""The coders of `byte_streams`: native where a compiler is available, else in NumPy.

Both give the same bytes. Planes are coded in shares of 2**18 symbols, which threads take one by
one; the native coders run without Python's lock.
"""

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

from pallas_kernels.codecs import byte_rans, huffman_lanes, prefix_code
from pallas_kernels.cpu import native

Bytes = UInt8[np.ndarray, " bytes"]
_SHARE = byte_rans.CHUNK  # symbols; also a multiple of those of a Huffman lane
_LANES = _SHARE // huffman_lanes.LANE  # of a share
_NO_MEMORY = -2  # what native decoders return without memory


def counts(plane: UInt8[np.ndarray, " count"], threads: int) -> Int64[np.ndarray, " 256"]:
    """Return how often each symbol occurs.

    Args:
      plane: uint8 [count], contiguous.
      threads: number of threads.
    """

    def one(first: int) -> np.ndarray:
        part = plane[first : first + _SHARE]
        if native.load():
            return np.bincount(part, minlength=256)
        found = np.empty(256, np.int64)
        _library().jaxquant_byte_counts(_at(part), len(part), _at(found))
        return found

    parts = _map(one, range(0, len(plane), _SHARE), threads)
    return np.sum([np.zeros(256, np.int64), *parts], axis=0)


def encode_lanes(
    plane: UInt8[np.ndarray, " count"], lengths: UInt8[np.ndarray, " 256"], threads: int
) -> tuple[UInt16[np.ndarray, " lanes"], list[Bytes]]:
    """Return the sizes of the Huffman lanes of a plane, and their words in some pieces.

    Args:
      plane: uint8 [count], contiguous, of two symbols or more.
      lengths: uint8 [256], the lengths of the code words.
      threads: number of threads.
    """
    codes = prefix_code.codes(lengths)

    def one(first: int) -> tuple[np.ndarray, np.ndarray]:
        part = plane[first : first + _SHARE]
        if native.load():
            sizes = huffman_lanes.sizes(part, lengths)
            words = huffman_lanes.encode(part, lengths, sizes).astype("<u4", copy=False)
            return sizes, words.view(np.uint8)
        sizes = np.empty(huffman_lanes.lanes(len(part)), np.uint16)
        room = np.empty(len(sizes) * huffman_lanes.MOST_WORDS * 4, np.uint8)
        taken = _library().jaxquant_huffman_encode(
            _at(part), len(part), _at(lengths), _at(codes), _at(sizes), _at(room)
        )
        return sizes, room[:taken].copy()

    parts = _map(one, range(0, len(plane), _SHARE), threads)
    return np.concatenate([sizes for sizes, _ in parts]), [words for _, words in parts]


def decode_lanes(
    words: Bytes,
    sizes: UInt16[np.ndarray, " lanes"],
    lengths: UInt8[np.ndarray, " 256"],
    count: int,
    threads: int,
) -> tuple[UInt8[np.ndarray, " count"], int | None]:
    """Return the symbols of a plane, and the first lane of the first damaged share, if any.

    Args:
      words: the bytes of the words of all lanes.
      sizes: uint16 [lanes], the number of words of each lane, which together are all words.
      lengths: uint8 [256], the lengths of the code words of a complete code of two symbols or more.
      count: number of symbols; lanes = ceil(count / 1024).
      threads: number of threads.
    """
    plane, table = np.empty(count, np.uint8), prefix_code.table(lengths)
    starts, ends = huffman_lanes.starts(sizes), np.cumsum(sizes, dtype=np.int64)

    def one(first: int) -> int:
        last = min(first + _LANES, len(sizes))
        to = plane[first * huffman_lanes.LANE : last * huffman_lanes.LANE]
        if native.load():
            part = words[4 * starts[first] : 4 * ends[last - 1]].view("<u4")
            to[:], intact = huffman_lanes.read(part, sizes[first:last], table, len(to))
            return intact.all()
        return _library().jaxquant_huffman_decode(
            _at(words), len(words), _at(starts), _at(sizes), _at(table), prefix_code.width(lengths),
            first, last, count, _at(plane),
        )  # fmt: skip

    found = _map(one, range(0, len(sizes), _LANES), threads)
    bad = _damaged(found)
    return plane, None if bad is None else bad * _LANES


def encode_chunks(
    plane: UInt8[np.ndarray, " count"], frequencies: Int64[np.ndarray, " 256"], threads: int
) -> list[Bytes]:
    """Return the bytes of the words of every chunk of a plane in rANS.

    Args:
      plane: uint8 [count], contiguous.
      frequencies: int64 [256], as `byte_rans.frequencies` returns them.
      threads: number of threads.
    """
    if native.load():
        streams = byte_rans.encode(plane, frequencies)
        return [words.astype("<u2", copy=False).view(np.uint8) for words in streams]
    lanes, narrow = byte_rans.lanes(len(plane)), frequencies.astype(np.uint16)

    def one(first: int) -> np.ndarray:
        part = plane[first : first + byte_rans.CHUNK]
        room = np.empty(2 * lanes + len(part) + 1, np.uint16)  # the coder uses one word as scratch
        call = _library().jaxquant_rans_encode
        taken = call(_at(part), len(part), lanes, _at(narrow), _at(room))
        return room[len(room) - taken :].copy().view(np.uint8)

    return _map(one, range(0, len(plane), byte_rans.CHUNK), threads)


def decode_chunks(
    streams: Sequence[Bytes], frequencies: Int64[np.ndarray, " 256"], count: int, threads: int
) -> tuple[UInt8[np.ndarray, " count"], int | None]:
    """Return the symbols of a plane in rANS, and its first damaged chunk, if any.

    Args:
      streams: the bytes of the words of every chunk.
      frequencies: int64 [256], with the sum 2**14.
      count: number of symbols.
      threads: number of threads.
    """
    if native.load():
        words = [stream.view("<u2") for stream in streams]
        plane, intact = byte_rans.decode(words, count, frequencies)
        return plane, _damaged(intact.tolist())
    plane, narrow = np.empty(count, np.uint8), frequencies.astype(np.uint16)
    lanes = byte_rans.lanes(count)

    def one(i: int) -> int:
        to = plane[i * byte_rans.CHUNK : (i + 1) * byte_rans.CHUNK]
        call = _library().jaxquant_rans_decode
        return call(_at(streams[i]), len(streams[i]) // 2, lanes, len(to), _at(narrow), _at(to))

    return plane, _damaged(_map(one, range(len(streams)), threads))


def _damaged(intact: list[int]) -> int | None:
    """Return the first part that is not intact."""
    if _NO_MEMORY in intact:
        raise MemoryError("not enough memory to decode a plane")
    return next((i for i, one in enumerate(intact) if one != 1), None)


def _map(one: Callable[[int], Any], items: Iterable[int], threads: int) -> list[Any]:
    items = list(items)
    if threads == 1 or len(items) < 2:
        return list(map(one, items))
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(one, items))


def _at(a: np.ndarray) -> int:
    return a.ctypes.data


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(native.shared_object()))
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, takes, gives in (
        ("jaxquant_byte_counts", (p, n, p), None),
        ("jaxquant_huffman_encode", (p, n, p, p, p, p), n),
        ("jaxquant_huffman_decode", (p, n, p, p, p, i, n, n, n, p), i),
        ("jaxquant_rans_encode", (p, n, n, p, p), n),
        ("jaxquant_rans_decode", (p, n, n, n, p, p), i),
    ):
        call = getattr(library, name)
        call.argtypes, call.restype = takes, gives
    return library
