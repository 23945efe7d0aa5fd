"""The TPU kernel of floats in planes against its reference, interpreted on the CPU.

Budgets are of an output's mean square and of its largest value: float32 rows keep 16 bits, other
rows are exact, and so are all weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import listed_floats, reference
from pallas_kernels.codecs import float_planes
from pallas_kernels.tpu import KERNELS
from pallas_kernels.tpu import float_planes as kernel
from pallas_kernels.tpu.blocks import Blocks
from tests.support.operands import assert_rows_hold

STATIC = {"dtype": "bfloat16", "bits": 4}
CALL = partial(KERNELS["float_planes_matmul"].call, **STATIC, interpret=True)
# m, k, n, x, activations: k and n ragged, steps of every kind.
CASES = [
    (1, 1050, 130, "bfloat16", "float"),
    (3, 75, 130, "float32", "float"),
    (9, 520, 33, "float16", "int8"),
]


def drawn(rng, k, n):
    """Bits of columns of several sizes, with zeros, and with weights far from the others."""
    w = rng.normal(size=(k, n)) * np.exp2(rng.integers(-20, 1, n))
    w[::9, ::7], w[1, 1], w[2, 2] = 0, 1e4, 1e-30
    return jax.lax.bitcast_convert_type(jnp.asarray(w, jnp.bfloat16), jnp.uint16)


def planes_of(u, spare=5):
    listed = int(float_planes.missing(u, "bfloat16", 4)) + spare
    return float_planes.encode(u, "bfloat16", 4, listed)


def errors(y, x, u, activations="float"):
    """Mean squared and largest errors of y, relative to the exact product."""
    w = np.asarray(jax.lax.bitcast_convert_type(u, jnp.bfloat16), np.float64)
    exact = np.asarray(forms.rounded(x, activations), np.float64) @ w
    off, square = np.asarray(y, np.float64) - exact, np.mean(exact**2, axis=0)
    return np.mean(off**2 / square), np.max(np.abs(off) / np.sqrt(square))


@pytest.mark.parametrize("m, k, n, dtype, activations", CASES)
def test_equals_its_reference(m, k, n, dtype, activations):
    rng = np.random.default_rng([m, k])
    u = drawn(rng, k, n)
    arrays, x = planes_of(u), jnp.asarray(rng.normal(size=(m, k)), dtype)
    assert KERNELS["float_planes_matmul"].serves(x, *arrays, **STATIC) == ""
    run = jax.jit(partial(CALL, activations=activations, blocks=Blocks(-(-m // 8) * 8, 512, 128)))
    y = run(x, *arrays)
    assert_rows_hold(lambda x: run(x, *arrays), x, y)
    assert y.shape == (m, n) and y.dtype == jnp.float32
    mean, largest = errors(y, x, u, activations)
    assert mean < 1e-8 and largest < 1e-3


def test_budget_tells_a_missing_correction():
    rng = np.random.default_rng(0)
    u, x = drawn(rng, 72, 130), jnp.asarray(rng.normal(size=(8, 72)), jnp.bfloat16)
    arrays = planes_of(u)
    y = jax.jit(partial(kernel.provisional, interpret=True))(x, *arrays[:3])
    assert errors(y, x, u)[0] > 1e-3


@pytest.mark.parametrize("spoilt", [jnp.inf, -jnp.inf, jnp.nan])
def test_weights_that_are_not_finite(spoilt):
    """They are listed, and spoil their column alone; columns of nothing else need no list."""
    w = np.random.default_rng(0).normal(size=(64, 20))
    w[3, 5], w[:, 6], w[:, 7] = spoilt, np.nan, 0
    u = jax.lax.bitcast_convert_type(jnp.asarray(w, jnp.bfloat16), jnp.uint16)
    arrays, x = planes_of(u, 0), jnp.ones((8, 64), jnp.bfloat16)
    assert arrays.base[0, 6] > 239 and arrays.where.tolist().count(3 + 5 * 64) == 1
    y = jax.jit(CALL)(x, *arrays)
    expected = reference.OPS["float_planes_matmul"](x.astype(jnp.float32), *arrays, **STATIC)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert not y[:, 7].any()


@pytest.mark.parametrize("far", [1e-38, 2e38])
def test_columns_at_the_ends_of_the_range(far):
    """With escapes, no base lets provisional weights be infinite."""
    w = np.full((64, 2), far)
    w[0] = 1.0
    u = jax.lax.bitcast_convert_type(jnp.asarray(w, jnp.bfloat16), jnp.uint16)
    planes = planes_of(u, 0)
    assert (planes.base >= 16).all() and (planes.base <= 239).all()
    *_, more = float_planes.lacking(planes, **STATIC, k=64, tested=False)
    assert jnp.isfinite(more).all()
    decoded = float_planes.decode(planes, **STATIC, k=64)
    np.testing.assert_array_equal(decoded, u)


def test_what_is_not_served():
    serves = KERNELS["float_planes_matmul"].serves
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    assert "use bits=4" in serves(x, dtype="bfloat16", bits=3)
    assert "float8_e5m2" in serves(x, dtype="float8_e5m2", bits=4)
    assert "int32" in serves(jax.ShapeDtypeStruct((1, 64), jnp.int32), **STATIC)
    assert listed_floats.unfit("bfloat16", 4, "TPU") == ""
