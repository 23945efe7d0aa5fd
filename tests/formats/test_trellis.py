"""Trellis codes against NumPy twins written from their definitions; streams against bit strings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.codecs import trellis, wide_trellis

TRELLISES = [
    (16, 1, 1), (16, 2, 1), (12, 3, 1), (12, 5, 1), (16, 8, 1), (4, 4, 1), (12, 2, 2), (12, 3, 2),
    (16, 2, 4), (12, 2, 4), (16, 3, 4), (16, 4, 4), (16, 1, 4), (7, 1, 4),
]  # fmt: skip
PUBLISHED_RMS = {"1mad": 1.0001, "3inst": 1.2437, "mcg": 1.2441, "mul1": 1.0001}


def random_words(s, K):
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (s, 8 * K))
    return bits.astype(np.int32)


def published(code, state):
    """A code's value in the arithmetic of QTIP and exllamav3: bytes and float16."""
    x = {
        "1mad": state * 34038481 + 76625530,
        "mul1": state * 0x83DCD12D,
        "3inst": state * 89226354 + 64248484,
        "mcg": state * 0xCBAC1FED,
    }[code] % 2**32
    if code in ("1mad", "mul1"):
        return (sum(x.to_bytes(4, "little")) - 510) / 147.800537109375
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return np.frombuffer(x.to_bytes(4, "little"), np.float16).astype(float).sum()


@pytest.mark.parametrize("code", PUBLISHED_RMS)
def test_codes_are_the_published_ones_divided_by_their_rms(code):
    want = np.array([published(code, s) for s in range(1 << 16)])
    rms = np.sqrt(np.mean(want**2))
    assert rms == pytest.approx(PUBLISHED_RMS[code], abs=1e-4)
    got = trellis.values(code, 16, 1)[:, 0]
    np.testing.assert_allclose(got, want / rms, rtol=1e-6)
    assert not np.allclose(got, want, rtol=1e-6)  # the twin: as published
    short = trellis.values(code, 12, 1)[:, 0]  # the same arithmetic, with its own rms
    np.testing.assert_allclose(short / short[7], want[: 1 << 12] / want[7], rtol=1e-5)


def test_hyb_is_512_points_behind_the_published_hash():
    s = np.arange(1 << 16)
    x = s * (s + 1)
    row, negative = (x >> 6) % 512, (x >> 15) % 2 == 1
    table = trellis.values("hyb", 16, 2)
    unsigned = np.where(np.stack([negative, np.zeros_like(negative)], 1), -table, table)
    points = unsigned[np.unique(row, return_index=True)[1]]
    np.testing.assert_array_equal(unsigned, points[row])
    np.testing.assert_array_equal(trellis.hybrid(jnp.asarray(points), 16), table)
    # Spread as a Gaussian: half of all points within its median radius, and no direction.
    radius = np.hypot(*points.T) / np.sqrt(np.mean(points**2))
    assert np.mean(radius < np.sqrt(2 * np.log(2))) == pytest.approx(0.5, abs=0.02)
    assert np.abs(points.mean(0)).max() < 0.02


def vpu(state):
    """Four int8 weights, in whole numbers; and the fields, low first, that they come from."""
    old, new = (byte - 256 if byte > 127 else byte for byte in divmod(state, 256))
    bits = ((4001079887 * old) ^ (4001079887 * new)) % 2**32 & 0x77777777
    word = 15 * bits % 2**32
    weights = np.frombuffer(word.to_bytes(4, "little"), np.int8).astype(int)
    return weights, [(bits >> 8 * i & 7, bits >> 8 * i + 4 & 7) for i in range(4)]


def test_vpu_is_differences_of_two_fields_of_three_bits():
    pairs = [vpu(s) for s in range(1 << 16)]
    want = np.array([weights for weights, _ in pairs], float)
    low, high = np.moveaxis(np.array([fields for _, fields in pairs]), -1, 0)
    assert np.abs(want - 16 * (low - high)).max() == 7  # of the byte below, and a borrow
    assert np.abs(want).max() <= 120  # no byte overflows
    assert np.corrcoef(want.T) == pytest.approx(np.eye(4), abs=0.05)
    assert np.abs(want.mean(0)).max() < 4  # of an rms of 50
    want /= np.sqrt(np.mean(want**2))
    np.testing.assert_allclose(trellis.values("vpu", 16, 4), want, rtol=1e-6)


@pytest.mark.parametrize("code, V", trellis.CODES.items())
@pytest.mark.parametrize("L", [5, 12, 16])
def test_arithmetic_equals_the_table(code, V, L):
    table = trellis.values(code, L, V)
    assert table.shape == (1 << L, V)
    assert np.mean(table.astype(float) ** 2) == pytest.approx(1, abs=1e-6)
    decoded = jax.jit(lambda s: trellis.decode_states(s, code, L, V))
    np.testing.assert_array_equal(decoded(jnp.arange(1 << L)), table)


def stream_bits(words, step, is_woven):
    """The stream as a string of bits, in order."""
    fields = [f"{int(w) % 2**32:032b}" for w in words]
    if is_woven:  # the low field of every word, then the next
        return "".join(f[32 - i - step : 32 - i] for i in range(0, 32, step) for f in fields)
    return "".join(fields)


@pytest.mark.parametrize("V, woven_at", [(1, set()), (2, set()), (4, {1, 2, 4})])
def test_which_streams_are_woven(V, woven_at):
    assert {K for K in range(1, 9) if wide_trellis.fits(K, V)} == woven_at | (
        {8} if V == 4 else set()
    )


@pytest.mark.parametrize("V", [1, 2, 4])
def test_tiles(V):
    w = np.arange(16 * 48).reshape(16, 48)
    tiles = np.asarray(trellis.tiles(jnp.asarray(w), V))
    if V == 4:  # quad q of column c of tile t is step 16 q + c
        want = [w[4 * q + i, 16 * t + c] for t in range(3) for q in range(4) for c in range(16)
                for i in range(4)]  # fmt: skip
    else:
        want = [w[r, 16 * t + c] for t in range(3) for r in range(16) for c in range(16)]
    np.testing.assert_array_equal(tiles.ravel(), want)
    back = trellis.untiled(jnp.stack([tiles, tiles + 1]), V)
    np.testing.assert_array_equal(back, [w, w + 1])


@pytest.mark.parametrize("L, K, V", TRELLISES)
def test_states_are_windows_of_the_stream(L, K, V):
    words = random_words(3, K)
    got = np.asarray(jax.jit(lambda w: trellis.states(w, L, K, V))(words))
    for stream, states in zip(words, got, strict=True):
        bits = stream_bits(stream, K * V, wide_trellis.fits(K, V)) * 2
        want = [int(bits[t * K * V : t * K * V + L], 2) for t in range(256 // V)]
        assert states.tolist() == want
    np.testing.assert_array_equal(jax.jit(lambda s: trellis.pack(s, L, K, V))(got), words)


@pytest.mark.parametrize("code, K", [("mul1", 3), ("hyb", 2), ("vpu", 2)])
def test_decode_by_name_by_table_and_in_batches(code, K):
    V = trellis.CODES[code]
    words = random_words(6, K)
    decode = lambda code: jax.jit(lambda words: trellis.decode(words, 12, K, V, code))
    table = trellis.values(code, 12, V)
    got = decode(code)(words)
    np.testing.assert_array_equal(got, decode(table)(words))
    states = jax.jit(lambda words: trellis.states(words, 12, K, V))(words)
    np.testing.assert_array_equal(got, table[states].reshape(6, 256))
    np.testing.assert_array_equal(decode(code)(words.reshape(2, 3, -1)), got.reshape(2, 3, 256))


@pytest.mark.parametrize("code", ["1mad", "3inst", "mul1", "mcg", "vpu"])
def test_computed_codes_decode_without_a_gather(code):
    decode = lambda words: trellis.decode(words, 16, 2, trellis.CODES[code], code)
    assert "gather" not in str(jax.make_jaxpr(decode)(random_words(4, 2)))


def test_a_trained_table_has_gradients():
    words = random_words(2, 2)
    points = jnp.asarray(np.random.default_rng(0).normal(size=(512, 2)), jnp.float32)
    loss = lambda p: jnp.sum(trellis.decode(words, 16, 2, 2, trellis.hybrid(p, 16)))
    assert np.count_nonzero(jax.jit(jax.grad(loss))(points)) > 100


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: trellis.check(12, 8, 2), "K V <= L <= 16"),
        (lambda: trellis.check(17, 2, 1), "K V <= L <= 16"),
        (lambda: trellis.check(16, 2, 3), "V = 1, 2 or 4"),
        (lambda: trellis.values("2mad", 12, 1), "got '2mad'"),
        (lambda: trellis.values("hyb", 12, 1), "V = 1"),
        (lambda: trellis.decode_states(jnp.arange(3), "vpu", 12, 1), "V = 1"),
        (lambda: trellis.states(jnp.zeros((1, 8), jnp.int32), 12, 2, 1), "take 16 words, got 8"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
