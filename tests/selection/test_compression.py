"""Compression ratios: what they count, how far a codec sees, and bad input."""

import lzma
import random
import zlib

import pytest

from jaxquant.selection.compression import CODECS, compression_ratio, new_stream

DRAW = random.Random(0)
TWENTY, SIXTY = DRAW.randbytes(20_000), DRAW.randbytes(60_000)
ROWS = [{"q": f"what is {i} + {i}?", "a": f"{2 * i}"} for i in range(40)]


def test_the_ratio_is_that_of_the_authors_code():
    data = str(ROWS).encode("utf-8")
    assert compression_ratio(ROWS) == len(data) / len(zlib.compress(data, level=9))
    text = "\n".join(str(r) for r in ROWS).encode()
    assert compression_ratio([str(r) for r in ROWS], serialize="text") == len(text) / len(
        zlib.compress(text, level=9)
    )


def test_a_repeat_beyond_the_window_of_zlib_is_not_seen():
    ratio = lambda half, codec: compression_ratio([half + half], codec, "text")
    assert ratio(TWENTY, "zlib") == pytest.approx(1.97, abs=0.005)
    assert ratio(SIXTY, "zlib") == pytest.approx(1.00, abs=0.0005)
    assert ratio(TWENTY, "lzma") > 1.96 and ratio(SIXTY, "lzma") > 1.96


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("serialize", ["repr", "text"])
def test_duplication_raises_the_ratio(codec, serialize):
    items = ROWS if serialize == "repr" else [r["q"] for r in ROWS]
    ratios = [compression_ratio(items * times, codec, serialize) for times in (1, 2, 4, 8)]
    assert ratios == sorted(ratios) and ratios[-1] > 2 * ratios[0]


def test_one_item_and_constant_data():
    assert compression_ratio([ROWS[0]]) < 1.2
    assert compression_ratio(["same"] * 5000, serialize="text") > 200
    assert compression_ratio(["\ud800"], serialize="text") > 0  # as JSON can hold it


def test_the_size_with_a_candidate_is_that_of_the_whole():
    """Whatever the lengths and however the stream was cut: the windows of zlib and beyond."""
    text = " ".join(str(DRAW.getrandbits(24)) for _ in range(20_000)).encode()
    for _ in range(30):
        stream, at = new_stream("zlib"), DRAW.randrange(1000)
        start, length = at, DRAW.choice([0, 1, 300, 32_000, 33_000, 65_536, 100_000])
        while at < start + length:
            step = min(DRAW.choice([7, 1000, 50_000]), start + length - at)
            stream.append(text[at : at + step])
            at += step
        last = text[1000:][: DRAW.choice([1, 258, 263, 1000, 40_000])]
        sizes = stream.size_with(last), stream.size_with(last)  # the first changes nothing
        assert sizes == (len(zlib.compress(text[start:at] + last, 9)),) * 2
        assert stream.raw == length


def test_lzma_has_no_container():
    stream = new_stream("lzma")
    stream.append(TWENTY)
    assert len(TWENTY) < stream.size_with(b"") < len(TWENTY) + 20
    assert stream.size_with(TWENTY) < len(TWENTY) + 400
    assert stream.size_with(b"") < len(lzma.compress(TWENTY))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one item, got none"),
        (("a string",), "expected a sequence, got 'a string'"),
        ((ROWS, "zstd"), "codec must be one of zlib, lzma, got 'zstd'"),
        ((ROWS, "zlib", "json"), "serialize must be one of repr, text, got 'json'"),
        ((["a", 3], "zlib", "text"), "takes strings or bytes, but item 1 is 3"),
        (([""], "zlib", "text"), "hold no text"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compression_ratio(*arguments)
