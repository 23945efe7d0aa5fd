"""E8P: the codebook against its description, the search against brute force, storage, products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.formats.e8p import E8P
from pallas_kernels import tiled_product
from pallas_kernels.codecs import e8p
from tests.support.arrays import draw

all_bits = pytest.mark.parametrize("bits", [2, 3, 4])
TABLE = e8p.table().tolist()
BITS = (0, 4, 1, 5, 2, 6, 3, 7)  # of a sign, by coordinate


def described_point(code, parity_rule=True):
    """One point in plain Python, as the paper tells it: row, parity, signs, shift."""
    row = list(TABLE[code >> 8])
    signs = code & 255
    odd_signs = bin(signs).count("1") % 2
    if parity_rule:
        signs ^= odd_signs
        if sum(row) % 2 == 1:
            row[7] = -row[7]
    row = [-v if signs >> bit & 1 else v for v, bit in zip(row, BITS, strict=True)]
    return [v - 0.25 if odd_signs else v + 0.25 for v in row]


@pytest.fixture(scope="module")
def points():
    return np.asarray(e8p.decode(jnp.arange(1 << 16))).T


def in_e8(points):
    """All integers or all half-integers, with an even sum."""
    same = np.all(points % 1 == 0, 1) | np.all(points % 1 == 0.5, 1)
    return same & (points.sum(1) % 2 == 0)


# --- the codebook ---------------------------------------------------------------------------


def test_table_is_the_stated_one():
    table = e8p.table()
    norms, counts = np.unique(np.sum(table**2, 1), return_counts=True)
    assert dict(zip(norms, counts, strict=True)) == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert len(np.unique(table, axis=0)) == 256
    keys = table[:227].tolist()
    assert keys == sorted(keys)
    assert set(table.ravel().tolist()) == {0.5, 1.5, 2.5}


def test_points_are_distinct_and_in_the_shifted_lattice(points):
    assert len(np.unique(points, axis=0)) == 1 << 16
    assert np.all(in_e8(points + 0.25))  # E8 - 1/4 is -(E8 + 1/4); both shifts differ by 1/2
    assert np.all(in_e8(points - 0.25))
    np.testing.assert_allclose(np.mean(np.sum(points**2, 1)), 9.57, atol=0.005)


def test_decode_is_the_description(points):
    codes = np.random.default_rng(0).integers(0, 1 << 16, 500)
    want = np.array([described_point(int(c)) for c in codes])
    np.testing.assert_array_equal(points[codes], want)
    assert np.all(in_e8(want - 0.25))
    # The twin: without the parity rule points leave the lattice.
    loose = np.array([described_point(int(c), parity_rule=False) for c in codes])
    assert np.mean(in_e8(loose - 0.25)) < 0.6


def test_e81b_is_the_smallest_points_of_e8():
    table = e8p.e81b_table()
    assert len(np.unique(table, axis=0)) == 256 and np.all(in_e8(table))
    assert not np.any(np.all(table == [0] * 7 + [-2], 1))
    got = e8p.decode(jnp.arange(256) << 16, 3) - e8p.decode(jnp.zeros(1, int))
    np.testing.assert_allclose(got.T, table / 2.04, atol=1e-4)


# --- nearest --------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, 1.03, 3.0])
def test_nearest_is_the_nearest_of_all(points, spread):
    x = spread * np.random.default_rng(1).normal(size=(1000, 8)).astype(np.float32)
    code, value = e8p.nearest(jnp.asarray(x.T))
    np.testing.assert_array_equal(value.T, points[code])
    best = least_distances(x, points)
    np.testing.assert_allclose(np.sum((x - points[code]) ** 2, 1), best, rtol=1e-4, atol=1e-4)


def least_distances(x, points):
    norms = np.sum(points**2, 1)
    parts = [np.min(norms - 2 * part @ points.T, 1) for part in np.array_split(x, 10)]
    return np.concatenate(parts) + np.sum(x**2, 1)


def test_nearest_returns_its_own_points():
    codes = jnp.asarray(np.random.default_rng(2).integers(0, 1 << 16, 1000))
    np.testing.assert_array_equal(e8p.nearest(e8p.decode(codes))[0], codes)


@all_bits
def test_ties_and_far_points(bits):
    hard = np.float32([0.0, 1e-30, 0.25, -0.5, 1.0, 40.0, -1e6])
    code, value = e8p.nearest(jnp.asarray(np.tile(np.resize(hard, 1000), (8, 1))), bits)
    np.testing.assert_array_equal(value, e8p.decode(code, bits))
    assert np.all(np.abs(value) < 5)


@pytest.mark.parametrize(
    ("bits", "want", "atol"), [(2, 0.0916, 5e-4), (3, 0.0296, 2e-4), (4, 0.0097, 2e-4)]
)
def test_gaussian_distortion(bits, want, atol):
    f, w = E8P(bits), draw(1024, 512)
    values = jax.jit(lambda w: f.dequantize(f.encode(w), 1024))(w)
    got = float(jnp.mean((w - values) ** 2))
    np.testing.assert_allclose(got, want, atol=atol)
    assert got > 4.0**-bits  # Shannon


def test_gaussian_distortion_of_wrong_codes_is_larger(points):
    """The twins of the golden 0.0916: no shift, and signs with no parity rule."""
    codes = np.arange(1 << 16)
    signs = 1 - 2 * (codes[:, None] >> BITS & 1)
    shift = 0.25 * np.prod(signs, 1)[:, None]
    unshifted = points - shift
    loose = (np.array(TABLE)[codes >> 8] * signs + shift).astype(np.float32)
    x = 1.03 * np.random.default_rng(3).normal(size=(400, 8)).astype(np.float32)
    right, *wrong = (
        np.mean(least_distances(x, p)) / 8 / 1.03**2 for p in (points, unshifted, loose)
    )
    np.testing.assert_allclose(right, 0.0916, atol=0.004)  # 400 points
    assert min(wrong) > 1.05 * right  # ten times the tolerance above


# --- published words ------------------------------------------------------------------------


def test_quip_words_round_trip():
    codes = np.random.default_rng(0).integers(0, 1 << 16, (48, 24), dtype=np.int32)
    words = e8p.to_quip_words(codes)
    assert (words.dtype, words.shape) == (np.int64, (48, 6))
    np.testing.assert_array_equal(e8p.from_quip_words(words), codes)
    pairs = words.view(np.uint32).reshape(48, 6, 2)
    np.testing.assert_array_equal(e8p.from_quip_words(pairs), codes)


def test_quip_words_are_read_as_described():
    """Bits one by one, in plain loops: tiles of 8 pairs of outputs by 4 pairs of octets."""
    out, quarters = 32, 4
    words = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (out, quarters))
    flat = [int(w) % 2**64 for w in words.ravel()]
    want = np.zeros((out, 4 * quarters), int)
    position = 0
    for tile_row in range(out // 16):
        for tile_column in range(quarters * 32 // 64):
            for pair_row in range(8):
                for pair_column in range(4):
                    word = flat[position]
                    position += 1
                    low, high = word % 2**32, word >> 32
                    for i, (r, c) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
                        signs = sum((high >> 4 * j + i & 1) << j for j in range(8))
                        row = tile_row * 16 + pair_row * 2 + r
                        octet = tile_column * 8 + pair_column * 2 + c
                        want[row, octet] = (low >> 8 * i & 255) << 8 | signs
    codes = e8p.from_quip_words(words)
    np.testing.assert_array_equal(codes, want)
    values = e8p.decode(jnp.asarray(codes.T))[..., :3]  # and on to weights, octets down
    for o in range(3):
        np.testing.assert_array_equal(values[5, :, o], described_point(int(want[o, 5])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: e8p.from_quip_words(np.zeros((8, 4), np.int64)), "out a multiple of 16"),
        (lambda: e8p.from_quip_words(np.zeros((16, 4), np.int32)), "expected int64"),
        (lambda: e8p.to_quip_words(np.zeros((16, 4), np.int32)), "and of 64 inputs"),
        (lambda: E8P(5), "bits must be 2, 3 or 4"),
        (lambda: E8P(2.0), "bits must be int"),
        (lambda: E8P().encode(jnp.ones((12, 2))), "8 does not divide k = 12"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the format -----------------------------------------------------------------------------

encode = jax.jit(lambda w, format: format.encode(w), static_argnums=1)


@all_bits
def test_storage_is_exact(bits):
    k, f = 40, E8P(bits)  # the last word is half full

    @jax.jit
    def stored(w):
        grid = f.grids(w)
        row = jax.tree.map(lambda a: a[0], grid)
        codes, values = jax.lax.map(lambda t: f.round(t, row), w.reshape(k // 8, 8, 20))
        return f.pack(codes, grid), values.reshape(k, 20)

    data, values = stored(draw(k, 20))
    np.testing.assert_array_equal(jax.jit(f.dequantize, static_argnums=1)(data, k), values)
    assert data.pop("scale").shape == (1, 1)
    # Whole words of 4 bytes: 2 bytes an octet, and 1 or 2 of the residual.
    words = {2: {"codes": 3}, 3: {"codes": 3, "residual": 2}, 4: {"codes": 3, "residual": 3}}
    assert {name: a.shape for name, a in data.items()} == {
        name: (w, 20) for name, w in words[bits].items()
    }
    assert all(a.dtype == jnp.int32 for a in data.values())


def test_two_codes_share_a_word_low_half_first():
    f = E8P()
    codes = jnp.array([[0x8001], [0x7FFE], [0xABCD]])
    packed = f.pack(codes, f.grids(draw(24, 1)))["codes"]
    assert [int(v) % 2**32 for v in packed[:, 0]] == [0x7FFE8001, 0xABCD]


# Whole, or in four tiles of which the last overlaps.
@pytest.mark.parametrize(("bits", "tile"), [(2, 1 << 22), (3, 72 * 30), (4, 72 * 30)])
def test_products_and_look_ups_agree_with_the_decoded_matrix(bits, tile, tiles_of):
    tiles_of(tile)
    f = E8P(bits)
    data = encode(draw(72, 100), f)
    x, g, ids = draw(5, 72, seed=1), draw(5, 100, seed=2), jnp.array([0, 7, 19, 40, 71])

    @jax.jit
    def everything(x, g, data):
        look_ups = f.columns(data, ids, 72), f.rows(data, ids, 72)
        batch = f.dequantize(jax.tree.map(lambda a: jnp.stack([a, a]), data), 72)
        return batch, *look_ups, f.matmul(x, data), f.matmul_transposed(g, data, 72)

    batch, columns, rows, product, transposed = everything(x, g, data)
    w = batch[0]
    np.testing.assert_array_equal(w, batch[1])
    np.testing.assert_allclose(columns, w[:, ids], atol=1e-6)
    np.testing.assert_allclose(rows, w[ids], atol=1e-6)
    np.testing.assert_allclose(product, x @ w, atol=1e-4)
    np.testing.assert_allclose(transposed, g @ w.T, atol=1e-4)
    assert f.outputs(data) == 100


@pytest.mark.parametrize("tile", [1 << 22, 64 * 30])
def test_scales_get_their_cotangent_and_codes_none(tile, tiles_of):
    tiles_of(tile)
    f = E8P(3)
    data = encode(draw(64, 100), f)
    x, c, unit = draw(5, 64, seed=1), draw(5, 100, seed=2), f.dequantize(data | {"scale": 1.0}, 64)

    def got(x, data):
        return jnp.sum(c * f.matmul(x, data)) + jnp.sum(f.matmul_transposed(c, data, 64) ** 2)

    def want(x, scale):
        return jnp.sum(c * (x @ (scale * unit))) + jnp.sum((c @ (scale * unit).T) ** 2)

    dx, grads = jax.jit(jax.grad(got, (0, 1), allow_int=True))(x, data)
    want_dx, want_scale = jax.jit(jax.grad(want, (0, 1)))(x, data["scale"])
    np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["scale"], want_scale, rtol=1e-4)
    assert grads["codes"].dtype == grads["residual"].dtype == jax.dtypes.float0


def test_no_float_copy_of_the_matrix_stands_in_memory(tiles_of):
    """Not in a loop of products, and not for its gradient."""
    k, n, f = 256, 1000, E8P()
    data = encode(draw(k, n), f)
    tiles_of(k * n // 8)

    def loop(x, data):
        step = lambda x, _: (jnp.tanh(f.matmul_transposed(f.matmul(x, data), data, k)), None)
        return jnp.sum(jax.lax.scan(step, x, None, length=6)[0])

    for fn in (loop, jax.grad(loop)):
        compiled = jax.jit(fn).lower(draw(2, k), data).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * k * n * 4


def test_half_precision_inputs_keep_their_dtype():
    f = E8P()
    data, x = encode(draw(64, 32), f), draw(3, 64).astype(jnp.bfloat16)

    def both(x):
        y, pull = jax.vjp(lambda x: f.matmul(x, data), x)
        return y, pull(y)[0]

    y, dx = jax.eval_shape(both, x)
    assert (y.dtype, dx.dtype) == (jnp.float32, jnp.bfloat16)


def test_entries_that_cover_several_columns(tiles_of):
    """The helper for formats whose codes cover 4 columns and whose scales cover 2."""
    spans = {"codes": 4, "scale": 2}
    decode = lambda d, k: jnp.repeat(d["codes"], 4, 1) * jnp.repeat(d["scale"], 2, 1) * d["book"]
    data = {"codes": draw(8, 7), "scale": draw(1, 14, seed=1), "book": draw(1, 1, seed=2)}
    w, ids, x = np.asarray(decode(data, 8)), jnp.array([0, 5, 27, 14]), draw(3, 8)
    tiles_of(8 * 12)

    @jax.jit
    def everything(x, g, data):
        columns = tiled_product.columns(data, ids, decode, spans, 8)
        product = tiled_product.matmul(x, data, decode, spans)
        return columns, product, tiled_product.matmul_transposed(g, data, decode, spans, 8)

    columns, product, transposed = everything(x, x @ w, data)
    np.testing.assert_array_equal(columns, w[:, ids])
    np.testing.assert_allclose(product, x @ w, atol=1e-5)
    np.testing.assert_allclose(transposed, x @ w @ w.T, atol=1e-3)


def test_a_zero_matrix_stays_finite():
    f = E8P()
    assert float(jnp.max(jnp.abs(f.dequantize(encode(jnp.zeros((64, 32)), f), 64)))) < 1e-20
