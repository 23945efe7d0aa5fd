"""Range coding: bit-exact, as short as the entropy, and harmless on noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs import rans

ROWS = 6  # distributions of a test


def problem(symbols, lanes, steps, seed):
    """Random tables, one all but certain, and symbols drawn from them."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(symbols, 0.3), ROWS)
    share[0] = np.eye(symbols)[0]
    frequency = 1 + (share * (rans.SLOTS - symbols)).astype(int)
    frequency[:, 0] += rans.SLOTS - frequency.sum(1)
    below = np.cumsum(frequency, 1) - frequency
    row = rng.integers(0, ROWS, (steps, lanes))
    slot = rng.integers(0, rans.SLOTS, row.shape)
    symbol = (below[row] <= slot[..., None]).sum(-1) - 1
    return frequency, below, row, symbol


def encoded(frequency, below, row, symbol, size):
    words, used = rans.encode(jnp.asarray(below[row, symbol]), frequency[row, symbol], size)
    return words, int(used)


@jax.jit
def decoded(words, below, row):
    step = lambda reader, row: rans.pull(words, reader, below[row])
    reader, symbol = jax.lax.scan(step, rans.start(words, row.shape[1]), row)
    return symbol, rans.intact(reader, words), reader.next


def by_hand(words, below, frequency, row):
    """The decoder in Python's integers, a lane after the other."""
    words = [int(w) for w in words]
    lanes = row.shape[1]
    states = [words[i] + (words[lanes + i] << 16) for i in range(lanes)]
    words, out = words[2 * lanes :], np.zeros(row.shape, int)
    for t, lane in np.ndindex(*row.shape):
        x, r = states[lane], row[t, lane]
        symbol = np.searchsorted(below[r], x % rans.SLOTS, side="right") - 1
        x = int(frequency[r, symbol]) * (x // rans.SLOTS) + x % rans.SLOTS - int(below[r, symbol])
        if x < 2**16:
            x = (x << 16) + words.pop(0)
        states[lane], out[t, lane] = x, symbol
    return out, states, words


@pytest.mark.parametrize(
    ("symbols", "lanes", "steps"), [(2, 1, 300), (103, 7, 100), (17, 32, 40), (300, 3, 1)]
)
def test_round_trip(symbols, lanes, steps):
    frequency, below, row, symbol = problem(symbols, lanes, steps, seed=symbols)
    size = 2 * lanes + lanes * steps
    words, used = encoded(frequency, below, row, symbol, size)
    assert words.dtype == jnp.uint16
    assert not words[used:].any()
    got, intact, read = decoded(words, jnp.asarray(below), row)
    np.testing.assert_array_equal(got, symbol)
    assert bool(intact)
    assert int(read) == used
    hand, states, left = by_hand(words[:used], below, frequency, row)
    np.testing.assert_array_equal(hand, symbol)
    assert states == [2**16] * lanes
    assert not left


def test_length_is_the_entropy():
    """Never below; above by the 16 bits that start a lane, a word, and 0.1 %."""
    lanes = 4
    frequency, below, row, symbol = problem(40, lanes, 4000, seed=0)
    _, used = encoded(frequency, below, row, symbol, 10)
    bits = -np.log2(frequency[row, symbol] / rans.SLOTS).sum()
    assert bits <= 16 * used <= 1.001 * bits + 16 * (2 * lanes)


def test_a_certain_symbol_is_free():
    whole, none = jnp.full((1000, 3), rans.SLOTS), jnp.zeros((1000, 3), int)
    words, used = rans.encode(none, whole, 10)
    assert int(used) == 6
    assert words.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]  # the lanes' 2**16


def test_plain_bits():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 15, (50, 5))
    value = rng.integers(0, 1 << bits)
    slots = rans.SLOTS >> bits
    words, used = rans.encode(jnp.asarray(value * slots), jnp.asarray(slots), 400)
    step = lambda reader, bits: rans.pull_bits(words, reader, bits)
    reader, got = jax.lax.scan(step, rans.start(words, 5), jnp.asarray(bits))
    np.testing.assert_array_equal(got, value)
    assert bool(rans.intact(reader, words))
    assert bits.sum() <= 16 * int(used) <= bits.sum() + 16 * 10


def test_damage_is_noticed_and_harmless():
    frequency, below, row, symbol = problem(20, 8, 60, seed=3)
    words, used = encoded(frequency, below, row, symbol, 500)
    table = jnp.asarray(below)
    noise = np.random.default_rng(0).integers(0, 1 << 16, used).astype(np.uint16)
    damaged = [words[:used].at[i].set(words[i] ^ 1) for i in (0, 9, used // 2, used - 1)]
    cut = [words[: used - 1], words[:20], words[:3], jnp.zeros(used, jnp.uint16)]
    for stream in [*damaged, *cut, jnp.asarray(noise)]:
        got, intact, _ = decoded(stream, table, row)
        assert not bool(intact)
        assert int(got.min()) >= 0
        assert int(got.max()) < 20
    assert bool(decoded(words[:used], table, row)[1])


def test_a_stream_that_does_not_fit_says_so():
    problem_ = problem(20, 8, 60, seed=4)
    words, used = encoded(*problem_, 500)
    short, same = encoded(*problem_, used - 1)
    assert same == used
    np.testing.assert_array_equal(short, words[: used - 1])
    assert not bool(decoded(short, jnp.asarray(problem_[1]), problem_[2])[1])
