"""Bits of lossless codes that are computed from counts, against the codes themselves."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory import coded_size
from jaxquant.theory.coded_size import coded_bits, plane_bits
from jaxquant.theory.entropy import entropy
from pallas_kernels import byte_streams
from pallas_kernels.codecs import float_planes

RANDOM = np.random.default_rng(0)
W = RANDOM.normal(size=(32, 512)).astype(jnp.bfloat16).view(np.uint16)


@pytest.mark.parametrize("coding", ["huffman", "rans"])
def test_bits_from_counts_are_those_of_streams(coding):
    codes = (W >> 7 & 255).astype(np.uint8).ravel()
    counts = np.bincount(codes, minlength=256)
    found = coded_bits(counts, coding)
    assert found == pytest.approx(8 * len(byte_streams.encode(codes, coding)), rel=0.01)
    assert found > len(codes) * entropy(counts)
    # Random symbols are stored as they are: a nibble in four bits.
    assert coded_bits(np.full(16, 1000), coding, 4) == 64_000
    assert coded_bits(np.zeros(256, np.int64), coding) == 0


def test_planes_are_those_of_the_layout(monkeypatch):
    best = min(
        sum(
            np.asarray(a).nbytes
            for a in float_planes.encode(W.T, "bfloat16", bits)
            if a is not None
        )
        for bits in (3, 4)
    )
    assert plane_bits(W, "bfloat16") == 8 * best
    monkeypatch.setattr(coded_size, "CHUNK", 512 * 8)  # columns are coded by themselves
    assert plane_bits(W, "bfloat16") == 8 * best
    random = RANDOM.integers(0, 1 << 16, (32, 512)).astype(np.uint16)
    assert plane_bits(random, "bfloat16") == 16 * random.size


def test_bad_arguments():
    with pytest.raises(ValueError, match="those of 256 symbols at most, got"):
        coded_bits(np.ones(300, int), "rans")
    with pytest.raises(ValueError, match="one of bfloat16, .* got int16"):
        plane_bits(W, "int16")
    with pytest.raises(ValueError, match="coding"):
        coded_bits(np.ones(3, int), "zip")
