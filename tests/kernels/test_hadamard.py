"""Hadamard matrices by their definition, transforms against the matrix they stand for."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import hadamard
from pallas_kernels.hadamard_orders import CIRCULANTS, construct, constructible

# Widths of real models and their factors, which never change: a stored rotation depends on them.
PLANS = {
    192: (16, 12),
    576: (24, 24),
    768: (32, 24),
    1152: (12, 12, 8),
    1536: (16, 12, 8),
    2304: (16, 12, 12),
    2560: (20, 16, 8),
    3584: (28, 16, 8),
    4096: (16, 16, 16),
    5120: (20, 16, 16),
    6912: (24, 24, 12),
    8960: (28, 20, 16),
    11008: (172, 8, 8),
    13696: (428, 32),
    13824: (24, 24, 24),
    14336: (32, 28, 16),
    18944: (148, 16, 8),
    28672: (28, 16, 8, 8),
    29568: (44, 28, 24),
    49152: (16, 16, 16, 12),
}


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def orthonormal(n):
    return hadamard.matrix(n) / np.sqrt(n)


def is_hadamard(h):
    wide = h.astype(np.float32)  # sums of +-1 are exact
    return np.array_equal(wide @ wide.T, len(h) * np.eye(len(h))) and set(np.unique(h)) <= {-1, 1}


# --- matrices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, orders",
    [
        ("Sylvester", [1, 2, 4, 8, 64]),
        ("Paley I", [12, 20, 24, 44, 140, 504]),
        ("Paley I, prime powers 27, 243, 343", [28, 244, 344]),
        ("Paley II", [36, 76, 148]),
        ("Paley II, prime powers 9, 25, 49, 81, 125, 169", [20, 52, 100, 164, 252, 340]),
        ("Goethals-Seidel", [4 * t for t in CIRCULANTS]),
    ],
)
def test_each_construction_gives_hadamard_matrices(kind, orders):
    for order in orders:
        h = construct(order)
        assert h.shape == (order, order) and h.dtype == np.int8
        assert is_hadamard(h), f"{kind}: {order}"


def test_the_check_sees_one_wrong_sign():
    h = construct(92).copy()
    h[3, 5] *= -1
    assert not is_hadamard(h)


def test_every_multiple_of_4_up_to_320_has_a_matrix():
    assert all(hadamard.exists(n) for n in (1, 2, *range(4, 321, 4)))
    assert is_hadamard(hadamard.matrix(560))  # a product
    missing = [n for n in range(4, 500, 4) if not hadamard.exists(n)]
    assert missing == [324, 356, 412, 436]


def test_no_circulants_are_kept_for_nothing():
    plain = lambda order: any(
        all(q % p for p in range(2, int(q**0.5) + 1))
        for q in ([order - 1] + ([order // 2 - 1] if order % 8 == 4 else []))
    )
    assert not any(plain(4 * t) for t in CIRCULANTS)


CHECKSUMS = {
    16: 3525872949, 28: 1908957881, 36: 1398319553, 52: 3028209135, 172: 905198475,
    428: 3810865513, 576: 1858813320, 1120: 3736309369, 1536: 4180548885,
}  # fmt: skip


def test_matrices_never_change():
    """Models are stored in rotated form: another matrix of the same order would break them."""
    checksum = lambda h: zlib.crc32(np.packbits(h > 0).tobytes())
    assert {n: checksum(hadamard.matrix(n)) for n in CHECKSUMS} == CHECKSUMS
    swapped = np.kron(construct(12), np.kron(construct(8), construct(16)))  # the twin
    assert is_hadamard(swapped) and checksum(swapped) != CHECKSUMS[1536]


# --- transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 12, 36, 92, 576])
def test_transform_is_the_matrix(n):
    x = draw(3, n)
    h = orthonormal(n)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(hadamard.transform(x), x @ h, atol=3e-6)
    np.testing.assert_allclose(hadamard.transform_transposed(x), x @ h.T, atol=3e-6)
    if n == 12:  # the twin: not symmetric, so the sides differ
        assert np.abs(x @ h - x @ h.T).max() > 0.1


@pytest.mark.parametrize("n", [12, 576])
def test_orthonormal_to_1e_6(n):
    h = np.asarray(hadamard.transform(jnp.eye(n)), np.float64)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-6)


@pytest.mark.parametrize("n", PLANS)
def test_every_width_inverts_and_spreads(n):
    assert hadamard.plan(n) == PLANS[n] and np.prod(PLANS[n]) == n
    assert all(f <= hadamard.LARGEST and constructible(f) for f in PLANS[n])
    x = np.array(draw(3, n))
    x[0] = np.arange(n) == n // 3
    y, z = np.asarray(hadamard.transform(x)), np.asarray(hadamard.transform_transposed(x))
    np.testing.assert_allclose(np.sum(y * y, -1), np.sum(x * x, -1), rtol=1e-5)
    np.testing.assert_allclose(hadamard.transform_transposed(y), x, atol=5e-6)
    for spread in (y[0], z[0]):
        np.testing.assert_allclose(np.abs(spread), n**-0.5, rtol=1e-5)


@given(st.integers(1, 3000).filter(hadamard.exists), st.integers(0, 3))
def test_any_width_inverts(n, seed):
    x = draw(2, n, seed=seed)
    y = hadamard.transform(x)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(hadamard.transform_transposed(y), x, atol=5e-6)


@pytest.mark.parametrize("n, block", [(96, 12), (96, 32), (144, 36), (96, 1), (96, 96)])
def test_blocks_are_kron_of_identity(n, block):
    h = np.kron(np.eye(n // block), orthonormal(block))
    x = draw(5, n)
    np.testing.assert_allclose(hadamard.transform(x, block), x @ h, atol=3e-6)
    np.testing.assert_allclose(hadamard.transform_transposed(x, block), x @ h.T, atol=3e-6)


@pytest.mark.parametrize("axis, block", [(0, None), (1, 12), (-2, None), (-3, 12)])
def test_any_axis(axis, block):
    x = draw(24, 48, 2)
    want = jnp.moveaxis(hadamard.transform(jnp.moveaxis(x, axis, -1), block), -1, axis)
    np.testing.assert_allclose(hadamard.transform(x, block, axis), want, atol=1e-6)


def test_a_product_is_left_as_it_was():
    x, w = draw(4, 144), draw(144, 8, seed=1)
    got = hadamard.transform(x) @ hadamard.transform(w, axis=0)
    np.testing.assert_allclose(got, x @ w, atol=1e-4)


@pytest.mark.parametrize("dtype, eps", [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_dtype_is_kept_and_sums_are_wide(dtype, eps):
    x = draw(64, 576, dtype=dtype)
    y = hadamard.transform(x)
    assert y.dtype == dtype
    want = np.asarray(x, np.float64) @ orthonormal(576)
    # One rounding per factor, each of at most eps / 2 and uniform: far below a narrow sum's error.
    error = np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2))
    assert error < 0.5 * eps * np.sqrt(len(hadamard.plan(576)))


def test_half_precision_does_not_overflow():
    x = jnp.full((1, 4096), 60000 / 64, jnp.float16)  # all of it goes to one entry, 60000
    assert np.isfinite(np.asarray(hadamard.transform(x))).all()
    np.testing.assert_allclose(
        np.asarray(hadamard.transform(x)[0, 0], np.float64), 60000, rtol=0.01
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_the_inverse(dtype):
    x, g = draw(3, 48, dtype=dtype), draw(3, 48, dtype=dtype, seed=1)
    _, pullback = jax.vjp(lambda x: hadamard.transform(x, 12), x)
    assert pullback(g)[0].dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 0.05
    want = hadamard.transform_transposed(g, 12).astype(jnp.float32)
    np.testing.assert_allclose(pullback(g)[0].astype(jnp.float32), want, atol=tolerance)
    _, forward = jax.jvp(lambda x: hadamard.transform(x, 12), (x,), (g,))
    np.testing.assert_array_equal(forward, hadamard.transform(g, 12))


def test_vmap_and_empty():
    x = draw(3, 4, 24)
    np.testing.assert_allclose(jax.vmap(hadamard.transform)(x), hadamard.transform(x), atol=1e-6)
    assert hadamard.transform(jnp.zeros((0, 24))).shape == (0, 24)


def test_constants_stay_small():
    """What a program holds is one matrix per factor, not one of n x n."""
    text = jax.jit(hadamard.transform).lower(jnp.zeros((1, 18944))).as_text()
    assert len(text) < 3 * 148**2


# --- widths without a matrix ----------------------------------------------------------------


def test_errors_name_the_way_out():
    with pytest.raises(ValueError, match=r"order 356 can be made; the nearest are 352 and 360"):
        hadamard.transform(jnp.zeros(356))
    with pytest.raises(ValueError, match="nearest are 2 and 4"):
        hadamard.matrix(3)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        hadamard.plan(0)
    with pytest.raises(ValueError, match="block 36 does not divide n = 100"):
        hadamard.transform(jnp.zeros(100), 36)
    with pytest.raises(ValueError, match="expected a floating array, got int32"):
        hadamard.transform(jnp.arange(4))
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):
        hadamard.transform(jnp.zeros((4, 4)), axis=2)
    with pytest.raises(ValueError, match="no single construction gives .* order 40"):
        construct(40)


def test_padded_is_the_next_width_that_exists():
    assert [hadamard.padded(n) for n in (1, 3, 5, 576, 577, 356)] == [1, 4, 8, 576, 580, 360]
    for n in range(1, 1000, 37):
        m = hadamard.padded(n)
        assert m >= n and hadamard.exists(m) and not any(map(hadamard.exists, range(n, m)))
