"""Learned vectors along the outputs: outlier rows, bits, errors. The contract: test_additive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.formats.vector import Vector
from tests.support.arrays import draw
from tests.support.layer import relative_loss
from tests.support.learned_formats import bits, encoded, layer, rounded


def test_a_vector_is_consecutive_outputs_of_one_row():
    """Three vectors, repeated: a codebook of four holds them; along the rows it could not."""
    atoms = np.random.default_rng(0).normal(size=(3, 8))
    pick = np.random.default_rng(1).integers(0, 3, (16, 4))
    w = jnp.asarray(atoms[pick].reshape(16, 32), jnp.float32)
    f = Vector(length=8, bits=2, residual_bits=0)
    np.testing.assert_allclose(f.dequantize(f.encode(w), 16), w, atol=2e-3)
    crossed = w.reshape(16, 4, 8).swapaxes(1, 2).reshape(16, 32)
    assert np.abs(f.dequantize(f.encode(crossed), 16) - crossed).max() > 0.1


def test_bits_are_the_stated_ones():
    w = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    held = lambda format: bits(jax.eval_shape(format.encode, w), 1024, 512)
    table = 256 * 8 * 16 / 2**19
    assert held(Vector(8, 8, 8)) == 2 + 2 * table
    assert held(Vector(8, 8, 0)) == 1 + table
    assert held(Vector(8, 8, 8, outliers=0.01)) == 2 + 4 * table + 1024 / 2**19
    assert held(Vector(4, 12, 0)) == 3 + 4096 * 4 * 16 / 2**19


def test_outliers_are_the_rows_of_most_weight():
    w, weights = draw(40, 16), jnp.arange(40.0) % 7
    f = Vector(4, 2, 2, outliers=0.1)
    grid = f.learn(w, weights, jax.random.key(0))
    assert np.flatnonzero(grid.kind).tolist() == [6, 13, 20, 27]
    codes = jnp.zeros((40, 2, 4), jnp.int32)
    kept = f.pack(codes, grid)["outliers"]
    assert (kept.shape, int(kept[0])) == ((2,), 1 << 6 | 1 << 13 | 1 << 20 | 1 << 27)
    assert f.pack(codes, grid._replace(kind=grid.kind.at[31].set(1)))["outliers"][0] < 0
    row = lambda i: f.values(codes, grid)[i]
    np.testing.assert_array_equal(row(0), row(39))
    np.testing.assert_array_equal(row(6), row(27))
    assert np.abs(row(0) - row(6)).max() > 0


def test_outlier_codebooks_pay():
    """They lose less than the bits they take would buy elsewhere, 6.02 dB a bit."""
    w, h = layer()
    losses, held = [], []
    for format in (Vector(4, 4, 4), Vector(4, 4, 4, outliers=0.05)):
        data, q = rounded(w, h, format)
        losses.append(relative_loss(w, q, h))
        held.append(bits(data, 64, 128))
    assert losses[1] < losses[0] * 4 ** (held[0] - held[1])


def test_outputs_of_ids_within_a_vector():
    _, _, data, w = encoded(f := Vector(4, 4, 4))
    one = jax.jit(lambda i: f.columns(data, i, 48))
    for i in range(40):
        np.testing.assert_array_equal(one(jnp.array([i]))[:, 0], w[:, i])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vector(bits=5), "a multiple of 2 or 3"),
        (lambda: Vector(residual_bits=1), "between 2 and 16, got 1"),
        (lambda: Vector(length=0), "length must be positive"),
        (lambda: Vector(outliers=1.0), "outliers must be a fraction"),
        (lambda: Vector(length=6).check_shape(64, 32), "6 does not divide n = 32"),
        (lambda: Vector().check(jnp.full((8, 8), 1e-9)), "range of float16"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
