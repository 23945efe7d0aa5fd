"""Native products and decoding of float planes: every instruction set, every kind of float."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import cpu
from pallas_kernels.codecs import float_fields, float_planes
from pallas_kernels.cpu import native

REASON = native.load()
SETS = range(len(native.instruction_sets()))
pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU's kernels"),
    pytest.mark.skipif(bool(REASON), reason=f"no native kernels: {REASON}"),
]
BITS = float_planes.BITS


@pytest.fixture
def rng():
    return np.random.default_rng()  # fresh


def every(dtype, rng):
    """All bits of a dtype, or a great many, in any order, and rows that make no multiple."""
    size = 8 * jnp.dtype(dtype).itemsize
    u = rng.permutation(1 << 16) if size == 16 else rng.integers(0, 1 << size, 1 << 14)
    return u.reshape(-1, 64).astype(float_fields.unsigned(dtype))


def escaping(rng, k, n):
    """bfloat16 around 1, of which so many in 128 rows are near, as in column 0 ... or far."""
    exponent = np.full((k, n), 127) - rng.integers(0, 7, (k, n))
    near = rng.random((k, n)) < np.arange(n) / n
    exponent = np.where(near, 120 - rng.integers(0, 9, (k, n)), exponent)
    far = rng.random((k, n)) < 0.02
    exponent = np.where(far, rng.integers(0, 255, (k, n)), exponent)
    return (exponent << 7 | rng.integers(0, 128, (k, n)) | rng.integers(0, 2, (k, n)) << 15).astype(
        np.uint16
    )


@functools.cache
def decoder(dtype, bits, k):
    def run(planes):
        decode = functools.partial(cpu.decode_float_planes, planes, dtype=dtype, bits=bits, k=k)
        return [decode(most=most) for most in SETS]

    return jax.jit(run)


def assert_decodes(u, dtype, bits):
    planes = float_planes.encode(jnp.asarray(u), dtype, bits)
    for found in decoder(dtype, bits, len(u))(planes):
        np.testing.assert_array_equal(found, u)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", float_fields.DTYPES)
def test_every_float_decodes(dtype, bits, rng):
    assert_decodes(every(dtype, rng), dtype, bits)


@pytest.mark.parametrize("shape", [(1, 1), (130, 17), (127, 33)])
def test_shapes_decode(shape, rng):
    for bits in BITS:
        assert_decodes(escaping(rng, *shape), "bfloat16", bits)


def test_constant_columns_decode():
    """Zeros, NaN with a payload, -0, and the largest subnormal number."""
    u = np.tile(np.array([0, 0xFFC1, 0x8000, 0x007F], np.uint16), (200, 1))
    for bits in BITS:
        assert_decodes(u, "bfloat16", bits)


def test_a_longer_list_says_nothing_more(rng):
    u = jnp.asarray(escaping(rng, 200, 20))
    planes = float_planes.encode(u, "bfloat16", 3, int(float_planes.missing(u, "bfloat16", 3)) + 99)
    for found in decoder("bfloat16", 3, 200)(planes):
        np.testing.assert_array_equal(found, u)


def floats(u):
    return np.asarray(u.view(jnp.bfloat16), np.float64)


@functools.cache
def product(dtype, bits, form="float"):
    def run(x, planes):
        static = {"dtype": dtype, "bits": bits, "activations": form}
        return [
            cpu.shared("float_planes_matmul", x, [planes], most=most, **static)[0] for most in SETS
        ]

    return jax.jit(run)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 7, 130])
def test_products(m, bits, rng):
    """Escapes of every number and kind, rows of x for every kernel."""
    k, n = 300, 75
    w = escaping(rng, k, n)
    w[w >> 7 & 255 > 140] &= 0x3FFF  # sums of numbers near 1e38 say nothing of the others
    x = rng.standard_normal((m, k)).astype(np.float32)
    planes = float_planes.encode(jnp.asarray(w), "bfloat16", bits)
    want = x.astype(np.float64) @ floats(w)
    for y in product("bfloat16", bits)(x, planes):
        assert np.max(abs(y - want)) < 1e-5 * np.max(abs(want))


@pytest.mark.parametrize("bits", BITS)
def test_infinities_and_nan_reach_their_columns(bits, rng):
    w = escaping(rng, 140, 20) & 0xBFFF  # below 2
    w[3, 2], w[133, 5], w[9, 17], w[12, 17] = 0x7F80, 0xFFC0, 0x7F80, 0xFF80
    x = np.abs(rng.standard_normal((3, 140))).astype(np.float32)
    planes = float_planes.encode(jnp.asarray(w), "bfloat16", bits)
    for y in product("bfloat16", bits)(x, planes):
        y = np.array(y)
        assert (y[:, 2] == np.inf).all() and np.isnan(y[:, [5, 17]]).all()
        assert np.isfinite(np.delete(y, [2, 5, 17], 1)).all()


@pytest.mark.parametrize("dtype", [d for d in float_fields.DTYPES if d != "bfloat16"])
def test_products_of_other_floats(dtype, rng):
    w = rng.standard_normal((140, 20)) * 2.0 ** -rng.integers(0, 9, (140, 20))
    w = np.asarray(jnp.asarray(w, dtype))
    planes = float_planes.encode(jnp.asarray(w.view(float_fields.unsigned(dtype))), dtype, 3)
    x = rng.standard_normal((3, 140)).astype(np.float32)
    rounded = np.asarray(forms.rounded(jnp.asarray(x), "int8"), np.float64)
    for form, exact in (("float", x.astype(np.float64)), ("int8", rounded)):
        want = exact @ w.astype(np.float64)
        for y in product(dtype, 3, form)(x, planes):
            assert np.max(abs(y - want)) < 1e-5 * np.max(abs(want))


def test_every_float8_is_multiplied(rng):
    """x picks one weight at a time."""
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        u = np.arange(256, dtype=np.uint8)[None]
        planes = float_planes.encode(jnp.asarray(u), dtype, 3)
        want = u.view(jnp.dtype(dtype)).astype(np.float32)
        for y in product(dtype, 3)(np.ones((1, 1), np.float32), planes):
            np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(("k", "n"), [(0, 3), (3, 0)])
def test_empty_matrices(k, n):
    words = lambda rows: jnp.zeros((rows, n), jnp.int32)
    entry = jnp.full(1, float_planes.NOWHERE, jnp.int32), jnp.zeros(1, jnp.uint8)
    base = jnp.zeros((1, n), jnp.uint8)
    planes = float_planes.Planes(words(k), words(-(-k // 4)), base, words(-(-k // 128)), *entry)
    for found in decoder("bfloat16", 3, k)(planes):
        assert found.shape == (k, n) and found.dtype == jnp.uint16
    for y in product("bfloat16", 3)(jnp.ones((2, k)), planes):
        np.testing.assert_array_equal(y, np.zeros((2, n)))


def test_a_list_out_of_order_does_no_harm(rng):
    """The weights are then wrong, but no memory is."""
    u = escaping(rng, 200, 20)
    planes = float_planes.encode(jnp.asarray(u), "bfloat16", 3)
    size = len(planes.where)
    for where in (rng.integers(-(2**31), 2**31, size), rng.integers(-99, 4099, size)):
        odd = planes._replace(where=jnp.asarray(where, jnp.int32))
        for found in decoder("bfloat16", 3, 200)(odd):
            assert found.shape == u.shape
        for m in (1, 130):
            product("bfloat16", 3)(np.ones((m, 200), np.float32), odd)
