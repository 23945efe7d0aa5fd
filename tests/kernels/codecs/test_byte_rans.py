"""Planes of bytes in rANS: streams that `rans` reads, as short as the entropy of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codecs import byte_rans, rans, symbol_tables


def geometric(count, p=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return (120 - rng.geometric(p, count).clip(0, 100)).astype(np.uint8)


def table(plane):
    return byte_rans.frequencies(np.bincount(plane, minlength=256))


def cost(counts, frequencies):
    used = counts > 0
    return counts[used] @ (rans.PRECISION - np.log2(frequencies[used]))


histograms = st.lists(st.integers(0, 10**6), min_size=1, max_size=256).filter(any)


@settings(max_examples=60, deadline=None)
@given(histograms)
def test_frequencies_fill_the_slots_and_no_slot_is_better_elsewhere(few):
    counts = np.zeros(256, np.int64)
    counts[: len(few)] = few
    found = byte_rans.frequencies(counts)
    assert found.sum() == rans.SLOTS
    np.testing.assert_array_equal(found > 0, counts > 0)
    used = np.flatnonzero(counts)
    least = cost(counts, found)
    share = counts[used] / counts.sum()
    assert least <= counts.sum() * (-(share @ np.log2(share)) + 0.03)
    gain = counts[used] * np.log2(1 + 1 / found[used])  # by one slot more
    for i in used[found[used] > 1]:
        loss = counts[i] * np.log2(found[i] / (found[i] - 1))
        # Exact up to the rounding of shares, for which the greedy choice starts from below.
        assert gain[used != i].max(initial=0) <= 1.05 * loss + 1e-9 * least


def test_frequencies_of_rare_symbols():
    """They get a slot each, which the frequent ones lose."""
    counts = np.ones(256, np.int64)
    counts[100] = 10**9
    found = byte_rans.frequencies(counts)
    assert found[100] == rans.SLOTS - 255 and set(np.delete(found, 100).tolist()) == {1}
    assert byte_rans.frequencies(np.full(256, 3)).tolist() == [64] * 256


@pytest.mark.parametrize("count", [5, 5000])
def test_a_stream_is_one_of_rans(count):
    """Its encoder writes the same words, and its decoder reads them."""
    plane = geometric(count)
    frequencies = table(plane)
    below = byte_rans.below(frequencies)
    [words] = byte_rans.encode(plane, frequencies)
    lanes = byte_rans.lanes(count)
    steps = -(-count // lanes)
    free = steps * lanes - count  # symbols that own all slots
    own = np.append(frequencies[plane], [rans.SLOTS] * free).reshape(steps, lanes)
    start = np.append(below[plane], [0] * free).reshape(steps, lanes)
    want, used = rans.encode(jnp.asarray(start), jnp.asarray(own), len(words))
    assert int(used) == len(words)
    np.testing.assert_array_equal(words, want)

    whole = np.broadcast_to(below, (lanes, 256))
    nothing = np.r_[0, np.full(255, rans.SLOTS)]

    def step(reader, t):
        there = (jnp.arange(lanes) + t * lanes < count)[:, None]
        return rans.pull(jnp.asarray(words), reader, jnp.where(there, whole, nothing))

    reader, got = jax.lax.scan(step, rans.start(jnp.asarray(words), lanes), jnp.arange(steps))
    np.testing.assert_array_equal(got.reshape(-1)[:count], plane)
    assert bool(rans.intact(reader, words))


@pytest.mark.parametrize("count", [0, 1, 31, 33 * 1024 + 7])
def test_round_trip(count):
    plane = geometric(count)
    if not count:
        assert byte_rans.encode(plane, np.zeros(256, np.int64)) == []
        return
    frequencies = table(plane)
    streams = byte_rans.encode(plane, frequencies)
    got, intact = byte_rans.decode(streams, count, frequencies)
    np.testing.assert_array_equal(got, plane)
    assert intact.all()
    states = 2 * byte_rans.lanes(count)
    ideal = cost(np.bincount(plane, minlength=256), frequencies) / 16
    assert ideal <= sum(map(len, streams)) <= ideal + states


def test_a_changed_or_missing_word_is_seen():
    plane = geometric(500)
    frequencies = table(plane)
    [words] = byte_rans.encode(plane, frequencies)
    rng = np.random.default_rng(0)
    for i in range(10):
        bad = words.copy()
        bad[rng.integers(len(words))] ^= np.uint16(1 << rng.integers(16))
        for stream in (bad, words[: -1 - i], np.append(words, np.uint16(i))):
            _, [intact] = byte_rans.decode([stream], len(plane), frequencies)
            assert not intact


# --- tables of symbols ----------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 16384), st.integers(1, 256)), max_size=60), st.binary())
def test_tables_come_back(runs, more):
    values = np.array([v for value, run in runs for v in [value] * run] + [0] * 256)[:256]
    packed = symbol_tables.pack_frequencies(values)
    got, taken = symbol_tables.unpack_frequencies(memoryview(packed + more))
    np.testing.assert_array_equal(got, values)
    assert taken == len(packed)
    lengths = (values % 13).astype(np.uint8)
    packed = symbol_tables.pack_lengths(lengths)
    got, taken = symbol_tables.unpack_lengths(memoryview(packed + more))
    np.testing.assert_array_equal(got, lengths)
    assert taken == len(packed)


def test_tables_of_exponents_are_small():
    counts = np.zeros(256, np.int64)
    counts[100:120] = 2 ** np.arange(20)
    assert len(symbol_tables.pack_frequencies(byte_rans.frequencies(counts))) < 40
    assert len(symbol_tables.pack_lengths((counts > 0).astype(np.uint8))) == 13


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_a_table_or_an_error(data):
    for unpack in (symbol_tables.unpack_lengths, symbol_tables.unpack_frequencies):
        try:
            values, taken = unpack(memoryview(data))
        except ValueError:
            continue
        assert len(values) == 256 and taken <= len(data)
