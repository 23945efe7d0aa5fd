"""Interleaved range coding (rANS): many lanes share one stream of 16-bit words.

A lane's state is a 32-bit integer x >= 2**16. A symbol that owns the slots [start, start + f) out
of 2**14 is decoded from x % 2**14 and leaves x' = f (x >> 14) + x % 2**14 - start. A lane whose
state falls below 2**16 takes the next word of the stream; within a step the lanes do so in order,
so that no lane needs an offset. All lanes make the same number of steps. A symbol that owns all
slots costs nothing, and fills the steps in which a lane has nothing to code.

All arithmetic is in integers and hence the same on every machine. The encoder starts each lane at
2**16. Decoding a stream to its end restores these states; a damaged stream almost surely does not.

Source: Duda 2013, arXiv:1311.2540; interleaving by Giesen 2014, arXiv:1402.3392.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt16, UInt32

PRECISION = 14  # number of bits of a frequency
SLOTS = 1 << PRECISION
LOW = 1 << 16


class Reader(NamedTuple):
    """A position in a stream.

    Attributes:
      states: the states of the lanes.
      next: index of the next word.
    """

    states: UInt32[Array, " lanes"]
    next: Int32[Array, ""]


def start(words: UInt16[Array, " words"], lanes: int) -> Reader:
    """Return the reader at the beginning of a stream.

    A stream consists of the lanes' states, low words first, followed by the words that they take.
    Missing words of a truncated or corrupt stream read as zeros.

    Args:
      words: the stream, uint16.
      lanes: number of lanes.
    """
    low, high = (
        words.at[jnp.arange(lanes) + i].get(mode="fill", fill_value=0).astype(jnp.uint32)
        for i in (0, lanes)
    )
    return Reader(low | high << 16, jnp.int32(2 * lanes))


def pull(
    words: UInt16[Array, " words"], reader: Reader, table: Int[Array, "lanes symbols"]
) -> tuple[Reader, Int32[Array, " lanes"]]:
    """Decode one symbol in every lane.

    Args:
      words: the stream, uint16.
      reader: the position in it.
      table: [lanes, symbols], the cumulative frequency below each symbol of each lane's
        distribution.
    Returns:
      The reader after the symbols, and the symbols, int32 [lanes].
    """
    slot = (reader.states % SLOTS).astype(jnp.int32)
    symbol = jnp.sum(table[:, 1:] <= slot[:, None], axis=1, dtype=jnp.int32)
    ends = jnp.pad(table, ((0, 0), (0, 1)), constant_values=SLOTS)
    below, above = (
        jnp.take_along_axis(ends, symbol[:, None] + i, 1)[:, 0].astype(jnp.int32) for i in (0, 1)
    )
    return _take(words, reader, slot - below, above - below), symbol


def pull_bits(
    words: UInt16[Array, " words"], reader: Reader, bits: Int[Array, " lanes"]
) -> tuple[Reader, Int32[Array, " lanes"]]:
    """Decode an integer of `bits` equally likely bits in every lane.

    Args:
      words: the stream, uint16.
      reader: the position in it.
      bits: number of bits in each lane, 0 to 14.
    Returns:
      The reader after the integers, and the integers, int32 [lanes].
    """
    slot = (reader.states % SLOTS).astype(jnp.int32)
    frequency = SLOTS >> bits
    value = slot >> PRECISION - bits
    return _take(words, reader, slot - value * frequency, frequency), value


def _take(words: Array, reader: Reader, rest: Array, frequency: Array) -> Reader:
    """Return the reader after a symbol, with states refilled from the stream."""
    states = frequency.astype(jnp.uint32) * (reader.states >> PRECISION) + rest.astype(jnp.uint32)
    short = states < LOW
    place = reader.next + jnp.cumsum(short, dtype=jnp.int32) - 1
    word = words.at[place].get(mode="fill", fill_value=0).astype(jnp.uint32)
    states = jnp.where(short, states << 16 | word, states)
    return Reader(states, reader.next + jnp.sum(short, dtype=jnp.int32))


def intact(reader: Reader, words: UInt16[Array, " words"]) -> Bool[Array, ""]:
    """Return whether a stream decoded to its end is one that `encode` wrote.

    Args:
      reader: the position after the last symbol.
      words: the stream, uint16.
    """
    return jnp.all(reader.states == LOW) & (reader.next <= words.shape[0])


def encode(
    starts: Int[Array, "steps lanes"], frequencies: Int[Array, "steps lanes"], size: int
) -> tuple[UInt16[Array, " size"], Int32[Array, ""]]:
    """Return the stream of a table of symbols, in the order in which `pull` decodes them.

    Args:
      starts: [steps, lanes], the cumulative frequency below each symbol.
      frequencies: [steps, lanes], the frequency of each symbol, 1 to 2**14.
      size: number of words to return.
    Returns:
      The stream, padded with zeros or truncated to `size` words, and the number of words that it
      actually takes.

    >>> half = jnp.full((16, 1), SLOTS // 2)  # 16 times the second of two equal symbols
    >>> words, used = encode(half, half, 4)
    >>> int(used)
    3
    >>> reader, symbol = pull(words, start(words, 1), jnp.array([[0, SLOTS // 2]]))
    >>> int(symbol[0])
    1
    """

    def step(states: Array, symbol: tuple) -> tuple[Array, tuple[Array, Array]]:
        start, frequency = (a.astype(jnp.uint32) for a in symbol)
        full = states >> (32 - PRECISION) >= frequency
        word = (states & 0xFFFF).astype(jnp.uint16)
        states = jnp.where(full, states >> 16, states)
        states = (states // frequency << PRECISION) + states % frequency + start
        return states, (full, word)

    lanes = starts.shape[1]
    first = jnp.full(lanes, LOW, jnp.uint32)
    states, told = jax.lax.scan(step, first, (starts, frequencies), reverse=True)
    given, words = (a.reshape(-1) for a in told)
    place = jnp.where(given, 2 * lanes + jnp.cumsum(given, dtype=jnp.int32) - 1, size)
    out = jnp.zeros(size, jnp.uint16).at[place].set(words, mode="drop")
    head = jnp.concatenate([states & 0xFFFF, states >> 16]).astype(jnp.uint16)
    used = 2 * lanes + jnp.sum(given, dtype=jnp.int32)
    return out.at[jnp.arange(2 * lanes)].set(head, mode="drop"), used
