"""Tables of 256 numbers, most of which are often zero, in few bytes.

    lengths of code words, 0 to 15, in nibbles, the low one of a byte first:
        l > 0: l                 r zeros: 0, (r - 1) mod 16, (r - 1) div 16
    frequencies, 0 to 2**14, in bytes:
        f < 128: f               f >= 128: 128 + f mod 128, f div 128            r zeros: 0, r - 1

The numbers come in the order of their symbols, and r is the length of a whole run of zeros. A zero
follows an odd number of nibbles. The plane of an exponent with 20 symbols takes about 13 bytes of
lengths or 40 bytes of frequencies.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

SYMBOLS = 256
_Rule = Callable[[Sequence[int], int], tuple[int, int, int]]


def pack_lengths(lengths: UInt8[np.ndarray, " 256"]) -> bytes:
    """Return the bytes of a table of lengths.

    Args:
      lengths: uint8 [256], 0 to 15.

    >>> pack_lengths(np.repeat(np.uint8([0, 3, 0]), [100, 8, 148])).hex()
    '30363333330393'
    """
    nibbles: list[int] = []
    for value, run in _runs(lengths):
        nibbles += [value] * run if value else [0, (run - 1) % 16, (run - 1) // 16]
    nibbles += [0] * (len(nibbles) % 2)
    low, high = np.array(nibbles, np.uint8).reshape(-1, 2).T
    return (low | high << 4).tobytes()


def unpack_lengths(data: memoryview) -> tuple[UInt8[np.ndarray, " 256"], int]:
    """Return the table of lengths at the beginning of some bytes, and how many bytes it takes.

    Args:
      data: the bytes.
    Raises:
      ValueError: the bytes are no such table.

    >>> table, taken = unpack_lengths(memoryview(pack_lengths(np.full(256, 8, np.uint8)) + b"more"))
    >>> taken, set(table.tolist())
    (128, {8})
    """
    nibbles = [half for byte in data[: 2 * SYMBOLS] for half in (byte % 16, byte // 16)]
    values, taken = _read(nibbles, _length)
    if taken % 2 and nibbles[taken]:
        raise ValueError(f"a table of lengths must end with a nibble 0, got {nibbles[taken]}")
    return np.array(values, np.uint8), -(-taken // 2)


def pack_frequencies(frequencies: Int64[np.ndarray, " 256"]) -> bytes:
    """Return the bytes of a table of frequencies.

    Args:
      frequencies: int64 [256], 0 to 2**14.

    >>> pack_frequencies(np.repeat([0, 2048, 5, 0], [100, 7, 1, 148])).hex(" ", 2)
    '00 6380 1080 1080 1080 1080 1080 1080 1005 0093'
    """
    found = bytearray()
    for value, run in _runs(frequencies):
        one = [value] if value < 128 else [128 + value % 128, value // 128]
        found += bytes(one * run if value else [0, run - 1])
    return bytes(found)


def unpack_frequencies(data: memoryview) -> tuple[Int64[np.ndarray, " 256"], int]:
    """Return the table of frequencies at the beginning of some bytes, and how many bytes it takes.

    Args:
      data: the bytes.
    Raises:
      ValueError: the bytes are no such table.

    >>> packed = pack_frequencies(np.full(256, 64))
    >>> unpack_frequencies(memoryview(packed))[1]
    256
    """
    values, taken = _read(data[: 2 * SYMBOLS], _frequency)
    return np.array(values, np.int64), taken


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    return [(int(value), len(list(run))) for value, run in itertools.groupby(values.tolist())]


def _read(units: Sequence[int], rule: _Rule) -> tuple[list[int], int]:
    """Return 256 numbers, and how many units they take.

    Args:
      units: nibbles or bytes.
      rule: maps the units and a position to a number, how often it occurs, and the next position.
    """
    values: list[int] = []
    at = 0
    try:
        while len(values) < SYMBOLS:
            value, run, at = rule(units, at)
            values += [value] * run
    except IndexError:
        raise ValueError(
            f"a table of {SYMBOLS} symbols is cut off after {len(values)} of them"
        ) from None
    if len(values) > SYMBOLS:
        raise ValueError(f"a table must have {SYMBOLS} symbols, got {len(values)}")
    return values, at


def _length(nibbles: Sequence[int], at: int) -> tuple[int, int, int]:
    if value := nibbles[at]:
        return value, 1, at + 1
    return 0, 1 + nibbles[at + 1] + 16 * nibbles[at + 2], at + 3


def _frequency(units: Sequence[int], at: int) -> tuple[int, int, int]:
    value = units[at]
    if value == 0:
        return 0, 1 + units[at + 1], at + 2
    if value < 128:
        return value, 1, at + 1
    return value % 128 + 128 * units[at + 1], 1, at + 2
