"""Planes come back as the same bytes, and hold whole exponents."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.lossless.byte_planes import Record, merge, split

LAYOUTS = ("", "u1", "u2", "f2", "u4", "f4", "u8", "f8", "2u2 16u1", "f4 256u1 16u2", "3f2 u1 f8")


def again(data, record):
    planes = split(data, record)
    assert [len(p) for p in planes] == record.counts(len(data))
    return merge(planes, record, len(data))


@given(st.sampled_from(LAYOUTS), st.binary(max_size=900))
def test_every_layout_and_size(layout, data):
    data = np.frombuffer(data, np.uint8)
    assert again(data, Record(layout)).tobytes() == data.tobytes()


@pytest.mark.parametrize("layout", ["u2", "f2"])
def test_all_patterns_of_two_bytes(layout):
    data = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    assert again(data, Record(layout)).tobytes() == data.tobytes()


@pytest.mark.parametrize("layout", ["u4", "f4", "f8"])
def test_special_floats(layout):
    rng = np.random.default_rng(0)
    kind, dtype = (np.uint64, np.float64) if layout == "f8" else (np.uint32, np.float32)
    words = rng.integers(0, np.iinfo(kind).max, 5000, kind, endpoint=True)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 5e-324, 1e-45], dtype)
    words[::100] = np.resize(special.view(kind), 50)
    words[1::100] |= kind(np.array(np.nan, dtype).view(kind))  # payloads
    data = words.view(np.uint8)
    assert again(data, Record(layout)).tobytes() == data.tobytes()


def test_the_first_plane_is_the_exponent():
    values = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    exponents = values.view(np.uint32) >> 23 & 255
    for dtype, layout in ((np.float32, "f4"), (ml_dtypes.bfloat16, "f2")):
        data = values.view(np.uint32)
        data = data if dtype == np.float32 else (data >> 16).astype(np.uint16)
        first = split(data.view(np.uint8), Record(layout))[0]
        assert (first == exponents).all()
        cut = split(data.view(np.uint8), Record(layout.replace("f", "u")))[0]
        assert (cut != exponents).any()  # without the rotation, the sign is in it


def test_fields_of_a_block_are_apart():
    blocks = np.arange(3 * 20, dtype=np.uint8).reshape(3, 20)
    planes = split(blocks.reshape(-1), Record("u2 u2 16u1", 32))
    want = [blocks[:, 1], blocks[:, 0], blocks[:, 3], blocks[:, 2], blocks[:, 4:].reshape(-1)]
    for plane, column in zip(planes, want, strict=False):
        assert (plane == column).all()


@pytest.mark.parametrize(
    ("text", "numbers", "message"),
    [
        ("f1", 1, "a field of a record must be"),
        ("u3", 1, "a field of a record must be"),
        ("0u1", 1, "a field of a record must be"),
        ("u2  u2", 1, "a field of a record must be"),
        ("4000u1 100u1", 1, "at most 4096 bytes"),
        (" ".join(["u8"] * 9), 1, "64 planes"),
        ("u1", 0, "1 to 65535 numbers"),
        ("u1", 1 << 16, "1 to 65535 numbers"),
    ],
)
def test_what_is_no_layout(text, numbers, message):
    with pytest.raises(ValueError, match=message):
        Record(text, numbers)
