"""Entropy coding of planes of bytes on the host, natively where a compiler is available.

    huffman: | lengths of the code words | least size, b | size - least of each lane | words |
    rans:    | frequencies | number of words of each chunk | words |

Tables of symbols are those of `symbol_tables`; lanes and their sizes those of `huffman_lanes`,
chunks those of `byte_rans`. The least size takes two bytes, the number b of bits one, and each
difference b bits, from the lowest bit of a byte on. A number of words takes four bytes. The last
lane or chunk, which may be shorter, is not among them: it has the words that remain, and if it is
the only one, least and b are absent too. All numbers are little-endian. An empty plane takes no
bytes, and one with a single symbol those of its table.

The bytes do not depend on the number of threads, on the machine, or on whether the native coders
are available. A stream does not hold the number of its symbols. Damage is always detected if it
changes the form of a stream, and in rANS nearly always; a Huffman stream whose words are damaged
may decode to other symbols. Who stores streams should store a checksum, too.
"""

import os
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

from pallas_kernels import byte_coders
from pallas_kernels.codecs import byte_rans, huffman_lanes, prefix_code, rans, symbol_tables

CODINGS = ("huffman", "rans")
_HEADER = 3  # bytes of the least size and the number of bits


def encode(plane: UInt8[np.ndarray, " count"], coding: str, threads: int | None = None) -> bytes:
    """Return a plane in few bytes.

    Args:
      plane: uint8 [count], the symbols.
      coding: "huffman" or "rans".
      threads: number of threads; by default, that of the processors.
    Raises:
      ValueError: `plane` or `coding` is not as described.

    >>> plane = np.repeat(np.array([7, 8], np.uint8), [1000, 24])
    >>> len(encode(plane, "huffman")), len(encode(plane, "rans"))
    (132, 32)
    """
    _check(coding)
    plane = np.ascontiguousarray(plane)
    if plane.dtype != np.uint8 or plane.ndim != 1:
        raise ValueError(f"a plane must be uint8 [count], got {plane.dtype} {list(plane.shape)}")
    if not len(plane):
        return b""
    counts = histogram(plane, threads)
    return (_huffman if coding == "huffman" else _rans)(plane, counts, _threads(threads))


def decode(
    data: bytes | memoryview, count: int, coding: str, threads: int | None = None
) -> UInt8[np.ndarray, " count"]:
    """Return the plane that `encode` coded.

    Args:
      data: the bytes.
      count: number of symbols of the plane.
      coding: "huffman" or "rans".
      threads: number of threads; by default, that of the processors.
    Raises:
      ValueError: the bytes are not those of such a plane.

    >>> plane = np.repeat(np.array([7, 8], np.uint8), [1000, 24])
    >>> bool((decode(encode(plane, "rans"), len(plane), "rans") == plane).all())
    True
    """
    _check(coding)
    view = memoryview(data).cast("B")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if count == 0:
        _expect(len(view) == 0, f"an empty plane takes no bytes, got {len(view)}")
        return np.zeros(0, np.uint8)
    return (_read_huffman if coding == "huffman" else _read_rans)(view, count, _threads(threads))


def size(counts: Int64[np.ndarray, " 256"], coding: str) -> int:
    """Return the expected number of bytes of a plane, from how often each symbol occurs.

    Where the symbols are decides the padding of Huffman lanes, and rANS rounds at each of them;
    both are taken on the average. The number is exact for planes with a single symbol, and for
    those of one Huffman lane.

    Args:
      counts: int64 [256], as `histogram` returns them.
      coding: "huffman" or "rans".

    >>> counts = np.zeros(256, np.int64)
    >>> counts[[7, 8]] = 1000, 24
    >>> size(counts, "huffman"), size(counts, "rans")
    (132, 32)
    """
    _check(coding)
    total = int(counts.sum())
    if total == 0:
        return 0
    one = np.count_nonzero(counts) == 1
    if coding == "huffman":
        lengths = prefix_code.lengths(counts)
        table = len(symbol_tables.pack_lengths(lengths))
        return table if one else table + _lanes_size(counts, lengths)
    frequencies = byte_rans.frequencies(counts)
    table = len(symbol_tables.pack_frequencies(frequencies))
    return table if one else table + _chunks_size(counts, frequencies)


def _lanes_size(counts: np.ndarray, lengths: np.ndarray) -> int:
    total, word = int(counts.sum()), huffman_lanes.WORD
    lanes, bits = huffman_lanes.lanes(total), int(counts @ lengths.astype(np.int64))
    variance = counts @ (lengths - bits / total) ** 2 / total
    if lanes == 1:
        return 4 * -(-bits // word)
    # Sizes within 3.5 deviations; the last words of lanes are half full, unless all are equal.
    spread = 7 * np.sqrt(variance * huffman_lanes.LANE) / word
    width = int(spread + 1).bit_length() if variance else 0
    padding = lanes * (word - 1) // 2 if variance else word - 1
    return _HEADER + -(-(lanes - 1) * width // 8) + (bits + padding) // word * 4


def _chunks_size(counts: np.ndarray, frequencies: np.ndarray) -> int:
    total, used = int(counts.sum()), counts > 0
    bits = counts[used] @ (rans.PRECISION - np.log2(frequencies[used]))
    chunks, lanes = byte_rans.chunks(total), byte_rans.lanes(total)
    # A state takes two words, and holds about half a word of the symbols.
    states = chunks * lanes
    return 4 * (chunks - 1) + 2 * (2 * states + round(max(0, bits / 16 - states / 2)))


def histogram(
    plane: UInt8[np.ndarray, " count"], threads: int | None = None
) -> Int64[np.ndarray, " 256"]:
    """Return how often each symbol occurs.

    Args:
      plane: uint8 [count], the symbols.
      threads: number of threads; by default, that of the processors.

    >>> histogram(np.array([3, 3, 5], np.uint8))[[3, 4, 5]].tolist()
    [2, 0, 1]
    """
    return byte_coders.counts(np.ascontiguousarray(plane), _threads(threads))


# --- Huffman lanes --------------------------------------------------------------------------


def _huffman(plane: np.ndarray, counts: np.ndarray, threads: int) -> bytes:
    lengths = prefix_code.lengths(counts)
    table = symbol_tables.pack_lengths(lengths)
    if np.count_nonzero(counts) == 1:
        return table
    sizes, words = byte_coders.encode_lanes(plane, lengths, threads)
    return b"".join((table, _pack_sizes(sizes[:-1]), *words))


def _pack_sizes(sizes: UInt16[np.ndarray, " lanes"]) -> bytes:
    if not len(sizes):
        return b""
    least = int(sizes.min())
    width = int(sizes.max() - least).bit_length()
    bits = (sizes - least)[:, None] >> np.arange(width, dtype=np.uint16) & 1
    packed = np.packbits(bits.astype(np.uint8), bitorder="little")
    return least.to_bytes(2, "little") + bytes([width]) + packed.tobytes()


def _read_huffman(data: memoryview, count: int, threads: int) -> np.ndarray:
    lengths, taken = symbol_tables.unpack_lengths(data)
    prefix_code.check(lengths)
    data = data[taken:]
    if np.count_nonzero(lengths) == 1:
        return _single(data, count, lengths)
    sizes, taken = _read_sizes(data, huffman_lanes.lanes(count) - 1)
    words = np.frombuffer(data[taken:], np.uint8)
    last = len(words) - 4 * int(sizes.sum(dtype=np.int64))
    most = 4 * huffman_lanes.MOST_WORDS
    _expect(
        0 <= last <= most and last % 4 == 0,
        f"the last lane must have 0 to {most} bytes, in fours, got {last}",
    )
    sizes = np.append(sizes, np.uint16(last // 4))
    plane, damaged = byte_coders.decode_lanes(words, sizes, lengths, count, threads)
    _expect(damaged is None, f"lane {damaged} or one that follows it is damaged")
    return plane


def _read_sizes(data: memoryview, lanes: int) -> tuple[UInt16[np.ndarray, " lanes"], int]:
    """Return the sizes of some lanes, and how many bytes they take."""
    if lanes == 0:
        return np.zeros(0, np.uint16), 0
    _expect(len(data) >= _HEADER, f"the sizes of lanes take {_HEADER} bytes, got {len(data)}")
    least, width = int.from_bytes(data[:2], "little"), data[2]
    taken = _HEADER + -(-lanes * width // 8)
    _expect(width <= 9, f"sizes of lanes differ in at most 9 bits, got {width}")
    _expect(taken <= len(data), f"{lanes} lanes take {taken} bytes of sizes, got {len(data)}")
    bits = np.unpackbits(np.frombuffer(data[_HEADER:taken], np.uint8), bitorder="little")
    _expect(not bits[lanes * width :].any(), "the bits after the sizes of lanes must be 0")
    places = 1 << np.arange(width, dtype=np.int64)
    sizes = bits[: lanes * width].reshape(lanes, width) @ places + least
    _expect(
        sizes.max() <= huffman_lanes.MOST_WORDS,
        f"a lane has at most {huffman_lanes.MOST_WORDS} words, got {sizes.max()}",
    )
    return sizes.astype(np.uint16), taken


# --- rANS -----------------------------------------------------------------------------------


def _rans(plane: np.ndarray, counts: np.ndarray, threads: int) -> bytes:
    frequencies = byte_rans.frequencies(counts)
    table = symbol_tables.pack_frequencies(frequencies)
    if np.count_nonzero(counts) == 1:
        return table
    chunks = byte_coders.encode_chunks(plane, frequencies, threads)
    sizes = np.array([len(words) // 2 for words in chunks[:-1]], "<u4")
    return b"".join((table, sizes.tobytes(), *chunks))


def _read_rans(data: memoryview, count: int, threads: int) -> np.ndarray:
    frequencies, taken = symbol_tables.unpack_frequencies(data)
    total = int(frequencies.sum())
    _expect(total == rans.SLOTS, f"frequencies must sum to {rans.SLOTS}, got {total}")
    data = data[taken:]
    if np.count_nonzero(frequencies) == 1:
        return _single(data, count, frequencies)
    chunks, lanes = byte_rans.chunks(count), byte_rans.lanes(count)
    head = 4 * (chunks - 1)
    least = head + 4 * lanes * chunks
    _expect(len(data) >= least, f"{chunks} chunks take {least} bytes or more, got {len(data)}")
    sizes = np.frombuffer(data[:head], "<u4").astype(np.int64)
    words = np.frombuffer(data[head:], np.uint8)
    last = len(words) - 2 * int(sizes.sum())
    _expect(last >= 0 and last % 2 == 0, f"the last chunk must have whole words, got {last} bytes")
    sizes = np.append(sizes, last // 2)
    ends = np.cumsum(sizes)
    parts = [words[2 * (end - size) : 2 * end] for end, size in zip(ends, sizes, strict=True)]
    plane, damaged = byte_coders.decode_chunks(parts, frequencies, count, threads)
    _expect(damaged is None, f"chunk {damaged} is damaged")
    return plane


# --- common ---------------------------------------------------------------------------------


def _check(coding: str) -> None:
    if coding not in CODINGS:
        raise ValueError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}")


def _expect(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"this is not the stream of such a plane: {what}")


def _single(rest: memoryview, count: int, table: np.ndarray) -> np.ndarray:
    _expect(len(rest) == 0, f"no bytes follow the table of one symbol, got {len(rest)}")
    return np.full(count, np.flatnonzero(table)[0], np.uint8)


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    return threads or os.cpu_count() or 1
