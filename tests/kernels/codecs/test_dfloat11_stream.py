"""Streams of DFloat11: the bits come back, in parts too, and damaged arrays are errors."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codecs import dfloat11_stream
from pallas_kernels.codecs.dfloat11_stream import Stream, decode
from tests.support.dfloat11 import encode, huffman

FIBONACCI = [1, 1]
while len(FIBONACCI) < 40:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])


def stream_of(arrays, threads):
    fields = {n: a for n, a in arrays.items() if n != "split_positions"}
    positions = fields.pop("output_positions").view(np.uint32)
    encoded = fields.pop("encoded_exponent")
    return Stream(encoded=encoded, positions=positions, threads=threads, **fields)


def words_of(exponents, seed=0):
    rng = np.random.default_rng(seed)
    signs, mantissas = rng.integers(0, 2, exponents.size), rng.integers(0, 128, exponents.size)
    return (signs << 15 | exponents << 7 | mantissas).astype(np.uint16)


def normal(count, seed=0):
    values = np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1500), st.integers(1, 40), st.integers(1, 240), st.integers(0, 9), st.data())
def test_bits_come_back(count, threads, kinds, seed, data):
    rng = np.random.default_rng(seed)
    exponents = np.minimum(rng.geometric(rng.uniform(0.02, 0.9), count) - 1, kinds - 1)
    words = words_of(rng.permutation(240)[exponents], seed)
    stream = stream_of(encode([words], threads), threads)
    np.testing.assert_array_equal(decode(stream), words)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    np.testing.assert_array_equal(decode(stream, begin, end), words[begin:end])


def test_every_word_that_has_a_code():
    words = np.arange(1 << 16, dtype=np.uint16)
    words = words[(words >> 7 & 255) < dfloat11_stream.POINTER]  # zeros and subnormals among them
    np.testing.assert_array_equal(decode(stream_of(encode([words]), 512)), words)


@pytest.mark.parametrize("longest", [9, 12, 13, 17, 25, 32])
def test_long_codes(longest):
    counts = {100 + i: FIBONACCI[i] for i in range(longest)}
    words = words_of(np.random.default_rng(0).integers(100, 100 + longest, 5000))
    arrays = encode([words], 4, counts)
    assert arrays["luts"][-1].max() == longest == max(map(len, huffman(counts).values()))
    np.testing.assert_array_equal(decode(stream_of(arrays, 4)), words)


def test_chunks_join(monkeypatch):
    words = normal(20_001)
    stream = stream_of(encode([words], 8), 8)
    for chunk in (1, 8, 24, 1 << 20):
        monkeypatch.setattr(dfloat11_stream, "CHUNK", chunk)
        np.testing.assert_array_equal(decode(stream), words)
        np.testing.assert_array_equal(decode(stream, 5000, 15_001), words[5000:15_001])


def test_only_the_blocks_of_a_range_are_decoded():
    words = normal(20_000)
    arrays = encode([words], 4)
    arrays["encoded_exponent"][-2000:] ^= 0x5A
    np.testing.assert_array_equal(decode(stream_of(arrays, 4), 0, 5000), words[:5000])


def test_a_last_code_that_fills_a_block_needs_no_further_position():
    """The package omits the position of a block in which no code starts and no end is marked."""
    counts = {100 + i: FIBONACCI[i] for i in range(16)}
    code = huffman(counts)
    assert len(code[115]) == 1 and len(code[100]) == 16
    straddling = words_of(np.array([115] * 56 + [100]))  # whose code has the bits 56 to 72
    arrays = encode([straddling], 1, counts)
    assert arrays["encoded_exponent"].size == 9 and arrays["output_positions"].size == 2 * 4
    np.testing.assert_array_equal(decode(stream_of(arrays, 1)), straddling)


def test_empty():
    none = np.zeros(0, np.uint8)
    luts = encode([normal(9)])["luts"]
    assert decode(Stream(luts, none, none, np.zeros(1, np.uint32), none, 512)).size == 0


def changed(**fields):
    return dataclasses.replace(stream_of(encode([normal(5000)], 8), 8), **fields)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"threads": 0}, "threads must be 1 to 1024, got 0"),
        (lambda s: {"threads": 4}, "output_positions must hold .* numbers"),
        (lambda s: {"luts": s.luts[:1]}, r"luts must have shape \[2 to 18, 256\], got \[1, 256\]"),
        (lambda s: {"luts": s.luts[:, 1:]}, r"got \[\d+, 255\]"),
        (lambda s: {"gaps": s.gaps[1:]}, "gaps must hold .* bytes"),
        (lambda s: {"gaps": np.roll(s.gaps, 1)}, "block 0 holds|gaps say that a segment starts"),
        (lambda s: {"encoded": s.encoded[:-1]}, "encoded_exponent must hold|block .* holds"),
        (lambda s: {"sign_mantissa": s.sign_mantissa[1:]}, "to the number of weights, 4999; got"),
        (lambda s: {"positions": s.positions[::-1]}, "output_positions must rise from 0"),
        (lambda s: {"luts": np.zeros_like(s.luts)}, "block 0 holds 0 codes|luts "),
    ],
)
def test_arrays_that_contradict_each_other(change, message):
    good = changed()
    with pytest.raises(ValueError, match=message):
        decode(changed(**change(good)))


@pytest.mark.parametrize("begin", [0, 1000, 4000])
def test_every_gap_in_use_is_checked(begin):
    """That of the first segment of a range too, which nothing else would show."""
    good = changed()
    first = 8 * (int(np.searchsorted(good.positions, begin, "right")) - 1)
    for segment in range(first, first + 20):
        bits = np.unpackbits(good.gaps)
        bits[5 * segment + 4] ^= 1
        with pytest.raises(ValueError, match="holds|gaps say that a segment starts"):
            decode(changed(gaps=np.packbits(bits)), begin)


def test_exponents_that_look_like_pointers():
    infinite = np.where(np.arange(500) % 50, normal(500), 0x7F80)
    with pytest.raises(ValueError, match="cannot tell from pointers"):
        stream_of(encode([infinite]), 512)


def test_lengths_over_32_bits():
    luts = changed().luts.copy()
    luts[-1, 3] = 33
    with pytest.raises(ValueError, match="a code of 33 bits"):
        changed(luts=luts)


@pytest.mark.parametrize("begin, end", [(-1, 3), (4, 3), (0, 5001)])
def test_ranges(begin, end):
    with pytest.raises(ValueError, match="expected 0 <= begin <= end <= 5000"):
        decode(changed(), begin, end)


def test_damaged_streams_are_errors_or_give_as_many_weights():
    """Codes have no checksum: what other valid codes replace cannot be seen; the rest is."""
    rng, seen = random.Random(0), 0
    for _ in range(400):
        arrays = encode([SMALL], 8)
        for _ in range(rng.randint(1, 3)):
            array = arrays[rng.choice([*arrays])]
            if array.size:
                flat = array.reshape(-1).view(np.uint8)
                flat[rng.randrange(flat.size)] ^= 1 << rng.randrange(8)
        try:
            found = decode(stream_of(arrays, 8))
        except ValueError:
            seen += 1
        else:
            assert found.shape == SMALL.shape
    assert seen > 130


SMALL = normal(700)
