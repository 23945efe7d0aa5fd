"""Planes of bytes as interleaved rANS, with one table of frequencies for a whole plane.

The plane is cut into chunks of 2**18 symbols, which are coded independently of each other. Symbol i
of a chunk is in lane i mod lanes, and the stream of a chunk is exactly that of `rans`: the states,
followed by the words in the order in which the lanes take them. In the last step of a chunk, lanes
beyond its last symbol have nothing to code. The number of lanes is the power of two that gives each
about 1024 symbols, at most 32: the states cost at most 16 bits a lane beyond what they hold.

Frequencies are normalized to 2**14 slots. A plane of a single symbol has no words.

Source: see `rans`. The functions here run in NumPy, all chunks at once; the native coders of
`pallas_kernels.byte_streams` have the same results.
"""

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt16

from pallas_kernels.codecs import rans

CHUNK = 1 << 18  # symbols
MOST_LANES = 32
SYMBOLS = 256


def lanes(count: int) -> int:
    """Return the number of lanes of the chunks of a plane.

    Args:
      count: number of symbols of the plane.

    >>> lanes(1), lanes(5000), lanes(10**6)
    (1, 4, 32)
    """
    return min(MOST_LANES, 1 << max(1, count // 1024).bit_length() - 1)


def chunks(count: int) -> int:
    """Return the number of chunks of a plane.

    Args:
      count: number of symbols of the plane.

    >>> chunks(0), chunks(1 << 18), chunks(1 << 19)
    (0, 1, 2)
    """
    return -(-count // CHUNK)


def frequencies(counts: Int64[np.ndarray, " 256"]) -> Int64[np.ndarray, " 256"]:
    """Return frequencies with the sum 2**14 that code a plane in nearly the fewest bits.

    Shares are rounded down, but to at least 1. Single slots are then given to the symbols that gain
    most from one, or taken from those that lose least. The arithmetic is exact or correctly
    rounded, so that the result is the same on every machine.

    Args:
      counts: int64 [256], how often each symbol occurs; some do, and the sum is below 2**48.
    Returns:
      int64 [256], 0 for symbols that do not occur.

    >>> counts = np.zeros(256, np.int64)
    >>> counts[[3, 5]] = 2, 1
    >>> frequencies(counts)[[3, 5]].tolist()
    [10923, 5461]
    """
    used = np.flatnonzero(counts)
    own, total = counts[used], int(counts.sum())
    found = np.maximum(1, own * rans.SLOTS // total)
    while (missing := rans.SLOTS - int(found.sum())) > 0:
        found[np.argmax(own / (2 * found + 1))] += 1
    for _ in range(-missing):
        loss = np.where(found > 1, own / (2 * found - 1), np.inf)
        found[np.argmin(loss)] -= 1
    spread = np.zeros(SYMBOLS, np.int64)
    spread[used] = found
    return spread


def below(frequencies: Int64[np.ndarray, " 256"]) -> Int64[np.ndarray, " 256"]:
    """Return the number of slots below each symbol.

    Args:
      frequencies: int64 [256], with the sum 2**14.
    """
    return np.cumsum(frequencies) - frequencies


def encode(
    plane: UInt8[np.ndarray, " count"], frequencies: Int64[np.ndarray, " 256"]
) -> list[UInt16[np.ndarray, " words"]]:
    """Return the words of every chunk, computed with NumPy.

    Args:
      plane: uint8 [count], the symbols.
      frequencies: int64 [256], as `frequencies` returns them.

    >>> plane = np.array([1, 2] * 16, np.uint8)
    >>> table = frequencies(np.bincount(plane, minlength=256))
    >>> [words] = encode(plane, table)  # a state of two words, and 32 bits less what it holds
    >>> len(words)
    4
    """
    symbols, there = _laid_out(plane)
    count, steps, n = symbols.shape
    states = np.full((count, n), rans.LOW, np.uint32)
    words = np.zeros((count, steps, n), np.uint16)
    given = np.zeros((count, steps, n), bool)
    own, start = (a.astype(np.uint32) for a in (frequencies, below(frequencies)))
    for t in reversed(range(steps)):
        f, b = own[symbols[:, t]], start[symbols[:, t]]
        full = (states >> 32 - rans.PRECISION >= f) & there[:, t]
        given[:, t], words[:, t] = full, states & 0xFFFF
        states = np.where(full, states >> 16, states)
        after = (states // f << rans.PRECISION) + states % f + b
        states = np.where(there[:, t], after, states)
    head = np.concatenate([states & 0xFFFF, states >> 16], 1).astype(np.uint16)
    return [np.concatenate([head[i], words[i][given[i]]]) for i in range(count)]


def _laid_out(plane: UInt8[np.ndarray, " count"]) -> tuple[np.ndarray, np.ndarray]:
    """Return [chunks, steps, lanes]: symbols, and which of them are symbols of the plane."""
    n, count = lanes(len(plane)), chunks(len(plane))
    steps = -(-min(len(plane), CHUNK) // n)
    there = (np.arange(count * steps * n) < len(plane)).reshape(count, steps, n)
    filler = plane[0] if len(plane) else 0
    symbols = np.full(there.shape, filler, np.uint8)
    symbols.reshape(-1)[: len(plane)] = plane
    return symbols, there


def decode(
    streams: list[UInt16[np.ndarray, " words"]], count: int, frequencies: Int64[np.ndarray, " 256"]
) -> tuple[UInt8[np.ndarray, " count"], Bool[np.ndarray, " chunks"]]:
    """Return the symbols, and which chunks are intact, computed with NumPy.

    Missing words read as zeros. A corrupt chunk still decodes to some symbols.

    Args:
      streams: the words of every chunk, uint16 [words].
      count: number of symbols of the plane.
      frequencies: int64 [256], as `frequencies` returns them.

    >>> plane = np.array([1, 2] * 16, np.uint8)
    >>> table = frequencies(np.bincount(plane, minlength=256))
    >>> got, intact = decode(encode(plane, table), 32, table)
    >>> bool((got == plane).all()), intact.tolist()
    (True, [True])
    """
    _, there = _laid_out(np.zeros(count, np.uint8))
    shape = there.shape
    n = shape[2]
    ends = np.cumsum([len(words) for words in streams], dtype=np.int64)
    words = np.concatenate([*streams, np.zeros(1, np.uint16)]).astype(np.uint32)
    at = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[:, None]
    take = lambda at: np.where(at < ends[:, None], words[np.minimum(at, len(words) - 1)], 0)
    states = take(at + np.arange(n)) | take(at + np.arange(n, 2 * n)) << 16
    next_word = at + 2 * n
    slots = np.repeat(np.arange(SYMBOLS, dtype=np.uint8), frequencies)
    own, start = (a.astype(np.uint32) for a in (frequencies, below(frequencies)))
    out = np.empty(shape, np.uint8)
    for t in range(shape[1]):
        slot = states % rans.SLOTS
        out[:, t] = symbol = slots[slot]
        after = own[symbol] * (states >> rans.PRECISION) + slot - start[symbol]
        short = (after < rans.LOW) & there[:, t]
        word = take(next_word + np.cumsum(short, 1) - 1)
        after = np.where(short, after << 16 | word, after)
        states = np.where(there[:, t], after, states)
        next_word = next_word + short.sum(1, keepdims=True)
    intact = np.all(states == rans.LOW, 1) & (next_word[:, 0] == ends)
    return out.reshape(-1)[:count], intact
