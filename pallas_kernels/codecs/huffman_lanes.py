"""Planes of bytes in Huffman code, in lanes that are decoded independently of each other.

    | lane 0: code words of symbols 0 to 1023 | zeros | lane 1: symbols 1024 to 2047 | zeros | ...

A lane holds 1024 consecutive symbols; the last lane holds the rest. It occupies whole 32-bit words:
code word follows code word from the lowest bit of its first word on, and zeros fill its last word.
The number of words of each lane, its size, is stored beside the words. Lane i begins at word
sum_{j < i} size_j, so that one exclusive cumulative sum gives random access to all lanes, and a bit
that is wrong changes no symbol outside of its lane.

The padding costs about 16 bits a lane, and a size at most 16: together 0.03 bits per symbol, or
less where sizes are stored relative to the least (`pallas_kernels.byte_streams`). The code is that
of `prefix_code`. If it has a single symbol, all sizes are 0 and there are no words.

Source: fixed numbers of symbols, instead of the fixed numbers of bits of DFloat11 (Zhang et al.
2025, arXiv:2504.11651) and ECF8 (arXiv:2510.02676), which store where the first code word of each
thread begins and decode every symbol twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8, UInt16, UInt32

from pallas_kernels import lowering
from pallas_kernels.codecs import prefix_code
from pallas_kernels.cpu import native

LANE = 1024  # symbols
WORD = 32  # bits
MOST_WORDS = LANE * prefix_code.LIMIT // WORD  # of a lane


def lanes(count: int) -> int:
    """Return the number of lanes of a plane.

    Args:
      count: number of symbols of the plane.

    >>> lanes(0), lanes(1024), lanes(1025)
    (0, 1, 2)
    """
    return -(-count // LANE)


def starts(sizes: UInt16[Array, " lanes"]) -> Int[Array, " lanes"]:
    """Return the first word of each lane.

    Args:
      sizes: uint16 [lanes], the number of words of each lane. A NumPy array gives int64, an array
        of JAX int32.

    >>> starts(np.array([3, 5, 2], np.uint16)).tolist()
    [0, 3, 8]
    """
    xp, wide = (np, np.int64) if isinstance(sizes, np.ndarray) else (jnp, jnp.int32)
    return xp.cumsum(sizes, dtype=wide) - sizes.astype(wide)


def sizes(
    plane: UInt8[np.ndarray, " count"], lengths: UInt8[np.ndarray, " 256"]
) -> UInt16[np.ndarray, " lanes"]:
    """Return the number of words of each lane.

    Args:
      plane: uint8 [count], the symbols.
      lengths: uint8 [256], the lengths of the code words.

    >>> lengths = prefix_code.lengths(np.bincount([7, 7, 8], minlength=256))
    >>> sizes(np.array([7, 7, 8], np.uint8), lengths)
    array([1], dtype=uint16)
    """
    if np.count_nonzero(lengths) == 1:
        return np.zeros(lanes(len(plane)), np.uint16)
    bits = np.zeros(lanes(len(plane)) * LANE, np.uint16)
    bits[: len(plane)] = lengths[plane]
    return (-(-bits.reshape(-1, LANE).sum(1, dtype=np.int64) // WORD)).astype(np.uint16)


def encode(
    plane: UInt8[np.ndarray, " count"],
    lengths: UInt8[np.ndarray, " 256"],
    sizes: UInt16[np.ndarray, " lanes"],
) -> UInt32[np.ndarray, " words"]:
    """Return the words of all lanes, computed with NumPy.

    Args:
      plane: uint8 [count], the symbols.
      lengths: uint8 [256], the lengths of the code words.
      sizes: uint16 [lanes], the number of words of each lane.

    >>> lengths = prefix_code.lengths(np.bincount([7, 7, 8], minlength=256))
    >>> encode(np.array([7, 8, 7], np.uint8), lengths, np.array([1], np.uint16)).tolist()
    [2]
    """
    total = int(sizes.sum(dtype=np.int64))
    if total == 0:
        return np.zeros(0, np.uint32)
    bits = np.zeros(lanes(len(plane)) * LANE, np.int64)
    bits[: len(plane)] = lengths[plane]
    bits = bits.reshape(-1, LANE)
    at = (np.cumsum(bits, 1) - bits + WORD * starts(sizes)[:, None]).reshape(-1)[: len(plane)]
    word, shifted = (
        at // WORD,
        prefix_code.codes(lengths)[plane].astype(np.uint64) << (at % WORD).astype(np.uint64),
    )
    # Code words share no bits, so that sums are unions; sums below 2**53 are exact.
    low, high = (np.bincount(word + i, shifted >> 32 * i & 0xFFFFFFFF, total + 1) for i in (0, 1))
    return (low + high)[:total].astype(np.uint32)


def read(
    words: UInt32[np.ndarray, " words"],
    sizes: UInt16[np.ndarray, " lanes"],
    table: UInt16[np.ndarray, " entries"],
    count: int,
) -> tuple[UInt8[np.ndarray, " count"], Bool[np.ndarray, " lanes"]]:
    """Return the symbols, and which lanes end in their last words, computed with NumPy.

    This is the reader of hosts without a compiler, for codes of two symbols or more.

    Args:
      words: uint32 [words], the words of all lanes.
      sizes: uint16 [lanes], the number of words of each lane.
      table: uint16 [2**width], as `prefix_code.table` returns it.
      count: number of symbols of the plane.
    """
    words = np.concatenate([words, np.zeros(2, np.uint32)])
    out, first = np.empty((LANE, len(sizes)), np.uint8), starts(sizes)
    bit = np.zeros(len(sizes), np.int32)
    end = bit
    last = (count - 1) % LANE
    for t in range(LANE):
        bit, out[t] = step(words, first, bit, table)
        end = bit if t <= last else np.append(bit[:-1], end[-1])
    rest = sizes * np.int32(WORD) - end
    after = words[(first + end // WORD).clip(0, len(words) - 1)] >> (end % WORD).astype(np.uint32)
    intact = (rest >= 0) & (rest < WORD) & ((rest == 0) | (after == 0))
    return out.T.reshape(-1)[:count], intact


def step(words: Array, first: Array, bit: Array, table: Array) -> tuple[Array, Array]:
    """Decode one symbol in every lane; the arrays are all of NumPy or all of JAX.

    Args:
      words: uint32 [words], followed by at least one more word.
      first: integers [lanes], the first word of each lane.
      bit: int32 [lanes], the number of bits of each lane that are decoded.
      table: uint16 [2**width], as `prefix_code.table` returns it.
    Returns:
      `bit` after the symbols, and the symbols, uint8 [lanes].
    """
    at = (first + bit // WORD).clip(0, words.shape[0] - 2)
    shift = (bit % WORD).astype(np.uint32)
    window = words[at] >> shift | words[at + 1] << (WORD - 1 - shift) << 1
    entry = table[window & np.uint32(table.shape[0] - 1)]
    return bit + (entry >> 8).astype(np.int32), entry.astype(np.uint8)


@partial(jax.jit, static_argnames="count")
def decode(
    words: UInt32[Array, " words"],
    sizes: UInt16[Array, " lanes"],
    table: UInt16[Array, " entries"],
    *,
    count: int,
) -> UInt8[Array, " count"]:
    """Return the symbols of a plane, inside or outside of `jit`.

    Words beyond the last read as zeros. Of words that no encoder wrote, some symbols result. On the
    CPU, native code runs if it is available: it finds several symbols at a time.

    Args:
      words: uint32 [words], the words of all lanes.
      sizes: uint16 [lanes], the number of words of each lane.
      table: uint16 [2**width], as `prefix_code.table` returns it.
      count: number of symbols; lanes = ceil(count / 1024).
    Raises:
      ValueError: the number of lanes does not match `count`.

    >>> plane = np.array([7, 8, 7], np.uint8)
    >>> lengths = prefix_code.lengths(np.bincount(plane, minlength=256))
    >>> words, table = encode(plane, lengths, sizes(plane, lengths)), prefix_code.table(lengths)
    >>> decode(jnp.asarray(words), jnp.asarray(sizes(plane, lengths)), table, count=3).tolist()
    [7, 8, 7]
    """
    if sizes.shape != (lanes(count),):
        raise ValueError(
            f"{count} symbols take {lanes(count)} lanes, got sizes of shape {sizes.shape}"
        )
    plain = lambda words, sizes, table: decode_lanes(words, starts(sizes), table).reshape(-1)[
        :count
    ]
    if lowering.default_platform() != "cpu" or native.load():
        return plain(words, sizes, table)
    fast = jax.ffi.ffi_call(
        "jaxquant_huffman", jax.ShapeDtypeStruct((count,), jnp.uint8), vmap_method="sequential"
    )
    return lowering.by_lowering({"cpu": fast}, plain, words, sizes, jnp.asarray(table))


def decode_lanes(
    words: UInt32[Array, " words"], first: Int[Array, " lanes"], table: UInt16[Array, " entries"]
) -> UInt8[Array, "lanes 1024"]:
    """Return the symbols of some lanes: all, or those of one tile of a matrix.

    Args:
      words: uint32 [words], the words of all lanes.
      first: int32 [lanes], the first word of each lane wanted, from `starts`.
      table: uint16 [2**width], as `prefix_code.table` returns it.
    Returns:
      uint8 [lanes, 1024]; what follows the last symbol of the plane is arbitrary.
    """
    words, table = jnp.pad(words, (0, 2)), jnp.asarray(table)
    bit = jnp.zeros(first.shape, jnp.int32)
    _, symbols = jax.lax.scan(lambda b, _: step(words, first, b, table), bit, None, LANE)
    return symbols.T
