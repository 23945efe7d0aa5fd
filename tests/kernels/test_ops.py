"""Ops whatever serves them: what they reject, derivatives, batches, overrides."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import jaxquant as jq
import pallas_kernels as pk
from pallas_kernels import activations, dispatch
from pallas_kernels.codecs import layout
from tests.support.arrays import draw
from tests.support.operands import CASES, SPOILT, assert_only_nan, decoded, operands, spoilt

every_op = pytest.mark.parametrize("case", CASES)
K, N = 384, 48
FEW, MANY = 9, 100  # rows; tests share them, since each number of rows is compiled for


@every_op
@pytest.mark.parametrize("form", ["float", "int8"])
def test_the_product_is_that_of_the_decoded_matrix(case, form):
    op, arrays, static = operands(case, K, N)
    w = np.asarray(decoded(op, arrays, static, K))
    x = draw(MANY, K, seed=1)
    y = getattr(pk, op)(x, *arrays, **static, activations=form)
    assert (y.shape, y.dtype) == ((MANY, N), jnp.float32)
    want = np.asarray(activations.rounded(x, form)) @ w
    # Beside integers, native kernels take the values of a table as 16-bit integers.
    budget = 2e-4 if op == "codebook_matmul" and form == "int8" else 2e-6
    np.testing.assert_allclose(y, want, atol=budget * np.abs(want).max())


ONE_OF_EACH_OP = {operands(case, K, N)[0]: case for case in CASES}


class WithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*ONE_OF_EACH_OP.items())
    def test_products_and_cotangents(self, case):
        """Those of the decoded matrix, whether the caller's program is compiled or not."""
        op, arrays, static = operands(case, K, N)
        w = decoded(op, arrays, static, K)
        x, g = draw(FEW, K, seed=1), draw(FEW, N, seed=2)

        @self.variant
        def run(x, g, arrays):
            y, back = jax.vjp(lambda x: dispatch.product(op, x, *arrays, **static), x)
            return y, *back(g)

        chex.assert_trees_all_close(run(x, g, arrays), (x @ w, g @ w.T), rtol=1e-4, atol=1e-4)


@every_op
def test_integer_activations_round_x_and_no_more(case):
    """A scale per token; the twin, a scale per 256 channels, gives another result."""
    op, arrays, static = operands(case, 3 * K, N)
    x = draw(4, 3 * K, seed=1) * jnp.geomspace(0.1, 10, 3 * K)
    y = {form: dispatch.product(op, x, *arrays, **static, activations=form) for form in FORMS}
    near = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    assert 1e-4 < near(y["int8/256"], y["float"]) < near(y["int8"], y["float"]) < 0.04


FORMS = ("float", "int8", "int8/256")


@every_op
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_row_that_is_not_finite_is_nan_and_no_other(case, kernels):
    """Few rows and many, which take other ways; and of cotangents. `test_cpu` has more of them."""
    op, arrays, static = operands(case, K, N)
    x, g = draw(MANY, K, seed=1), draw(FEW, N, seed=2)
    inputs = x, jnp.clip(jnp.round(40 * x), -127, 127), g
    product = lambda x, form: dispatch.product(op, x, *arrays, **static, activations=form)

    @jax.jit  # one program: of each form, few rows and many; and the cotangent
    def run(x, codes, g):
        forms = itertools.product(activations.FORMS, (1, MANY))
        y = [product((codes if form == "codes" else x)[:m], form) for form, m in forms]
        return *y, *jax.vjp(partial(product, form="float"), x[:FEW])[1](g)

    with dispatch.using(kernels):
        clean = run(*inputs)
        for rows in SPOILT:
            wrong = run(*(spoilt(a, rows) for a in inputs))
            for y, held in zip(wrong, clean, strict=True):
                assert_only_nan(y, held, rows)


@every_op
@pytest.mark.parametrize("form", ["float", "int8"])
def test_a_scale_that_is_no_number_spoils_its_weights_and_no_others(case, form):
    op, arrays, static = operands(case, K, N)
    x = draw(MANY, K, seed=1)
    run = lambda m, *a: dispatch.product(op, x[:m], *a, **static, activations=form)
    clean = {m: run(m, *arrays) for m in (1, MANY)}
    for i, a in enumerate(arrays):
        if a is None or not jnp.issubdtype(a.dtype, jnp.floating):
            continue
        wrong = [*arrays[:i], a.at[(-1,) * a.ndim].set(jnp.nan), *arrays[i + 1 :]]
        w = decoded(op, wrong, static, K)
        columns = np.flatnonzero(np.isnan(w).any(0))
        for m, y in clean.items():
            assert_only_nan(run(m, *wrong).T, y.T, columns)


@every_op
def test_cotangents_are_those_of_the_decoded_matrix(case):
    op, arrays, static = operands(case, K, N)
    x, g = draw(FEW, K, seed=1), draw(FEW, N, seed=2)
    is_float = lambda a: a is not None and jnp.issubdtype(a.dtype, jnp.floating)
    floats = [i for i, a in enumerate(arrays) if is_float(a)]

    def merged(some):
        found = dict(zip(floats, some, strict=True))
        return [found.get(i, a) for i, a in enumerate(arrays)]

    def got(x, some):
        return jnp.sum(g * dispatch.product(op, x, *merged(some), **static))

    def want(x, some):
        w = decoded(op, merged(some), static, K)
        return jnp.sum(g * (x @ w))

    some = [arrays[i].astype(jnp.float32) for i in floats]
    for a, b in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f, (0, 1)))(x, some)) for f in (got, want)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1e-3, float(jnp.abs(b).max())) + 1e-12)


def test_integers_have_no_cotangent():
    op, arrays, static = operands("packed 2 bits, zero points", K, N)
    loss = lambda *a: jnp.sum(dispatch.product(op, *a, **static))
    d = jax.grad(loss, (1, 3), allow_int=True)(draw(2, K), *arrays)
    assert [a.dtype for a in d] == [jax.dtypes.float0] * 2


def test_the_gradient_is_straight_through_the_rounding_of_x():
    op, arrays, static = operands("packed 4 bits", K, N)
    grad = lambda form: jax.grad(
        lambda x: jnp.sum(dispatch.product(op, x, *arrays, **static, activations=form))
    )(draw(2, K))
    np.testing.assert_allclose(grad("int8"), grad("float"), rtol=1e-6)


@every_op
def test_experts_are_a_batch(case):
    """vmap over x and weights, and over x alone."""
    op, arrays, static = operands(case, K, N)
    other = operands(case, K, N, seed=1)[1]
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), arrays, other)
    x = draw(2, FEW, K)
    run = lambda x, *a: dispatch.product(op, x, *a, **static)
    want = jnp.stack([run(x[0], *arrays), run(x[1], *other)])
    np.testing.assert_allclose(jax.vmap(run)(x, *both), want, rtol=1e-5, atol=1e-5)
    alone = jax.vmap(lambda x: run(x, *arrays))(x)
    np.testing.assert_allclose(alone[0], want[0], rtol=1e-5, atol=1e-5)


@every_op
@pytest.mark.parametrize("kernels", ["auto", "cpu", "reference"])
def test_an_empty_product_is_empty(case, kernels):
    """No rows, or no columns (of words, scales and packed zero points); gradients too."""
    op, arrays, static = operands(case, K, N)
    x = draw(2, K)
    none = [a if a is None or a.ndim != 2 or a.shape[-1] == 1 else a[..., :0] for a in arrays]
    with dispatch.using(kernels):
        for rows, matrix, shape in ((x[:0], arrays, (0, N)), (x, none, (2, 0))):

            @jax.jit
            def run(x, matrix=matrix):
                y, back = jax.vjp(lambda x: dispatch.product(op, x, *matrix, **static), x)
                return y, *back(y)

            y, dx = run(rows)
            assert (y.shape, y.dtype) == (shape, jnp.float32)
            np.testing.assert_array_equal(dx, np.zeros(rows.shape))


def packed(**changes):
    given = {
        "x": draw(2, 64), "codes": jnp.zeros((8, 16), jnp.int32), "scale": jnp.ones((2, 16)),
        "zero": None, "bits": 4, "group_size": 32,
    } | changes  # fmt: skip
    return lambda: pk.packed_matmul(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (packed(x=draw(2, 60)), "codes must have|group_size 32 does not divide k = 60"),
        (packed(x=draw(64)), r"x must be \[m, k\]"),
        (packed(x=np.ones((2, 64))), "x must be .* got float64"),
        (packed(x=jnp.ones((2, 64), int)), "x must be .* got int32"),
        (packed(codes=jnp.zeros((7, 16), jnp.int32)), "codes must have 8 words per column, got 7"),
        (packed(codes=jnp.zeros((8, 16), jnp.int8)), "codes must be int32 words"),
        (packed(scale=jnp.ones((3, 16))), r"scale must be \[2, 16\]"),
        (packed(scale=jnp.ones((2, 16), int)), "scale must be .* got int32"),
        (packed(zero=jnp.zeros((2, 16), jnp.int32)), r"zero must be int32 \[2, 2\]"),
        (packed(group_size=48), "group_size 48 does not divide k = 64"),
        (packed(group_size=0), "group_size must be positive"),
        (packed(bits=5), "bits must be one of"),
        (packed(activations="int4"), "activations must be one of"),
        (
            lambda: pk.codebook_matmul(
                draw(2, 64), jnp.zeros((8, 4), jnp.int32), jnp.ones((1, 4)), table=(0.0, 1.0),
                bits=4, group_size=64,
            ),
            "table must have 16 values",
        ),
        (
            lambda: pk.codebook_matmul(
                draw(2, 64), jnp.zeros((4, 4), jnp.int32), jnp.ones((1, 4)),
                table=(0.0, 1.0, np.nan, 2.0), bits=2, group_size=64,
            ),
            "table must have finite values",
        ),
        (
            lambda: pk.e8p_matmul(
                draw(2, 60), jnp.zeros((4, 4), jnp.int32), None, jnp.ones((1, 1)), bits=2
            ),
            "x has k = 60 channels, but E8P codes cover 8 rows",
        ),
        (
            lambda: pk.e8p_matmul(
                draw(2, 64), jnp.zeros((4, 4), jnp.int32), None, jnp.ones((1, 1)), bits=3
            ),
            "2 without a residual, or 3 or 4 with one",
        ),
        (
            lambda: pk.trellis_matmul(
                draw(2, 40), jnp.zeros((32, 4), jnp.int32), jnp.ones((1, 1)), rates=(2,), L=12,
                code="mul1",
            ),
            "blocks of trellis tiles cover 16 rows",
        ),
        (
            lambda: pk.trellis_matmul(
                draw(2, 32), jnp.zeros((32, 4), jnp.int32), jnp.ones((1, 1)), rates=(2,), L=12,
                code="magic",
            ),
            "code must be one of",
        ),
        (
            lambda: pk.additive_matmul(
                draw(2, 64), jnp.zeros((4, 4), jnp.int32), jnp.ones((2, 255, 8)), jnp.ones((1, 4)),
                bits=8, group=8,
            ),
            r"codebooks must be \[M, 256, 8\]",
        ),
        (lambda: jq.quantized(lambda p: p, kernels="magic")({}), "kernels must be one of"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_short_last_group_must_be_asked_for():
    codes, scale = layout.pack(jnp.ones((40, 8), int), 4), jnp.ones((2, 8))
    y = pk.packed_matmul(jnp.ones((1, 40)), codes, scale, bits=4, group_size=32, pad=True)
    assert y.tolist() == [[40.0] * 8]


def test_overrides_name_what_serves():
    x, params = draw(2, K), {"w": jq.quantize_array(draw(K, N), jq.rtn(4))}
    fn = lambda p, x: x @ p["w"]
    plain = jq.quantized(fn, kernels="reference")(params, x)
    np.testing.assert_allclose(jq.quantized(fn)(params, x), plain, atol=1e-4)
    served = str(jq.explain(fn, params, x, platform="rocm"))
    assert "packed_matmul, 4-bit words; reference (XLA): there are no kernels for rocm" in served
