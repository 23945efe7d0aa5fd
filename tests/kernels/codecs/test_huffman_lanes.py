"""Length-limited Huffman codes, and lanes that are decoded independently of each other."""

import heapq
import itertools
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codecs import huffman_lanes, prefix_code
from pallas_kernels.codecs.huffman_lanes import LANE
from pallas_kernels.cpu import native

REASON = native.load()


def geometric(count, p=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return (120 - rng.geometric(p, count).clip(0, 100)).astype(np.uint8)


def encoded(plane):
    lengths = prefix_code.lengths(np.bincount(plane, minlength=256))
    sizes = huffman_lanes.sizes(plane, lengths)
    return huffman_lanes.encode(plane, lengths, sizes), sizes, prefix_code.table(lengths)


def unlimited(counts):
    """The cost in bits of the best prefix code: the sum of all merged weights."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


def kraft(lengths):
    return sum(Fraction(1, 1 << int(x)) for x in lengths if x)


histograms = st.lists(st.integers(0, 3000), min_size=2, max_size=256).filter(
    lambda c: sum(x > 0 for x in c) > 1
)


@settings(max_examples=60, deadline=None)
@given(histograms, st.integers(8, 12))
def test_codes_are_complete_and_as_short_as_theory_says(few, limit):
    counts = np.zeros(256, np.int64)
    counts[: len(few)] = few
    lengths = prefix_code.lengths(counts, limit)
    prefix_code.check(lengths)
    assert kraft(lengths) == 1 and lengths.max() <= limit
    np.testing.assert_array_equal(lengths > 0, counts > 0)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    cost, best = int(counts @ lengths.astype(np.int64)), unlimited(counts)
    assert cost >= best
    if lengths.max() < limit:  # the limit did not bind
        assert cost == best
        assert entropy <= cost / counts.sum() + 1e-9 and cost / counts.sum() < entropy + 1


def cheapest(counts, limit):
    """The cost of the best code within a limit, by all ways to share out the leaves of a tree."""
    counts = sorted(counts)

    def search(i, leaves, least):
        if i < 0:
            return 0 if leaves == 0 else np.inf
        found = np.inf
        for length in range(least, limit + 1):  # the frequent symbols first
            if 1 << limit - length <= leaves:
                rest = search(i - 1, leaves - (1 << limit - length), length)
                found = min(found, counts[i] * length + rest)
        return found

    return search(len(counts) - 1, 1 << limit, 1)


def test_within_a_limit_no_code_is_shorter():
    rng = np.random.default_rng(0)
    for _ in range(6):
        few = (2.0 ** rng.uniform(0, 14, 6)).astype(np.int64)
        lengths = prefix_code._package_merge(np.sort(few), 4)
        assert np.sort(few) @ lengths.astype(np.int64) == cheapest(few.tolist(), 4)
        assert kraft(lengths) == 1


def test_a_limit_of_eight_bits_leaves_one_code_of_all_symbols():
    counts = np.arange(1, 257)
    assert set(prefix_code.lengths(counts, 8).tolist()) == {8}
    fibonacci = np.zeros(256, np.int64)
    fibonacci[:30] = np.round(1.618 ** np.arange(30))
    assert prefix_code.lengths(fibonacci).max() == 12  # without a limit, 29


@pytest.mark.parametrize("counts", [np.zeros(255, np.int64), np.zeros(256), -np.ones(256, int)])
def test_counts_that_are_none(counts):
    with pytest.raises(ValueError, match="256 non-negative int64"):
        prefix_code.lengths(counts)


def test_limits_that_are_none():
    for limit in (7, 13):
        with pytest.raises(ValueError, match="limit must be 8 to 12"):
            prefix_code.lengths(np.ones(256, np.int64), limit)


@pytest.mark.parametrize("used", [[], [13], [1, 2], [1, 1, 1], [2], [1, 13, 13]])
def test_lengths_that_no_complete_code_has(used):
    with pytest.raises(ValueError, match="code"):
        prefix_code.check(np.array(used + [0] * (256 - len(used)), np.uint8))


def test_words_are_prefix_free_and_in_canonical_order():
    lengths = prefix_code.lengths(np.bincount(geometric(5000), minlength=256))
    codes = prefix_code.codes(lengths)
    text = {s: f"{codes[s]:012b}"[::-1][: lengths[s]] for s in np.flatnonzero(lengths)}
    inorder = sorted(text, key=lambda s: (lengths[s], s))
    words = [text[s] for s in inorder]
    assert words == sorted(words)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(words))


PLANES = {
    "one symbol": np.full(1500, 7, np.uint8),
    "two": np.random.default_rng(1).integers(3, 5, 1025).astype(np.uint8),
    "all": np.random.default_rng(2).integers(0, 256, 3 * LANE).astype(np.uint8),
    "geometric": geometric(9 * LANE + 77),
    "one": np.array([9], np.uint8),
}


def test_an_empty_plane():
    words, sizes = np.zeros(0, np.uint32), np.zeros(0, np.uint16)
    table = encoded(PLANES["two"])[2]
    assert huffman_lanes.decode(words, sizes, table, count=0).shape == (0,)


@pytest.mark.parametrize("name", PLANES)
def test_decoded_in_jit(name):
    plane = PLANES[name]
    words, sizes, table = encoded(plane)
    got = jax.jit(partial(huffman_lanes.decode, count=len(plane)))(words, sizes, table)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, plane)
    plain = huffman_lanes.decode_lanes(words, huffman_lanes.starts(jnp.asarray(sizes)), table)
    np.testing.assert_array_equal(plain.reshape(-1)[: len(plane)], plane)
    read, intact = huffman_lanes.read(words, sizes, table, len(plane))
    np.testing.assert_array_equal(read, plane)
    assert intact.all() or len(words) == 0  # the word of a single symbol is never written


def test_a_lane_is_decoded_without_the_others():
    words, sizes, table = encoded(PLANES["geometric"])
    starts = huffman_lanes.starts(jnp.asarray(sizes))
    got = huffman_lanes.decode_lanes(words, starts[jnp.array([8, 2])], table)
    want = PLANES["geometric"][: 9 * LANE].reshape(-1, LANE)[np.array([8, 2])]
    np.testing.assert_array_equal(got, want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_changes_one_lane_only(data):
    plane = PLANES["geometric"]
    words, sizes, table = encoded(plane)
    at = data.draw(st.integers(0, 32 * len(words) - 1))
    words[at // 32] ^= np.uint32(1 << at % 32)
    got = np.asarray(huffman_lanes.decode(words, sizes, table, count=len(plane)))
    lane = np.searchsorted(np.cumsum(sizes), at // 32, side="right")
    assert set(np.flatnonzero(got != plane) // LANE) <= {lane}


@pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}")
@pytest.mark.parametrize("kind", ["noise", "cut", "sizes"])
def test_of_words_that_no_encoder_wrote_both_decoders_make_the_same(kind):
    """A lane may then begin anywhere, and read what is none of its own."""
    rng = np.random.default_rng(0)
    words, sizes, table = encoded(PLANES["geometric"])
    if kind == "noise":
        words = rng.integers(0, 1 << 32, len(words), np.uint32)
    if kind == "cut":
        words[len(words) // 3 :] = 0
    if kind == "sizes":
        sizes = rng.integers(0, 1 << 16, len(sizes)).astype(np.uint16)
    count = len(PLANES["geometric"])
    got = huffman_lanes.decode(words, sizes, table, count=count)
    plain = huffman_lanes.decode_lanes(words, huffman_lanes.starts(jnp.asarray(sizes)), table)
    np.testing.assert_array_equal(got, plain.reshape(-1)[:count])


def test_lanes_that_do_not_match_the_count():
    words, sizes, table = encoded(PLANES["geometric"])
    with pytest.raises(ValueError, match="5000 symbols take 5 lanes"):
        huffman_lanes.decode(words, sizes, table, count=5000)


@pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}")
def test_a_table_that_no_code_has():
    words, sizes, table = encoded(PLANES["geometric"])
    with pytest.raises(Exception, match="no table of a code"):
        huffman_lanes.decode(
            words, sizes, table | np.uint16(0xFF00), count=len(PLANES["geometric"])
        ).block_until_ready()
