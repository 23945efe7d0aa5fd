"""Each plane gets the coding that suits it, and is never longer than raw."""

import lzma

import numpy as np
import pytest

from jaxquant.lossless import plane_coding
from jaxquant.lossless.plane_coding import CONSTANT, HUFFMAN, LZMA, RANS, RAW

RNG = np.random.default_rng(0)
SKEWED = RNG.binomial(20, 0.5, 20_000).astype(np.uint8)
NOISE = RNG.integers(0, 256, 20_000, np.uint8)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 200, np.uint8)


@pytest.mark.parametrize(
    ("plane", "coding", "text", "code"),
    [
        (np.full(9000, 7, np.uint8), "rans", False, CONSTANT),
        (NOISE, "rans", False, RAW),
        (NOISE, "rans", True, RAW),
        (SKEWED, "rans", False, RANS),
        (SKEWED, "huffman", False, HUFFMAN),
        (TEXT, "rans", True, LZMA),
        (TEXT, "rans", False, RANS),
        (NOISE[:1], "rans", True, CONSTANT),
        (NOISE[:3], "rans", True, RAW),
    ],
)
def test_the_coding_that_suits(plane, coding, text, code):
    found, coded = plane_coding.encode(plane, coding, text=text)
    assert found == code and len(coded) <= len(plane)
    back = plane_coding.decode(code, memoryview(coded), len(plane))
    assert back.dtype == np.uint8 and (back == plane).all()


def test_large_noise_is_not_given_to_lzma(monkeypatch):
    """Only samples of it are; a text of the same size is compressed as a whole."""
    sizes, compress = [], lzma.compress
    monkeypatch.setattr(
        lzma, "compress", lambda d, *a, **k: sizes.append(len(d)) or compress(d, *a, **k)
    )
    plane_coding.encode(RNG.integers(0, 256, 1 << 19, np.uint8), "rans", text=True)
    assert sizes == [plane_coding.SAMPLE * plane_coding.SAMPLES]
    plane_coding.encode(np.resize(TEXT, 1 << 19), "rans", text=True)
    assert sizes[2:] == [1 << 19]


def test_lzma_does_not_unpack_more_than_the_plane():
    bomb = np.zeros(1 << 22, np.uint8)
    coded = lzma.compress(bomb.tobytes(), lzma.FORMAT_RAW, filters=[plane_coding._filter(1 << 22)])
    for count in (100, (1 << 22) - 1, (1 << 22) + 1):
        with pytest.raises(ValueError, match="LZMA"):
            plane_coding.decode(LZMA, memoryview(coded), count)
    for wrong in (coded[:-1], coded + b"\0", b"", b"\1"):
        with pytest.raises(ValueError, match="LZMA"):
            plane_coding.decode(LZMA, memoryview(wrong), 1 << 22)


@pytest.mark.parametrize(
    ("code", "data", "message"),
    [
        (CONSTANT, b"", "must have 1 byte"),
        (CONSTANT, b"ab", "must have 1 byte"),
        (RAW, b"abc", "has 3"),
        (5, b"a", "unknown coding 5"),
        (RANS, b"", "expected|stream|table|not"),
        (HUFFMAN, b"", "expected|stream|table|not"),
    ],
)
def test_what_is_no_plane(code, data, message):
    with pytest.raises(ValueError, match=message):
        plane_coding.decode(code, memoryview(data), 4)
