"""Planes of bytes on the host: the same bytes from every coder, and errors for any others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import byte_streams
from pallas_kernels.codecs import huffman_lanes, prefix_code, symbol_tables
from pallas_kernels.cpu import native

CODINGS = byte_streams.CODINGS
REASON = native.load()
SHARE = 1 << 18
NO_STREAM = "not the stream of such a plane|cut off|must have 256 symbols|complete code"


def geometric(count, p=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return (120 - rng.geometric(p, count).clip(0, 100)).astype(np.uint8)


def uniform(count, most=256, seed=0):
    return np.random.default_rng(seed).integers(0, most, count).astype(np.uint8)


@pytest.fixture(params=["native", "numpy"])
def coder(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(native, "load", lambda: "turned off")
    elif REASON:
        pytest.skip(f"no native kernels: {REASON}")
    return request.param


COUNTS = (0, 1, 2, 3, 1023, 1024, 1025, 2047, 2048, 8 * 1024, 8 * 1024 + 1, 9 * 1024 + 17)
KINDS = {
    "constant": lambda count: np.full(count, 200, np.uint8),
    "two": lambda count: uniform(count, 2),
    "uniform": uniform,
    "geometric": geometric,
    "rare": lambda count: np.where(np.arange(count) == 5, 0, 255).astype(np.uint8),
    "sorted": lambda count: np.sort(geometric(count)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coding", CODINGS)
def test_round_trip(coding, kind):
    for count in COUNTS:
        plane = KINDS[kind](count)
        data = byte_streams.encode(plane, coding)
        got = byte_streams.decode(memoryview(data), count, coding)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, plane)


@pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coding", CODINGS)
def test_both_coders_write_and_read_the_same(coding, kind, monkeypatch):
    counts = (1, 2, 1025, 9 * 1024 + 17)
    planes = [KINDS[kind](count) for count in counts]
    data = [byte_streams.encode(plane, coding) for plane in planes]
    monkeypatch.setattr(native, "load", lambda: "turned off")
    for plane, whole in zip(planes, data, strict=True):
        assert byte_streams.encode(plane, coding) == whole
        np.testing.assert_array_equal(byte_streams.decode(whole, len(plane), coding), plane)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 40), st.sampled_from(CODINGS))
def test_round_trip_of_any_bytes(some, times, coding):
    plane = np.frombuffer(some * times, np.uint8)
    data = byte_streams.encode(plane, coding)
    np.testing.assert_array_equal(byte_streams.decode(data, len(plane), coding), plane)


@pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}")
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("count", [SHARE, SHARE + 1, 2 * SHARE + 1025])
def test_threads_change_nothing(coding, count):
    plane = geometric(count)
    data = byte_streams.encode(plane, coding, threads=1)
    assert byte_streams.encode(plane, coding, threads=3) == data
    for threads in (1, 3):
        np.testing.assert_array_equal(byte_streams.decode(data, count, coding, threads), plane)


def test_several_shares_without_the_native_coders(monkeypatch):
    plane = geometric(SHARE + 3)
    data = byte_streams.encode(plane, "huffman")
    monkeypatch.setattr(native, "load", lambda: "turned off")
    assert byte_streams.encode(plane, "huffman") == data
    np.testing.assert_array_equal(byte_streams.decode(data, len(plane), "huffman"), plane)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_told_beforehand(coding, kind):
    for count in (*COUNTS, 100 * 1024, SHARE + 5000):
        plane = KINDS[kind](count)
        real = len(byte_streams.encode(plane, coding))
        told = byte_streams.size(byte_streams.histogram(plane), coding)
        exact = kind == "constant" or (coding == "huffman" and count <= 1024)
        # Of other planes, the mean. Lanes of sorted symbols differ more than those of random ones.
        margin = 0 if exact else 0.1 * real if kind == "sorted" else 24 + 0.006 * real
        assert abs(real - told) <= margin, (count, real, told)


def test_side_information_of_a_huffman_lane_is_below_0_03_bits():
    plane = geometric(SHARE)
    lengths = prefix_code.lengths(byte_streams.histogram(plane))
    bits = int(lengths[plane].sum(dtype=np.int64))
    assert 8 * len(byte_streams.encode(plane, "huffman")) <= bits + 0.03 * len(plane)


def test_rans_is_within_0_01_bits_of_the_entropy():
    plane = geometric(SHARE)
    share = byte_streams.histogram(plane)[plane.min() : plane.max() + 1] / len(plane)
    share = share[share > 0]
    entropy = -(share @ np.log2(share))
    assert entropy <= 8 * len(byte_streams.encode(plane, "rans")) / len(plane) <= entropy + 0.01


# --- what is no stream ----------------------------------------------------------------------


def either(data, count, coding):
    """A plane, or an error that says that this is none."""
    try:
        got = byte_streams.decode(data, count, coding)
    except ValueError:
        return None
    assert got.shape == (count,) and got.dtype == np.uint8
    return got


def mutated(data, rng):
    """A flip, a byte, a cut, an insertion, a removal, or noise at the beginning."""
    data = bytearray(data)
    at = int(rng.integers(len(data)))
    match int(rng.integers(6)):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            data[at] = int(rng.choice([0, 1, 127, 128, 255]))
        case 2:
            del data[at:]
        case 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        case 4:
            del data[at : at + int(rng.integers(1, 9))]
        case _:
            data[: int(rng.integers(1, 64))] = rng.bytes(int(rng.integers(64)))
    return bytes(data)


MUTANTS = {"native": 1500, "numpy": 8}


@pytest.mark.parametrize("coding", CODINGS)
def test_mutated_streams(coding, coder):
    """`make test-memory` looks on; here, that each is a plane or an error."""
    rng = np.random.default_rng(0)
    planes = [geometric(3000), uniform(1500), uniform(2048, 2), geometric(10 * 1024 + 3)]
    streams = [byte_streams.encode(plane, coding) for plane in planes]
    for seed in range(MUTANTS[coder]):
        plane, data = planes[seed % 4], streams[seed % 4]
        bad = mutated(mutated(data, rng) or data, rng) if seed % 3 else mutated(data, rng)
        got = either(bad, len(plane), coding)
        if bad != data and coding == "rans" and bad[:100] == data[:100]:
            assert got is None, "a change of the words goes unseen"


@pytest.mark.parametrize("coding", CODINGS)
def test_noise(coding):
    rng = np.random.default_rng(0)
    for size in range(400):
        either(rng.bytes(size), int(rng.integers(1, 5000)), coding)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_cut_stream_is_an_error(coding, coder):
    plane = geometric(5000)
    data = byte_streams.encode(plane, coding)
    few = range(0, len(data), 1 if coder == "native" else 197)
    for size in few:
        with pytest.raises(ValueError, match=NO_STREAM):
            byte_streams.decode(data[:size], len(plane), coding)
    for more in (b"\0", b"\0" * 4, b"\0" * 2000):
        with pytest.raises(ValueError, match=NO_STREAM):
            byte_streams.decode(data + more, len(plane), coding)


@pytest.mark.parametrize("coding", CODINGS)
def test_another_count_is_an_error(coding):
    plane = geometric(5000)
    data = byte_streams.encode(plane, coding)
    for count in (0, 1, 1024, 3000, 5500, 6000, 10**6):
        with pytest.raises(ValueError, match="not the stream of such a plane"):
            byte_streams.decode(data, count, coding)
    with pytest.raises(ValueError, match="must not be negative"):
        byte_streams.decode(data, -1, coding)


def test_damage_of_a_huffman_lane_that_its_end_shows():
    """Bits after its last code word, and a code that ends before its last word."""
    plane = np.repeat(np.array([7, 8], np.uint8), 1000)
    data = byte_streams.encode(plane, "huffman")
    with pytest.raises(ValueError, match="lane 0 or one that follows it is damaged"):
        byte_streams.decode(data[:-1] + b"\x80", len(plane), "huffman")
    assert prefix_code.LIMIT * huffman_lanes.LANE // 32 == huffman_lanes.MOST_WORDS


def test_tables_that_no_stream_has():
    incomplete = symbol_tables.pack_lengths(np.array([1, 2] + [0] * 254, np.uint8))
    with pytest.raises(ValueError, match="complete code"):
        byte_streams.decode(incomplete + bytes(8), 20, "huffman")
    short = symbol_tables.pack_frequencies(np.array([1, 2] + [0] * 254))
    with pytest.raises(ValueError, match="frequencies must sum to 16384, got 3"):
        byte_streams.decode(short + bytes(8), 20, "rans")


def test_arguments_that_are_none():
    with pytest.raises(ValueError, match="coding must be one of huffman, rans"):
        byte_streams.encode(geometric(3), "zip")
    with pytest.raises(ValueError, match="uint8"):
        byte_streams.encode(np.zeros(3, np.int32), "rans")
    with pytest.raises(ValueError, match="uint8"):
        byte_streams.encode(np.zeros((3, 3), np.uint8), "rans")
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        byte_streams.encode(geometric(3), "rans", threads=0)


def test_a_plane_that_is_not_contiguous():
    plane = geometric(4000)[::2]
    data = byte_streams.encode(plane, "huffman")
    assert data == byte_streams.encode(plane.copy(), "huffman")
