"""Floats in planes of fixed length: every bit comes back, from whatever is decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codecs import float_fields, float_planes
from pallas_kernels.codecs.float_fields import DTYPES
from pallas_kernels.codecs.float_planes import BITS, NOWHERE

forms = pytest.mark.parametrize(("dtype", "bits"), [(d, b) for d in DTYPES for b in BITS])


def bits_of(w, dtype):
    return jax.lax.bitcast_convert_type(
        jnp.asarray(w, jnp.float32).astype(dtype), float_fields.unsigned(dtype)
    )


def patterns(dtype, count):
    """All patterns of 8 or 16 bits, or as many random ones, specials included."""
    width = 8 * jnp.dtype(dtype).itemsize
    if width < 32:
        return np.resize(np.arange(1 << width), count).astype(f"uint{width}")
    u = np.random.default_rng(0).integers(0, 1 << 32, count).astype(np.uint32)
    specials = [0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 0x80000000, 1, 0x807FFFFF]
    u[:: count // 655] = np.resize(specials, len(u[:: count // 655]))
    return u


def decoded(planes, dtype, bits, k, **at):
    return float_planes.decode(planes, dtype=dtype, bits=bits, k=k, **at)


@forms
def test_every_pattern_comes_back(dtype, bits):
    u = jnp.asarray(patterns(dtype, 256 * 256).reshape(256, 256))
    planes = float_planes.encode(u, dtype, bits)
    np.testing.assert_array_equal(decoded(planes, dtype, bits, 256), u)
    ids = jnp.array([255, 0, 17])
    found = float_planes.columns(planes, ids, dtype=dtype, bits=bits, k=256)
    np.testing.assert_array_equal(found, u[:, ids])


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(list(DTYPES)), st.data())
def test_any_shape(rows, columns, dtype, data):
    k = (1, 129, 300)[rows - 1]
    n = (1, 2, 33)[columns - 1]
    seed, scale = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 1e-6, 0.02, 1e4]))
    u = bits_of(np.random.default_rng(seed).normal(size=(k, n)) * scale, dtype)
    planes = float_planes.encode(u, dtype, 3)
    np.testing.assert_array_equal(decoded(planes, dtype, 3, k), u)


@forms
def test_kernels_may_add_what_provisional_weights_lack(dtype, bits):
    w = np.random.default_rng(1).normal(size=(300, 9)) * np.exp2(-np.arange(9))
    w[7], w[100:130, :3] = 0, w[100:130, :3] * 2.0**-10  # listed: far below, and past the tenth
    u = bits_of(w, dtype)
    planes = float_planes.encode(u, dtype, bits)
    exponent, known = float_planes.provisional(planes, bits=bits, k=300)
    values = float_fields.joined(exponent, float_fields.rests(planes.rest, dtype, 300), dtype)
    values = jnp.where(known, float_fields.floats(values, dtype).astype(jnp.float32), 0)
    row, column, lacks = float_planes.lacking(planes, dtype=dtype, bits=bits, k=300)
    true = np.asarray(float_fields.floats(u, dtype).astype(jnp.float32))
    assert (planes.where < NOWHERE).any() or dtype == "float8_e4m3fn"  # whose exponents are few
    found = values.at[row, column].add(lacks, mode="drop")
    np.testing.assert_allclose(found, true, rtol=1e-6, atol=1e-6 * np.abs(true[99]).max())
    assert np.abs(values).max() <= 2 * np.abs(true).max()  # so that no sum loses digits


def test_consecutive_columns_are_decoded_by_themselves():
    u = np.random.default_rng(4).integers(0, 1 << 16, (200, 8)).astype(np.uint16)
    planes = float_planes.encode(jnp.asarray(u), "bfloat16", 3)
    some = planes._replace(
        **{name: getattr(planes, name)[:, 3:6] for name in float_planes.BY_COLUMN}
    )
    got = decoded(some, "bfloat16", 3, 200, first=3)
    np.testing.assert_array_equal(got, u[:, 3:6])
    assert (np.asarray(decoded(some, "bfloat16", 3, 200)) != u[:, 3:6]).any()  # of columns 0 to 2


def test_gaussian_weights_take_what_theory_says():
    """Escapes: the mass below the window; the rest of the bits is fixed."""
    w = np.random.default_rng(2).normal(size=(4096, 64)) * 0.02
    u = bits_of(w, "bfloat16")
    for bits, most in ((3, 11.30), (4, 12.02)):
        planes = float_planes.encode(u, "bfloat16", bits)
        stored = sum(a.nbytes for a in planes if a is not None)
        assert stored == float_planes.nbytes(4096, 64, "bfloat16", bits, len(planes.where))
        assert 8 * stored / w.size < most
    exponent, _ = float_fields.fields(u, "bfloat16")
    codes = np.asarray(exponent) - np.asarray(float_planes.encode(u, "bfloat16", 3).base)
    escaped = np.mean((codes < 0) | (codes >= 7))
    assert 0.02 < escaped < 0.06  # P(|x| < 2^-6 of the largest octave) is 0.03 to 0.05


def test_constant_and_zero_columns_list_nothing():
    u = bits_of(np.array([[0.0, -0.0, 5.0, 1e-38]]).repeat(130, 0), "bfloat16")
    for bits in BITS:
        assert int(float_planes.missing(u, "bfloat16", bits)) == 0


def test_too_short_a_list_gives_nan():
    u = jnp.asarray(patterns("bfloat16", 256 * 8).reshape(256, 8))
    assert int(float_planes.missing(u, "bfloat16", 3)) > 5
    planes = jax.jit(lambda u: float_planes.encode(u, "bfloat16", 3, 5))(u)
    found = float_fields.floats(decoded(planes, "bfloat16", 3, 256), "bfloat16")
    assert jnp.isnan(found).all()


def test_entries_that_are_not_used_change_nothing():
    u = bits_of(np.random.default_rng(3).normal(size=(256, 4)), "bfloat16")
    planes = float_planes.encode(u, "bfloat16", 3, 99)
    assert (planes.where == NOWHERE).sum() > 50
    np.testing.assert_array_equal(decoded(planes, "bfloat16", 3, 256), u)


def test_a_matrix_too_large_for_places():
    with pytest.raises(ValueError, match="fewer than 2\\^31 - 1 floats, got 65536 x 32768; split"):
        float_planes.encode(jax.ShapeDtypeStruct((65536, 32768), np.uint16), "bfloat16", 3)
