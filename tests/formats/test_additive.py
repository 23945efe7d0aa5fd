"""Learned codebooks: k-means and search against NumPy, storage, products, and what Beam gains."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxquant.core.protocols import Moments
from jaxquant.formats import kmeans
from jaxquant.formats.additive import Additive
from jaxquant.formats.vector import Vector
from jaxquant.rounding import beam as stages
from jaxquant.rounding.beam import Beam
from jaxquant.rounding.ldlq import LDLQ
from pallas_kernels.codecs import lookup
from tests.support.arrays import draw
from tests.support.layer import relative_loss
from tests.support.learned_formats import ONE, bits, decode, encoded, layer, rounded

TWO_BITS = [Additive(2, 4, 4), Vector(4, 4, 4, outliers=0.05)]
FORMATS = [*TWO_BITS, Additive(1, 9, 3)]
all_formats = pytest.mark.parametrize("format", FORMATS, ids=str)
two_bits = pytest.mark.parametrize("format", TWO_BITS, ids=str)


def first_row(grid):
    return jax.tree.map(lambda a: a[0], grid)


# --- k-means --------------------------------------------------------------------------------


def lloyd64(v, weights, table, steps, weighted=True):
    losses = []
    for _ in range(steps):
        far = np.sum(weights[:, None] * (v[:, None] - table) ** 2, -1)
        near = far.argmin(1)
        losses.append(far.min(1).sum())
        for j in range(len(table)):
            mine = near == j
            if mine.any():
                mass = weights[mine] if weighted else np.ones_like(v[mine])
                table = table.copy()
                table[j] = np.sum(mass * v[mine], 0) / mass.sum(0)
    return table, losses


def test_lloyd_is_its_float64_twin(monkeypatch):
    rng = np.random.default_rng(0)
    v, weights = rng.normal(size=(300, 3)), rng.uniform(0.1, 2, (300, 3))
    args = [jnp.asarray(a, jnp.float32) for a in (v, weights, v[:16])]
    want, losses = lloyd64(v, weights, v[:16], 6)
    assert np.all(np.diff(losses) <= 0)
    np.testing.assert_allclose(kmeans.lloyd(*args, 6), want, atol=1e-4)
    monkeypatch.setattr(lookup, "CHUNK", 16 * 37)  # by parts, the last one short
    np.testing.assert_allclose(kmeans.lloyd(*args, 6), want, atol=1e-4)
    wrong, _ = lloyd64(v, weights, v[:16], 6, weighted=False)
    assert np.abs(wrong - want).max() > 0.1


def test_first_centroids_go_where_the_energy_is():
    """One vector in a hundred, thirty times as long: draws by number would give it 1 % of 64."""
    v = draw(3000, 4) * jnp.where(jnp.arange(3000) % 100 == 0, 30, 1)[:, None]
    table = kmeans.start(v, jnp.ones_like(v), 64, jax.random.key(0))
    assert len(np.unique(table, axis=0)) == 64
    long = np.linalg.norm(table, axis=1) > 10
    assert 10 < long.sum() < 60


@pytest.mark.parametrize("size", [16, 100])
def test_more_centroids_than_vectors_hold_every_vector(size):
    v = draw(10, 2)
    table = kmeans.lloyd(v, jnp.ones_like(v), kmeans.start(v, v**0, size, jax.random.key(0)), 3)
    np.testing.assert_allclose(kmeans.assign(v, v**0, table)[1], 0, atol=1e-5)


# --- search ---------------------------------------------------------------------------------


def test_a_full_beam_is_brute_force_in_any_metric():
    format, grid = FORMATS[0], encoded(FORMATS[0])[1]
    row, target, root = first_row(grid), draw(4, 40, seed=1), draw(4, 4, seed=2)
    a, b = (np.asarray(t, float) for t in row.tables)
    points = (a[:, None] + b).reshape(-1, 1, 4) * np.asarray(row.scale)[:, None]
    error = np.asarray(target, float).T - points
    far = np.sum((error @ np.asarray(root, float)) ** 2, -1)
    code, value = format.search(target, row, root, 16)
    np.testing.assert_array_equal(code[0] * 16 + code[1], far.argmin(0))
    np.testing.assert_allclose(value.T, points[far.argmin(0), np.arange(40)], atol=1e-6)
    plain = np.sum(error**2, -1)  # the twin: without the metric
    assert np.mean(plain.argmin(0) == far.argmin(0)) < 0.9


def test_wider_beams_come_nearer(monkeypatch):
    tables, target = [draw(16, 6, seed=i) for i in range(3)], draw(6, 64, seed=3)
    found = lambda beam: jax.jit(lambda t: lookup.nearest(t, tables, beam))(target)
    codes = [found(beam) for beam in (1, 4, 64)]
    errors = [np.sum((target - lookup.total(c, tables).T) ** 2) for c in codes]
    assert errors[0] > errors[1] > errors[2]
    monkeypatch.setattr(lookup, "CHUNK", 16 * 4 * 10)  # by parts, the last one short
    np.testing.assert_array_equal(found(4), codes[1])


# --- storage and products -------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 4, 8, 9, 12, 14, 16])
def test_codes_are_one_little_endian_bit_stream(width):
    codes = np.random.default_rng(0).integers(0, 1 << width, (40, 3, 2))
    words, ids = jax.jit(lookup.pack, static_argnums=1)(codes, width), np.array([39, 0, 17, 17])
    opened = lambda words: (lookup.unpack(words, width, 40, 3), lookup.take(words, ids, width, 3))
    whole, some = jax.jit(opened)(words)
    np.testing.assert_array_equal(whole, codes)
    np.testing.assert_array_equal(some, codes[ids])
    stream = sum(int(c) << (i * width) for i, c in enumerate(codes[:, :, 1].ravel()))
    assert int.from_bytes(np.asarray(words)[:, 1].astype("<i4").tobytes(), "little") == stream


@all_formats
def test_storage_is_exact(format):
    _, grid, _, _ = encoded(format)
    rng, blocks = np.random.default_rng(0), (48 // format.tile[0], 40 // format.tile[1])
    codes = np.stack([rng.integers(0, t.shape[-2], blocks) for t in grid.tables], 1)
    data, want = jax.jit(lambda c: (format.pack(c, grid), format.values(c, grid)))(codes)
    assert format.outputs(data) == 40
    stack = jax.tree.map(lambda a: np.stack([a, a])[None], data)
    got = decode(format, stack, 48)
    np.testing.assert_array_equal(got, np.stack([want, want])[None])


@all_formats
def test_encoding_rounds_to_nearest(format):
    w, grid, _, decoded = encoded(format)
    d = format.tile[0]
    for i in (0, 48 // d - 1):
        row = jax.tree.map(lambda a, i=i: a[i * d if len(a) == 48 else 0], grid)
        _, value = format.round(w[i * d : (i + 1) * d], row)
        np.testing.assert_allclose(value, decoded[i * d : (i + 1) * d], atol=1e-6)


@all_formats
def test_products_by_tiles_and_gradients_are_those_of_the_decoded_matrix(format, tiles_of):
    """Gradients reach codebooks and scales."""
    _, _, data, w = encoded(format)
    tiles_of(48 * 12)
    x, g = draw(5, 48, seed=1), draw(5, 40, seed=2)
    floats = {n: a.astype("float32") for n, a in data.items() if a.dtype == jnp.float16}
    assert len(floats) == 2

    def both(product):
        loss = lambda t: (jnp.sum(g * (y := product(t))), y)
        return jax.jit(jax.grad(loss, has_aux=True))(floats)

    got, y = both(lambda t: format.matmul(x, data | t))
    want, _ = both(lambda t: x @ format.dequantize(data | t, 48))
    np.testing.assert_allclose(y, x @ w, atol=1e-4)
    for name in floats:
        np.testing.assert_allclose(got[name], want[name], atol=1e-4)
        assert np.abs(got[name]).max() > 0


def test_sixteen_vectors_in_the_plane_beat_four_levels():
    """Gaussian weights at 2 bits: the plane lies between Shannon's bound and Lloyd-Max's .1175."""
    w, format = draw(480, 320), Vector(2, 4, 0)
    q = jax.jit(lambda w: format.dequantize(format.encode(w), 480))(w)
    error = float(jnp.mean((w - q) ** 2) / jnp.mean(w**2))
    assert 0.0625 < error < 0.115


def test_bits_are_the_stated_ones():
    w = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    held = lambda format: bits(jax.eval_shape(format.encode, w), 1024, 512)
    assert held(Additive(2, 8, 8)) == 2 + (2 * 256 * 8 * 16 + 16 * 512) / 2**19
    assert held(Additive(1, 16, 8)) == 2 + 16 + 16 / 1024


def test_a_code_of_sixteen_bits():
    """As many centroids as AQLM's 1 x 16, more than there are vectors: exact in float16."""
    w, format = draw(16, 32), Additive(1, 16, 8)
    got = jax.jit(lambda w: format.dequantize(format.encode(w), 16))(w)
    np.testing.assert_allclose(got, w, atol=5e-3)


# --- Beam -----------------------------------------------------------------------------------


@lru_cache
def started(format):
    """Beam's k-means and first codes for a small layer."""
    w, h = layer()
    grid = format.learn(w, jnp.diagonal(h), jax.random.key(0))
    codes, damping = stages.first_codes(w, h, format, grid, ONE)
    assert damping == ONE.damping
    return w, h, codes, grid


@two_bits
def test_no_sweep_raises_the_loss(format):
    w, h, codes, grid = started(format)
    values = jax.jit(format.values)
    losses = [relative_loss(w, values(codes, grid), h)]
    for _ in range(4):
        codes, grid = stages.swept(w, h, format, codes, grid, ONE)
        losses.append(relative_loss(w, values(codes, grid), h))
    assert np.all(np.diff(losses) < 1e-6 * losses[0])
    assert losses[-1] < 0.95 * losses[0]


def test_the_fit_is_least_squares():
    w, h, codes, grid = started(format := TWO_BITS[1])
    fit = jax.jit(partial(stages.fitted, format=format, steps=100))
    got = format.values(codes, fit(w, h, codes=codes, grid=grid))
    flat, unflatten = ravel_pytree(grid.tables)
    values = lambda t: format.values(codes, grid._replace(tables=unflatten(t))).reshape(-1)
    v = np.asarray(jax.jit(jax.jacfwd(values))(flat), float).reshape(*w.shape, -1)
    root = np.linalg.cholesky(np.asarray(h, float)).T
    target = (root @ np.asarray(w, float)).reshape(-1)
    best = np.linalg.lstsq(np.einsum("jk,knt->jnt", root, v).reshape(w.size, -1), target)[0]
    least, after = relative_loss(w, v @ best, h), relative_loss(w, got, h)
    assert 0.999 * least < after < 1.01 * least
    assert after < 0.98 * relative_loss(w, format.values(codes, grid), h)


@lru_cache
def nearest_twin(format, seed):
    """The same k-means, and nearest codes."""
    data = format.encode(layer(seed)[0])
    return data, decode(format, data)


@pytest.mark.parametrize("seed", [0, 1])
@two_bits
def test_beam_beats_nearest_codes(format, seed):
    w, h = layer(seed)
    data, q = rounded(w, h, format)
    twin, nearest = nearest_twin(format, seed)
    assert jax.tree.map(jnp.shape, twin) == jax.tree.map(jnp.shape, data)
    assert relative_loss(w, q, h) < 0.4 * relative_loss(w, nearest, h)


def test_wider_beams_lose_less():
    w, h = layer(2)
    rounders = Beam(beam=1, sweeps=1), ONE
    narrow, wide = (relative_loss(w, rounded(w, h, TWO_BITS[0], r)[1], h) for r in rounders)
    assert wide < 0.98 * narrow


@two_bits
def test_ldlq_serves_learned_formats_too(format):
    """Without their metric, and with codebooks as k-means left them."""
    w, h = layer()
    ldlq = LDLQ(act_order=format.tile[0] == 1, passes=2, scales=(0.9, 1.0))
    loss = relative_loss(w, rounded(w, h, format, ldlq)[1], h)
    assert loss < 0.8 * relative_loss(w, nearest_twin(format, 0)[1], h)
    assert loss > relative_loss(w, rounded(w, h, format)[1], h)


@two_bits
def test_hard_hessians(format):
    w, h = layer()
    dead = h.at[5].set(0).at[:, 5].set(0)
    few = draw(3, 64)
    hard = few.T @ few / 3
    for gram in (dead, hard, jnp.zeros_like(h)):
        assert np.all(np.isfinite(rounded(w.at[:, 3].set(0), gram, format)[1]))
    assert relative_loss(w, rounded(w, hard, format)[1], hard) < 1e-3


def test_rounding_is_a_function_of_the_key():
    w, h = layer()
    one, same, other = (rounded(w, h, TWO_BITS[0], key=key)[1] for key in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Additive(bits=7), "a multiple of 2 or 3 between 2 and 16, got 7"),
        (lambda: Additive(bits=18), "between 2 and 16, got 18"),
        (lambda: Additive(codebooks=0), "codebooks must be positive"),
        (lambda: Additive(group=8).check_shape(20, 8), "8 does not divide k = 20"),
        (lambda: Additive().check(jnp.full((8, 2), 1e6)), "range of float16"),
        (lambda: Beam(beam=0), "beam must be positive"),
        (lambda: Beam(sweeps=-1), "sweeps must not be negative"),
        (lambda: Beam(damping=0), "damping must be positive"),
        (lambda: Beam(beam=1.5), "beam must be int"),
        (lambda: Beam()(draw(8, 4), Additive(), Moments(), jax.random.key(0)), "second moment"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
