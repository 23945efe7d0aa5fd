"""Entropy-coded trellis quantization: exact storage, Shannon, the worth of water-filling."""

import dataclasses
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxquant as jq
from jaxquant.formats.entropy_coded import EntropyCoded
from jaxquant.rounding import LDLQ, Moments, Nearest
from jaxquant.rounding.waterfill import Waterfill
from pallas_kernels.codecs import entropy_stream, rans, student_t, trellis_coded
from tests.support.arrays import draw


def layer(n, k, seed=0):
    """A heavy-tailed W [k, n] with outlier channels, and H of correlated inputs, cond about 1e4."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(5, (k, n)) * np.exp(0.25 * rng.normal(size=n))
    w *= np.exp(0.2 * rng.normal(size=(k, 1)))
    w[rng.choice(k, k // 128, replace=False)] *= 6
    basis = np.linalg.qr(rng.normal(size=(k, k)))[0]
    x = (rng.normal(size=(4 * k, k)) * np.arange(1, k + 1) ** -0.4) @ basis.T
    x = (x + 0.3 * rng.normal(size=k)) * np.exp(0.4 * rng.normal(size=k))
    x[:, rng.choice(k, k // 128, replace=False)] *= 8
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / (4 * k), jnp.float32)


def loss(w, h, q):
    return float(jnp.sum((w - q) * (h @ (w - q))) / jnp.sum(w * (h @ w)))


def rotated_bound(w, h, bits):
    """Least relative loss of any code of Gaussian weights, as full rotations make them."""
    energy = np.sort(np.linalg.eigvalsh(np.asarray(h, float)))[::-1] * np.mean(np.asarray(w) ** 2)
    low, high = np.log2(energy.min()) - 20, np.log2(energy.max())
    for _ in range(60):
        level = (low + high) / 2
        rate = np.mean(np.maximum(np.log2(energy) - level, 0)) / 2
        low, high = (level, high) if rate > bits else (low, level)
    return np.minimum(energy, 2**level).sum() * w.shape[1] / float(jnp.sum(w * (h @ w)))


# --- tables and trellis ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", range(len(student_t.SHAPES)))
@pytest.mark.parametrize("index", [1, 14, student_t.UNIT, 33, 50])
@pytest.mark.parametrize("q", [0, 1])
def test_frequencies_are_those_of_the_source(shape, index, q):
    """Each code's probability, to what a slot for everything that can happen takes away."""
    row = student_t.frequencies()[shape, index, q]
    edges = np.append(2.0 * student_t.BASE - q - 1, 2 * student_t.LARGEST - q + 1)
    source = stats.t(student_t.SHAPES[shape], scale=2 ** ((index - student_t.UNIT) / 4))
    share = np.diff(source.cdf(edges))
    assert row.sum() == rans.SLOTS
    assert np.abs(row / rans.SLOTS - share).max() < 0.005
    lost = share * np.log2(np.maximum(share, 1e-300) * rans.SLOTS / np.maximum(row, 1))
    assert lost.sum() < 0.005  # bits
    other = np.diff(stats.t(2, scale=source.kwds["scale"]).cdf(edges))
    assert index < 20 or np.abs(row / rans.SLOTS - other).max() > 0.005  # the twin


def test_tables_never_change():
    """Streams written today must be read by every later version."""
    assert zlib.crc32(student_t.frequencies().astype("<i4").tobytes()) == 2246190621
    assert (
        zlib.crc32(np.stack([student_t.BASE, student_t.BITS]).astype("<i4").tobytes()) == 1690317735
    )


@pytest.mark.parametrize("states", [4, 8, 16])
def test_search_finds_the_cheapest_path(states):
    rng = np.random.default_rng(states)
    code = rng.integers(-3, 3, (6, 2, 2, 2)) * 2 + np.arange(2)  # of either parity
    cost = rng.random((6, 2, 2, 2)).astype(np.float32)
    got = np.asarray(
        trellis_coded.search(trellis_coded.Branches(jnp.asarray(code), jnp.asarray(cost)), states)
    )
    for chain in range(2):
        best = (np.inf, None)
        for path in itertools.product((0, 1), repeat=6):
            state, total, values = 0, 0.0, []
            for t, parity in enumerate(path):
                q = state & 1
                total += cost[t, chain, q, parity]
                values.append(2 * code[t, chain, q, parity] - q)
                state = int(trellis_coded.advance(state, int(code[t, chain, q, parity]), states))
            best = min(best, (total, values))
        assert got[:, chain].tolist() == best[1]


@pytest.mark.parametrize("states", trellis_coded.STATES[1:])
def test_every_state_is_reached_by_both_parities(states):
    s, parity = jnp.divmod(jnp.arange(2 * states), 2)
    after = np.asarray(trellis_coded.advance(s, parity, states))
    for state in range(states):
        assert set(np.asarray(parity)[after == state]) == {0, 1}
        assert len(set(np.asarray(s)[after == state] & 1)) == 1


# --- storage --------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "lanes", "chain"), [(13, 30, 4, 30), (6, 9, 8, 4)])
def test_storage_is_exact(k, n, lanes, chain):
    """Any codes, scales and steps, however odd, come back."""
    rng = np.random.default_rng(k)
    wild = lambda *size: rng.integers(-300, 300, size).astype(np.int32)
    codes = np.round(rng.standard_t(1, (k, n)) * 4).astype(np.int32)
    codes[0, 0] = -student_t.LARGEST
    count, _ = entropy_stream.chains(n, chain)
    state, values = np.zeros((count, k), np.int32), np.zeros((k, n), np.int16)
    for j in range(n):
        values[:, j] = 2 * codes[:, j] - (state[j % count] & 1)
        state[j % count] = trellis_coded.advance(state[j % count], codes[:, j], 8)
    level = np.full(
        k, student_t.CLASSES - student_t.UNIT, np.int32
    )  # where every symbol is possible
    columns = wild(n) // 300
    original = entropy_stream.Coded(
        jnp.int32(-123457), jnp.int32(1), wild(k), level, wild(n) // 9, columns, values
    )
    words, used = entropy_stream.write(jax.tree.map(jnp.asarray, original), 4000, lanes)
    got, whole = entropy_stream.read(words[: int(used)], k, n, lanes=lanes, states=8, chain=chain)
    assert bool(whole)
    jax.tree.map(np.testing.assert_array_equal, got, original)


# One format and shape for what follows, so that each rounder is compiled once.
SMALL = EntropyCoded(2, states=16, lanes=8)
WATERFILL = jq.Method("waterfill", Waterfill(), SMALL)
NEAREST = jq.Method("nearest", Nearest(), SMALL)
K, N = 256, 128


@pytest.mark.parametrize("damage", ["none", "flip", "noise", "zeros"])
def test_a_damaged_stream_decodes_to_nan(damage):
    words = jq.quantize_array(draw(K, N), NEAREST).data["codes"]
    other = {
        "none": words,
        "flip": words.at[5, 7].set(words[5, 7] ^ 4),
        "noise": jax.random.bits(jax.random.key(0), words.shape, jnp.uint16),
        "zeros": jnp.zeros_like(words),
    }
    w = SMALL.dequantize({"codes": other[damage]}, K)
    assert bool(jnp.isfinite(w).all() if damage == "none" else jnp.isnan(w).all())


def test_a_part_of_a_stream_decodes_to_nan():
    """A shard of the columns, say."""
    words = jq.quantize_array(draw(K, N), NEAREST).data["codes"]
    assert bool(jnp.isnan(SMALL.dequantize({"codes": words[:, : N // 2]}, K)).all())


def test_products_look_ups_and_stacks():
    data = jq.quantize_array(draw(K, N), NEAREST).data
    other = jq.quantize_array(draw(K, N, seed=3), NEAREST).data
    w = SMALL.dequantize(data, K)
    x, g, i = draw(5, K, seed=1), draw(5, N, seed=2), jnp.array([0, 7, 19])
    np.testing.assert_allclose(SMALL.matmul(x, data), x @ w, atol=1e-4)
    np.testing.assert_allclose(SMALL.matmul_transposed(g, data, K), g @ w.T, atol=1e-4)
    np.testing.assert_array_equal(SMALL.columns(data, i, K), w[:, i])
    np.testing.assert_array_equal(SMALL.rows(data, i, K), w[i])
    stack = jax.tree.map(lambda *a: jnp.stack(a), data, other)
    np.testing.assert_array_equal(SMALL.dequantize(stack, K)[0], w)


# --- rounding -------------------------------------------------------------------------------


@pytest.mark.parametrize(("states", "gap"), [(1, 1.53), (16, 0.38)])
def test_distortion_is_near_shannon(states, gap):
    """Gaussian source at 2 bits in bytes: the code's own gap [dB], and 4 % to describe it all."""
    w = draw(K, N)
    format = dataclasses.replace(SMALL, states=states)
    q = jq.quantize_array(w, dataclasses.replace(NEAREST, format=format))
    assert q.bits_per_weight == 2
    distortion = float(jnp.mean((w - q.dequantize()) ** 2) / jnp.mean(w**2))
    assert gap < 10 * np.log10(distortion * 4**2) < gap + 0.5


@pytest.mark.slow
def test_water_filling_beats_every_code_of_rotated_weights():
    w, h = layer(N, K)
    q = jq.quantize_array(w, WATERFILL, h)
    assert q.bits_per_weight == 2
    got = loss(w, h, q.dequantize())
    assert got < 0.9 * rotated_bound(w, h, 2)
    stream = np.asarray(q.data["codes"]).ravel()
    assert np.argmax(stream[::-1] != 0) < 0.004 * len(stream)  # bytes left over
    blind = jq.quantize_array(w, NEAREST)  # the twins: no H; and integers
    assert loss(w, h, blind.dequantize()) > 4 * got
    integers = jq.quantize_array(w, jq.gptq(2, 64), h)
    assert integers.bits_per_weight > 2.2
    assert loss(w, h, integers.dequantize()) > 5 * got


def test_methods_round_through_the_pipeline():
    w, h = layer(N, K)
    q = jq.quantize_array(w, WATERFILL, h)
    shapes = jax.eval_shape(lambda w, h: jq.quantize_array(w, WATERFILL, h), w, h)
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert describe(q) == describe(shapes)
    x = draw(3, K)
    y = jax.jit(jq.quantized(lambda w, x: x @ w))(q, x)
    np.testing.assert_allclose(y, x @ q.dequantize(), atol=1e-3)


TWO_SIDED = dataclasses.replace(
    WATERFILL, rounder=Waterfill(correlation=1.0), format=dataclasses.replace(SMALL, chain=24)
)


def outputs(n, seed=1):
    """G of outputs that have much in common, some of which matter more."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(4 * n, 6)) @ rng.normal(size=(6, n)) + 0.5 * rng.normal(size=(4 * n, n))
    g *= np.exp(0.7 * rng.normal(size=n))
    return jnp.asarray(g.T @ g / (4 * n), jnp.float32)


def test_feedback_to_both_sides_serves_the_outputs():
    """Less loss than widths alone, which lose less than taking all outputs for alike."""
    n = 100  # chains of unequal length
    w, h = layer(n, K)
    g = outputs(n)
    of = lambda c: dataclasses.replace(TWO_SIDED, rounder=Waterfill(correlation=c))
    quantized = [jq.quantize_array(w, of(c), h, output_gram=g) for c in (1.0, 0.0, None)]
    assert [q.bits_per_weight for q in quantized] == [2, 2, 2]
    errors = [w - q.dequantize() for q in quantized]
    both, widths, alike = (float(jnp.sum((h @ e) * (e @ g))) for e in errors)
    assert both < 0.8 * widths < 0.8 * alike


def test_outputs_without_anything_in_common_change_nothing():
    w, h = layer(N, K)
    one = jq.quantize_array(w, dataclasses.replace(TWO_SIDED, rounder=Waterfill()), h)
    two = jq.quantize_array(w, TWO_SIDED, h, output_gram=3 * jnp.eye(N))
    np.testing.assert_array_equal(one.data["codes"], two.data["codes"])


def test_blocks_of_rows_change_nothing():
    """But for the order of sums: the same loss, to what a near tie can do."""
    w, h = layer(N, K)
    g = outputs(N)
    losses = []
    for rounder in (TWO_SIDED.rounder, dataclasses.replace(TWO_SIDED.rounder, block_size=100)):
        q = jq.quantize_array(w, dataclasses.replace(TWO_SIDED, rounder=rounder), h, output_gram=g)
        e = w - q.dequantize()
        losses.append(float(jnp.sum((h @ e) * (e @ g))))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


HARD = {
    "zero weights": lambda w, h: (0 * w, h),
    "zero rows and columns": lambda w, h: (w.at[3].set(0).at[:, 7].set(0), h),
    "one giant": lambda w, h: (w.at[3, 4].set(1e4), h),
    "dead channel": lambda w, h: (w, h.at[5].set(0).at[:, 5].set(0)),
    "rank 3": lambda w, h: (w, draw(3, K).T @ draw(3, K)),
    "tiny": lambda w, h: (w * 1e-8, h * 1e-6),
    "a fifth of the columns zero": lambda w, h: (w.at[:, ::5].set(0), h),
    "half of the columns vanishing": lambda w, h: (w.at[:, ::2].multiply(1e-20), h),
    "most columns and rows zero": lambda w, h: (w.at[:, 20:].set(0).at[50:].set(0), h),
    "one column": lambda w, h: (jnp.where(jnp.arange(N) == 3, w, 0), h),
    "one row": lambda w, h: (jnp.where(jnp.arange(K)[:, None] == 3, w, 0), h),
    "one weight": lambda w, h: ((0 * w).at[3, 4].set(1), h),
    "a giant beyond all values": lambda w, h: (w.at[3, 4].set(1e9), h),
    "scales all over": lambda w, h: (w * jnp.logspace(-15, 0, N), h),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(name):
    w, h = HARD[name](*layer(N, K))
    q = jq.quantize_array(w, WATERFILL, h).dequantize()
    assert bool(jnp.isfinite(q).all())
    assert float(jnp.sum((w - q) * (h @ (w - q)))) <= 0.05 * float(jnp.sum(w * (h @ w)))
    zero = jnp.all(w == 0, axis=0)
    assert float(jnp.abs(jnp.where(zero, q, 0)).max()) <= 1e-6 * float(jnp.abs(w).max())


@pytest.mark.parametrize("bits", [1.5, 4])
def test_zero_and_vanishing_columns_round_to_nearest(bits):
    """They decode to nothing, and leave their bits to the others."""
    k, n = 70, 50
    format, w = EntropyCoded(bits, states=4, lanes=2), draw(k, n)
    encode = jax.jit(format.encode)
    losses = []
    for faint in (0.0, 1e-20, 1e-8):
        for count in (0, 10, 25, 40):
            given = w.at[:, :count].multiply(faint)
            q = format.dequantize(encode(given), k)
            assert float(jnp.abs(q[:, :count]).max(initial=0)) < 1e-6
            losses.append(float(jnp.sum((given - q) ** 2) / jnp.sum(given**2)))
    assert all(a > b for a, b in itertools.pairwise(losses[:4]))
    np.testing.assert_allclose(losses[4:8], losses[:4], rtol=0.05)
    np.testing.assert_allclose(losses[8:], losses[:4], rtol=0.05)


def test_a_stream_that_does_not_tell_what_was_meant_is_never_returned(monkeypatch):
    write = entropy_stream.write

    def spoilt(what, size, lanes):
        words, used = write(what, size, lanes)
        return words.at[size // 2].set(words[size // 2] ^ 4), used

    monkeypatch.setattr(entropy_stream, "write", spoilt)
    format = EntropyCoded(4, states=4, lanes=2, chain=20)  # of no other test: traced anew
    w = draw(40, 30)
    with pytest.raises(ValueError, match=r"a matrix \[40, 30\] could not be coded"):
        format.encode(w)
    assert bool(jnp.isnan(format.dequantize(jax.jit(format.encode)(w), 40)).all())
    nearest = jq.Method("nearest", Nearest(), format)
    with pytest.raises(
        ValueError, match=r"layer/w: nearest turned finite weights into .* not finite"
    ):
        jq.quantize({"layer": {"w": w}}, nearest)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_no_number_has_no_stream(bad):
    format = EntropyCoded(4, states=4, lanes=2)
    w = draw(70, 50).at[5, 7].set(bad)
    with pytest.raises(ValueError, match="make sure that its weights are finite"):
        format.encode(w)
    assert bool(jnp.isnan(format.dequantize(jax.jit(format.encode)(w), 70)).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyCoded(0), "bits must be above 0"),
        (lambda: EntropyCoded(2, states=5), "states must be one of"),
        (lambda: EntropyCoded(2, lanes=0), "lanes must be positive"),
        (lambda: EntropyCoded(2, chain=0), "chain must be positive"),
        (lambda: EntropyCoded(1).check_shape(16, 16), "use more bits or fewer lanes"),
        (lambda: LDLQ()(draw(4, 4), EntropyCoded(2), Moments()), "Waterfill for EntropyCoded"),
        (lambda: Waterfill(damping=0), "damping must be positive"),
        (lambda: Waterfill(correlation=2.0), "correlation must be from 0 to 1"),
        (lambda: Waterfill(trials=0), "trials must be positive"),
        (
            lambda: Waterfill()(draw(64, 8), jq.formats.Integer(), Moments(jnp.eye(64))),
            "needs the format EntropyCoded",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
