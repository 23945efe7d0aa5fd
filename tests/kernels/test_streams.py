"""Entropy-coded streams read natively: what JAX reads, of noise too, and no more."""

import jax
import numpy as np
import pytest

import jaxquant as jq
from pallas_kernels import streams
from pallas_kernels.codecs import entropy_stream
from pallas_kernels.cpu import native
from tests.support.arrays import draw

REASON = native.load()
needs_native = pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}")
# A short last block of rows, and chains of unlike length.
K, N, LANES, STATES, CHAIN = 75, 52, 8, 16, 24


@pytest.fixture(scope="module")
def words():
    format = jq.formats.EntropyCoded(3, STATES, CHAIN, LANES)
    w = draw(K, N).at[3, 4].set(3000.0)  # codes with plain bits too
    return np.asarray(jax.jit(format.encode)(w)["codes"]).reshape(-1)


def stream(words):
    return streams.Stream(words, K, N, LANES, STATES, CHAIN)


def same(one, other):
    (a, whole), (b, also) = one, other
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert whole == also
    return whole


@needs_native
def test_a_stream_is_what_the_reference_reads(words):
    s = stream(words)
    assert same(streams._native(s), streams._plain(s))
    [(got, whole)] = streams.read([s], 2)
    assert whole
    w = entropy_stream.weights(jax.tree.map(np.asarray, got))
    np.testing.assert_array_equal(
        w,
        jq.formats.EntropyCoded(3, STATES, CHAIN, LANES).dequantize(
            {"codes": words.reshape(-1, N)}, K
        ),
    )


def hostile(words, kind, seed):
    """A stream of one length, so that the reference is compiled once."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 1 << 16, words.size).astype(np.uint16)
    if kind == "noise":
        return noise
    if kind == "flip":
        place = rng.integers(words.size * 9 // 10)
        return np.where(np.arange(words.size) == place, words ^ (1 << seed % 16), words)
    if kind == "zeros":
        return np.zeros_like(words)
    if kind == "cut":
        return np.where(np.arange(words.size) < words.size // 2, words, 0).astype(np.uint16)
    if kind == "ends":
        return noise | 0x8000 if seed % 2 else noise & 0x00FF
    header = np.arange(words.size) < entropy_stream.HEADER + 2 * LANES * (seed % 2)
    return np.where(header, noise, words)


@needs_native
@pytest.mark.parametrize("kind", ["noise", "flip", "zeros", "cut", "ends", "header"])
def test_of_a_hostile_stream_the_reference_reads_the_same(words, kind):
    for seed in range(4):
        s = stream(hostile(words, kind, seed).astype(np.uint16))
        assert not same(streams._native(s), streams._plain(s))


@needs_native
def test_nothing_is_read_or_written_outside_of_the_arrays():
    """`make test-memory` looks on; here, that any noise comes to an end."""
    rng = np.random.default_rng(0)
    for seed in range(300):
        k, n, lanes, chain = (int(rng.integers(1, most)) for most in (40, 40, 70, 50))
        words = rng.integers(0, 1 << 16, int(rng.integers(entropy_stream.HEADER, 400))).astype(
            np.uint16
        )
        if seed % 3 == 0:
            words[: entropy_stream.HEADER] = rng.choice(
                [0, 1, 0x7FFF, 0x8000, 0xFFFF], entropy_stream.HEADER
            )
        states = int(rng.choice([1, 4, 8, 256]))
        got, _ = streams._native(streams.Stream(words, k, n, lanes, states, chain))
        assert got.values.shape == (k, n)


def test_several_streams_come_back_in_their_order(words, monkeypatch):
    other = hostile(words, "noise", 1)
    for reason in ("", "turned off") if not REASON else (REASON,):
        monkeypatch.setattr(native, "load", lambda reason=reason: reason)
        found = streams.read([stream(words), stream(other), stream(words)], 2)
        assert [whole for _, whole in found] == [True, False, True]
        np.testing.assert_array_equal(found[0][0].values, found[2][0].values)
