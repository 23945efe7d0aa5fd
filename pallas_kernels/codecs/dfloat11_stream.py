"""DFloat11: bfloat16 weights with Huffman-coded exponents (arXiv:2504.11651), decoded with NumPy.

A weight is a byte of sign and mantissa, stored as it is, and an exponent in a stream of prefix
codes of at most 32 bits, most significant bit first. The stream is cut into segments of 8 bytes,
one for each GPU thread, and the segments into blocks of `threads` segments. A code belongs to the
segment in which it starts:

    gaps       5 bits per segment: the bit of the segment at which its first code starts
    positions  number of the first weight of every block, followed by the number of weights

The code is a tree of tables with 256 entries. The first table is indexed by the next 8 bits; an
entry v >= 240 points to table 256 - v, which is indexed by the 8 bits after these; any other entry
is an exponent. The last row of `luts` is no table: it holds the length of the code of every
exponent. Entries of bit patterns without a code repeat the entry before them, so the first place
of an entry is the one that counts.

Segments are independent of each other: all segments of a few blocks are decoded at a time, up to
GROUP codes of each per step.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16, UInt32, UInt64

SEGMENT = 8  # bytes
GAP = 5  # bits
LONGEST = 32  # bits of a code
POINTER = 240  # entries from here on point to another table
MOST_THREADS = 1024  # of a block of CUDA
CHUNK = 1 << 15  # number of segments that are decoded at a time
WINDOW = 12  # bits that are looked up at once
GROUP = 8  # most codes that a window gives
AHEAD = 8  # bytes after the last segment of a chunk, into which codes and windows extend


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The arrays of a compressed sequence of weights; their sizes are checked on construction.

    Attributes:
      luts: tables, then the lengths of the codes, uint8 [tables + 1, 256].
      encoded: the prefix codes of the exponents, uint8 [bytes].
      sign_mantissa: sign in bit 7 and mantissa in bits 0 to 6 of every weight, uint8 [weights].
      positions: as in the description of this module, uint32 [blocks + 1].
      gaps: as there, uint8 [ceil(5 threads blocks / 8)].
      threads: number of segments in a block, 1 to 1024.
    Raises:
      ValueError: the sizes contradict each other, or an exponent cannot be told from a pointer.
    """

    luts: UInt8[np.ndarray, "rows 256"]
    encoded: UInt8[np.ndarray, " bytes"]
    sign_mantissa: UInt8[np.ndarray, " weights"]
    positions: UInt32[np.ndarray, " blocks+1"]
    gaps: UInt8[np.ndarray, " packed"]
    threads: int

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be 1 to {MOST_THREADS}, got {self.threads}")
        _check_tables(self.luts)
        blocks = -(-self.encoded.size // (SEGMENT * self.threads))
        positions = self.positions
        # The encoder omits the last block if the last code ends in it, on a byte, and none starts.
        if positions.size == blocks > 0:
            positions = np.append(positions, positions[-1:])
            object.__setattr__(self, "positions", positions)
        _check_size("output_positions", positions.size, blocks + 1, "numbers")
        _check_size("gaps", self.gaps.size, -(-GAP * self.threads * blocks // 8), "bytes")
        if positions[0] or positions[-1] != self.count or (positions[1:] < positions[:-1]).any():
            raise ValueError(
                f"output_positions must rise from 0 to the number of weights, {self.count}; got "
                f"{positions[0]} to {positions[-1]}, or a fall in between"
            )

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.sign_mantissa.size


class _Book(NamedTuple):
    """The codes, in the order of their bits.

    Attributes:
      values: the codes, as the first bits of words of 32 bits whose other bits are 0.
      symbols: the exponents.
      lengths: number of bits of the codes.
    """

    values: UInt32[np.ndarray, " codes"]
    symbols: UInt8[np.ndarray, " codes"]
    lengths: UInt8[np.ndarray, " codes"]


class _Windows(NamedTuple):
    """What the next WINDOW bits stand for, of which codes may start in the first `room` bits.

    Attributes:
      symbols: the exponents of up to GROUP codes, one per byte.
      counts: the number of codes, all of whose bits are in the window.
      sizes: number of bits that these take.
    """

    symbols: UInt64[np.ndarray, " windows"]
    counts: UInt8[np.ndarray, " places"]
    sizes: UInt8[np.ndarray, " places"]


class _Segments(NamedTuple):
    """Consecutive segments, decoded; positions are in bits from the start of the first one.

    Attributes:
      symbols: the exponents.
      counts: number of exponents in each.
      starts, stops: where the first code starts, and where the last one ends.
    """

    symbols: UInt8[np.ndarray, " n"]
    counts: Int64[np.ndarray, " segments"]
    starts: Int64[np.ndarray, " segments"]
    stops: Int64[np.ndarray, " segments"]


def decode(stream: Stream, begin: int = 0, end: int | None = None) -> UInt16[np.ndarray, " n"]:
    """Return weights begin to end as the bits of bfloat16; only their blocks are decoded.

    Args:
      stream: the compressed weights.
      begin: number of the first weight, 0 to stream.count.
      end: number of the weight after the last one, begin to stream.count; None for all.
    Raises:
      ValueError: the range is not within the stream; or the codes are not those of as many weights
        as `positions` says, or do not follow each other as `gaps` says.

    >>> luts = np.zeros((2, 256), np.uint8)
    >>> luts[0, :128], luts[0, 128:], luts[1, 126:128] = 126, 127, 1
    >>> byte = lambda *values: np.array(values, np.uint8)
    >>> ends = np.array([0, 3], np.uint32)
    >>> stream = Stream(luts, byte(0b10100000), byte(0, 0, 128), ends, byte(0), threads=1)
    >>> [hex(w) for w in decode(stream)]  # 1, 0.5 and -1
    ['0x3f80', '0x3f00', '0xbf80']
    """
    end = stream.count if end is None else end
    if not 0 <= begin <= end <= stream.count:
        raise ValueError(f"expected 0 <= begin <= end <= {stream.count}, got {begin} and {end}")
    weights = np.empty(end - begin, np.uint16)
    if begin == end:
        return weights
    book = _book(stream.luts)
    windows = _windows(book)
    first = int(np.searchsorted(stream.positions, begin, "right")) - 1
    last = int(np.searchsorted(stream.positions, end))
    _check_start(stream, book, windows, first * stream.threads)
    step = max(1, CHUNK // stream.threads)
    for a in range(first, last, step):
        b = min(a + step, last)
        exponents = _exponents(stream, book, windows, a, b)
        at = int(stream.positions[a])
        lo, hi = max(begin, at), min(end, at + exponents.size)
        part = stream.sign_mantissa[lo:hi].astype(np.uint16)
        bits = exponents[lo - at : hi - at].astype(np.uint16) << 7
        weights[lo - begin : hi - begin] = (part & 0x80) << 8 | bits | part & 0x7F
    return weights


def _check_tables(luts: np.ndarray) -> None:
    if luts.ndim != 2 or luts.shape[1] != 256 or not 2 <= len(luts) <= 256 - POINTER + 2:
        most = 256 - POINTER + 2
        raise ValueError(f"luts must have shape [2 to {most}, 256], got {list(luts.shape)}")
    lengths = luts[-1]
    if lengths[POINTER:].any():
        raise ValueError(
            f"luts give codes to exponents of {POINTER} and more (infinity and NaN among them), "
            "which DFloat11 cannot tell from pointers; compress the model with weights below 2^113"
        )
    if lengths.max() > LONGEST:
        raise ValueError(f"luts have a code of {lengths.max()} bits; at most {LONGEST} are allowed")


def _check_size(name: str, got: int, expected: int, unit: str) -> None:
    if got != expected:
        raise ValueError(f"{name} must hold {expected} {unit} for this stream, got {got}")


def _book(luts: np.ndarray) -> _Book:
    """Return the codes that the tables describe."""
    reached, found = {0: (0, 0)}, {}  # table -> level, first bits; exponent -> first bits
    for i, table in enumerate(luts[:-1]):
        if i not in reached:
            raise ValueError(f"luts have no pointer to table {i} in the tables before it")
        level, start = reached[i]
        if level == LONGEST // 8:
            raise ValueError(f"luts have tables for codes of more than {LONGEST} bits")
        shift = 24 - 8 * level
        for slot in np.flatnonzero(table >= POINTER).tolist():
            reached.setdefault(256 - int(table[slot]), (level + 1, start | slot << shift))
        for symbol in set(table[table < POINTER].tolist()) - found.keys():
            spare = 8 * level + 8 - int(luts[-1, symbol])
            if 0 <= spare < 8:
                runs = (table.reshape(-1, 1 << spare) == symbol).all(1)
                if runs.any():
                    found[symbol] = start | int(runs.argmax()) << spare + shift
    symbols = np.array(sorted(found, key=found.__getitem__), np.uint8)
    missing = np.setdiff1d(np.flatnonzero(luts[-1]), symbols)
    if missing.size:
        raise ValueError(f"luts give a length to exponent {missing[0]}, but no code")
    lengths = luts[-1, symbols]
    values = np.array(sorted(found.values()), np.uint64)
    ends = values + (np.uint64(1) << LONGEST - lengths.astype(np.uint64))
    if (ends[:-1] > values[1:]).any():
        raise ValueError("luts have a code that begins with another one")
    return _Book(values.astype(np.uint32), symbols, lengths)


def _look_up(book: _Book, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the exponents whose codes begin words of 32 bits, and their lengths; 0 for none."""
    if not book.values.size:
        return np.zeros(bits.shape, np.uint8), np.zeros(bits.shape, np.uint8)
    i = np.searchsorted(book.values[1:], bits, "right")
    lengths = book.lengths[i]
    begins = (bits ^ book.values[i]).astype(np.uint64) >> (LONGEST - lengths.astype(np.uint64)) == 0
    return book.symbols[i], lengths * begins


def _windows(book: _Book) -> _Windows:
    windows = np.arange(1 << WINDOW)
    symbols, lengths = _look_up(book, windows.astype(np.uint32) << (LONGEST - WINDOW))
    room = np.arange(WINDOW + 1)[:, None]
    at, counts = np.zeros((2, WINDOW + 1, 1 << WINDOW), np.uint8)
    groups = np.zeros((1 << WINDOW, GROUP), np.uint8)
    for i in range(GROUP):
        rest = windows << at & len(windows) - 1
        size = lengths[rest]
        whole = (counts == i) & (size > 0) & (at + size <= WINDOW) & (at < room)
        groups[:, i] = symbols[rest[-1]]
        at += size * whole
        counts += whole
    return _Windows(groups.view(np.uint64)[:, 0], counts.reshape(-1), at.reshape(-1))


def _exponents(
    stream: Stream, book: _Book, windows: _Windows, a: int, b: int
) -> UInt8[np.ndarray, " n"]:
    """Return the exponents of blocks a to b."""
    found = _segments(stream, book, windows, a * stream.threads, b * stream.threads)
    _check_counts(stream, found, a, b)
    exponents = found.symbols
    wanted = int(stream.positions[b]) - int(stream.positions[a])
    if stream.positions[b] < stream.count:
        following = _starts(stream, b * stream.threads, b * stream.threads + 1)
        starts = np.append(found.starts, following + 8 * SEGMENT * found.counts.size)
        _check_chain(found.stops, starts[1:])
        return exponents
    ends = np.cumsum(found.counts)
    holder = int(np.searchsorted(ends, wanted))  # segment of the last code of the stream
    _check_chain(found.stops[:holder], found.starts[1 : holder + 1])
    extra = exponents[wanted : ends[holder]]  # padding that looks like codes
    stop = int(found.stops[holder]) - int(stream.luts[-1, extra].sum(dtype=np.int64))
    used = SEGMENT * stream.threads * a - (-stop // 8)
    _check_size("encoded_exponent", stream.encoded.size, used, "bytes")
    return exponents[:wanted]


def _check_start(stream: Stream, book: _Book, windows: _Windows, segment: int) -> None:
    """Raise ValueError unless a segment starts where the one before it ends, or the stream does."""
    if segment == 0:
        _check_chain(np.zeros(1, np.int64), _starts(stream, 0, 1))
    else:
        before = _segments(stream, book, windows, segment - 1, segment)
        _check_chain(before.stops, _starts(stream, segment - 1, segment + 1)[1:])


def _check_chain(stops: np.ndarray, starts: np.ndarray) -> None:
    """Raise ValueError unless each segment ends where the next one starts."""
    wrong = stops != starts
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"gaps say that a segment starts at bit {starts[i]}, but the codes before it end at "
            f"bit {stops[i]}"
        )


def _check_counts(stream: Stream, found: _Segments, a: int, b: int) -> None:
    positions = stream.positions[a : b + 1].astype(np.int64)
    counts = found.counts.reshape(b - a, -1).sum(1)
    wanted = np.diff(positions)
    # Padding after the last code of the stream may look like codes.
    padded = positions[1:] == stream.count
    wrong = np.where(padded, counts < wanted, counts != wanted)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(
            f"block {a + i} holds {counts[i]} codes, but output_positions say {wanted[i]}"
        )


def _starts(stream: Stream, first: int, last: int) -> Int64[np.ndarray, " segments"]:
    """Return the bit at which the first code of segments first to last starts, from the first."""
    packed = stream.gaps[GAP * first // 8 : -(-GAP * last // 8)]
    skipped = GAP * first % 8
    bits = np.unpackbits(packed)[skipped : skipped + GAP * (last - first)].reshape(-1, GAP)
    gaps = bits @ (1 << np.arange(GAP)[::-1])
    return gaps + 8 * SEGMENT * np.arange(last - first)


def _segments(stream: Stream, book: _Book, windows: _Windows, first: int, last: int) -> _Segments:
    """Decode segments first to last."""
    data = stream.encoded[SEGMENT * first : SEGMENT * last + AHEAD].astype(np.uint32)
    bits = 8 * data.size if SEGMENT * last >= stream.encoded.size else 8 * SEGMENT * (last - first)
    data = np.pad(data, (0, SEGMENT * (last - first) + AHEAD - data.size))
    words = data[:-3] << 24 | data[1:-2] << 16 | data[2:-1] << 8 | data[3:]
    starts = _starts(stream, first, last)
    limits = np.minimum(8 * SEGMENT * np.arange(1, last - first + 1), bits)
    at, symbols, counts = starts.copy(), [], []
    while not counts or (at < limits).any():
        room = np.clip(limits - at, 0, WINDOW)
        shift = (LONGEST - WINDOW - (at & 7)).astype(np.uint32)
        window = words.take(at >> 3, mode="clip") >> shift & (1 << WINDOW) - 1
        place = room << WINDOW | window
        group = windows.symbols.take(window, mode="clip")
        count = windows.counts.take(place, mode="clip")
        size = windows.sizes.take(place, mode="clip")
        longer = np.flatnonzero((count == 0) & (room > 0))
        if longer.size:
            group[longer], size[longer] = _look_up(book, _words(data, at[longer]))
            count[longer] = size[longer] > 0
            unknown = longer[size[longer] == 0]
            limits[unknown] = at[unknown]
        symbols.append(group)
        counts.append(count)
        at += size
    each = np.stack(counts, 1)
    held = np.arange(GROUP, dtype=np.uint8) < each[:, :, None]
    return _Segments(
        np.stack(symbols, 1).view(np.uint8)[held.reshape(len(at), -1)],
        each.sum(1, dtype=np.int64),
        starts,
        at,
    )


def _words(data: np.ndarray, at: np.ndarray) -> UInt32[np.ndarray, " n"]:
    """Return the 32 bits of data, one byte per entry, from each of the bits `at` on."""
    bytes_ = data[(at >> 3)[:, None] + np.arange(5)].astype(np.uint64)
    whole = bytes_ @ (np.uint64(1) << np.arange(32, -1, -8, dtype=np.uint64))
    return (whole >> (8 - (at & 7)).astype(np.uint64)).astype(np.uint32)
