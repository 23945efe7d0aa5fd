"""Canonical Huffman codes of bytes whose words are at most 12 bits long.

The lengths are the best within the limit, found by the package-merge algorithm. They alone define
the code: sorted by length and then by symbol, the symbols receive consecutive code words, the
shortest first. A code word is written from its first bit on into the low bits of a stream, so that
the low bits of what follows in the stream are an index into the table for decoding.

A code of one symbol has a word of length 1, which is never written.

Source: Larmore and Hirschberg 1990 (package-merge); Schwartz and Kallick 1964 (canonical codes).
"""

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

SYMBOLS = 256
LIMIT = 12  # largest length of a code word in bits


def lengths(counts: Int64[np.ndarray, " 256"], limit: int = LIMIT) -> UInt8[np.ndarray, " 256"]:
    """Return the lengths of the code words that code a plane in the fewest bits.

    Args:
      counts: int64 [256], how often each symbol occurs; their sum is below 2**58.
      limit: largest length, 8 to 12, in bits. The default is 12.
    Returns:
      uint8 [256]: 0 for symbols that do not occur.
    Raises:
      ValueError: `limit` or `counts` is not as described.

    >>> counts = np.zeros(256, np.int64)
    >>> counts[[3, 5, 9]] = 10, 1, 2
    >>> lengths(counts)[[3, 5, 9]].tolist()
    [1, 2, 2]
    """
    counts = np.asarray(counts)
    if not 8 <= limit <= LIMIT:
        raise ValueError(f"limit must be 8 to {LIMIT} bits, got {limit}")
    if counts.shape != (SYMBOLS,) or counts.dtype != np.int64 or counts.min() < 0:
        raise ValueError(
            f"counts must be {SYMBOLS} non-negative int64, got {counts.dtype} {counts.shape}"
        )
    used = np.flatnonzero(counts)
    used = used[np.argsort(counts[used], kind="stable")]
    found = np.zeros(SYMBOLS, np.uint8)
    found[used] = _package_merge(counts[used], limit) if len(used) > 1 else 1
    return found


def _package_merge(weights: Int64[np.ndarray, " n"], limit: int) -> UInt8[np.ndarray, " n"]:
    """Return the lengths of the code words of n >= 2 symbols, whose weights ascend.

    The items of a level are the symbols and the packages, each of which is a pair of items of the
    level below. The 2 n - 2 cheapest items of the top level are the code: the length of a symbol is
    the number of levels at which it is among what they contain.
    """
    merged = weights
    is_symbol = [np.ones(len(weights), bool)]
    for _ in range(limit - 1):
        packages = merged[: len(merged) // 2 * 2].reshape(-1, 2).sum(1)
        items = np.concatenate([weights, packages])
        order = np.argsort(items, kind="stable")  # symbols before packages of the same weight
        merged = items[order]
        is_symbol.append(order < len(weights))
    found = np.zeros(len(weights), np.uint8)
    taken = 2 * len(weights) - 2
    for level in reversed(is_symbol):
        symbols = int(level[:taken].sum())
        found[:symbols] += 1
        taken = 2 * (taken - symbols)
    return found


def check(lengths: UInt8[np.ndarray, " 256"]) -> None:
    """Raise an error unless these are the lengths of a complete code.

    Args:
      lengths: uint8 [256], the lengths of the code words, 0 for absent symbols.
    Raises:
      ValueError: a length exceeds 12, there is no symbol, or some bits begin no code word or two.
    """
    used = lengths[lengths > 0].astype(np.int64)
    if used.size == 0 or used.max() > LIMIT:
        raise ValueError(
            f"a prefix code has at least one symbol and lengths of at most {LIMIT} bits; "
            f"got {used.size} symbols and lengths up to {used.max(initial=0)}"
        )
    total, whole = int(np.sum(1 << LIMIT - used)), 1 << LIMIT
    if total != (whole if used.size > 1 else whole // 2):
        raise ValueError(
            f"the code words of a complete code take {whole} of {whole} leaves (a single symbol: "
            f"half of them), got {total} from {used.size} symbols"
        )


def width(lengths: UInt8[np.ndarray, " 256"]) -> int:
    """Return the largest length, the number of bits that index the table.

    Args:
      lengths: uint8 [256], as `lengths` returns them.
    """
    return int(lengths.max())


def codes(lengths: UInt8[np.ndarray, " 256"]) -> UInt16[np.ndarray, " 256"]:
    """Return the code words as integers whose lowest bit is the first in the stream.

    Args:
      lengths: uint8 [256], the lengths of a complete code.

    >>> of = np.zeros(256, np.uint8)
    >>> of[[3, 5, 9]] = 1, 2, 2  # the words 0, 10 and 11
    >>> codes(of)[[3, 5, 9]].tolist()
    [0, 1, 3]
    """
    used = np.flatnonzero(lengths)
    used = used[np.argsort(lengths[used], kind="stable")]
    leaves = 1 << LIMIT - lengths[used].astype(np.int64)
    words = np.cumsum(leaves) - leaves  # the words at the top of 12 bits
    found = np.zeros(SYMBOLS, np.uint16)
    found[used] = sum((words >> LIMIT - 1 - bit & 1) << bit for bit in range(LIMIT))
    return found


def table(lengths: UInt8[np.ndarray, " 256"]) -> UInt16[np.ndarray, " entries"]:
    """Return the table for decoding, with 2**width entries symbol + 256 length.

    The entry of an index is that of the code word in its low bits.

    Args:
      lengths: uint8 [256], the lengths of a complete code.

    >>> of = np.zeros(256, np.uint8)
    >>> of[[3, 5, 9]] = 1, 2, 2
    >>> [(int(entry) % 256, int(entry) // 256) for entry in table(of)]
    [(3, 1), (5, 2), (3, 1), (9, 2)]
    """
    bits, words = width(lengths), codes(lengths)
    found = np.empty(1 << bits, np.uint16)
    found[:] = np.flatnonzero(lengths)[0] | 1 << 8  # a single symbol also owns the other leaf
    for symbol in np.flatnonzero(lengths):
        found[words[symbol] :: 1 << int(lengths[symbol])] = symbol | int(lengths[symbol]) << 8
    return found
