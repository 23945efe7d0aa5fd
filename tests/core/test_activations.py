"""Activation formats: integer products equal float ones of what activations are rounded to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.activations import entered
from pallas_kernels import dispatch
from tests.support.arrays import draw
from tests.support.operands import assert_rows_hold

FORMS = [
    jq.Activations(bits, symmetric, clip)
    for bits, symmetric, clip in itertools.product((8, 4, 2), (True, False), (1.0, 0.9))
]
MORE = ["float", "int8/256", "float8", "int8,static", "int8,asymmetric,static", "int4,mean"]
MORE += ["int8,top=0.5"]
K = 1536
exact = lambda a: np.asarray(a, np.float64)


def massive(m=6, k=K):
    """Rows as an input of a down-projection has them: one with two huge entries, one of zeros."""
    x = np.array(0.06 * draw(m, k))
    x[1, 1229], x[1, 1487], x[2] = 3069, 1093, 0
    return jnp.asarray(x)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integer_products_equal_fake_quantized_ones(form, symmetric, kernels):
    w = jq.quantize_array(draw(K, 48, seed=1), jq.rtn(4, "channel", symmetric=symmetric))
    x, run = massive(), jax.jit(jq.quantized(lambda p, x: x @ p))
    with dispatch.using(kernels):
        y = run(jq.ptq.with_activations(w, form), x)
    want = exact(form.rounded(x, {})) @ exact(w.dequantize())
    assert np.all(np.max(abs(y - want), 1) <= 1e-5 * np.max(abs(want), 1))
    assert not np.any(y[2])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rounding(form):
    """Within half a step where nothing is clipped; zero rows stay so; massive entries are kept."""
    x = draw(5, 64)
    y = form.rounded(x, {})
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale, zero = form.range(low, high)
    assert (
        jnp.all(zero == jnp.round(zero))
        and len(jnp.unique(jnp.round(y[0] / scale[0]))) <= 2**form.bits
    )
    if form.clip == 1:
        slack = 1e-5 if form.symmetric else 0.5  # the zero point is rounded too
        assert jnp.all(abs(x - y) <= scale * (0.5 + slack))
    big = form.rounded(massive(), {})
    assert not np.any(big[2])
    if form.bits == 8 and form.clip == 1:
        np.testing.assert_allclose(big[1, 1229], 3069, rtol=4e-3)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("form", [*FORMS, *map(jq.Activations.of, MORE)], ids=str)
def test_a_row_that_is_not_finite_is_nan_and_no_other(form, kernels):
    """By products and by `rounded`, of few rows and of many: a maximum may pass over NaN."""
    w, x = jq.formats.Integer(4, 16), draw(100, 64)
    weights, data = (
        w.encode(draw(64, 48, seed=1)),
        {"scale": jnp.array([0.02]), "zero": jnp.ones(1)},
    )

    @jax.jit
    def run(x):
        with dispatch.using(kernels):
            rows, kind, leave = entered(form, x, data)
            return leave(w.matmul(rows, weights, kind))

    for m in (1, 9, 100):
        assert_rows_hold(run, x[:m])
        if form is not None and form.by_row:
            assert_rows_hold(lambda x: form.rounded(x, {}), x[:m])


def test_half_of_the_grid_is_lost_without_a_zero_point():
    """One-sided rows: asymmetric codes err a quarter as much; the twin is symmetric."""
    x = jnp.abs(draw(8, 512))
    error = lambda form: float(jnp.mean((form.rounded(x, {}) - x) ** 2))
    assert error(jq.Activations(4, False)) < 0.3 * error(jq.Activations(4))


def test_float8_errs_relatively():
    x = massive()
    y = jq.Activations(floating=True).rounded(x, {})
    normal = jnp.abs(x) > 3069 * 2.0**-14
    assert jnp.all(jnp.where(normal, abs(y - x) <= abs(x) * 2.0**-4, True)) and not np.any(y[2])
    assert jnp.count_nonzero(y[1]) > 2 * jnp.count_nonzero(jq.Activations().rounded(x, {})[1])
    w = jq.ptq.with_activations(jq.quantize_array(draw(K, 32), jq.rtn()), "float8")
    np.testing.assert_allclose(
        jq.quantized(lambda p, x: x @ p)(w, x),
        exact(y) @ exact(w.dequantize()),
        rtol=1e-4,
        atol=2e-3,
    )


def gradient(w, form, x, g):
    run = jq.quantized(lambda p, x: x @ p)
    return jax.grad(lambda x: jnp.sum(g * run(jq.ptq.with_activations(w, form), x)))(x)


@pytest.mark.parametrize("form", ["float8", "int8", "int8/256"])
def test_cotangents_pass_as_if_nothing_was_rounded(form):
    w = jq.quantize_array(draw(64, 32, seed=1), jq.rtn())
    x, g = draw(3, 64), draw(3, 32, seed=2)
    np.testing.assert_allclose(
        gradient(w, form, x, g), gradient(w, None, x, g), rtol=2e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", [f for f in FORMS if f.kernel is None], ids=str)
def test_scales_and_clipping_have_derivatives_and_rounding_has_none(form):
    """Those of scale (x / scale + what rounding adds), clipped."""
    w = jq.quantize_array(draw(64, 32, seed=1), jq.rtn())
    x, g = draw(3, 64), draw(3, 32, seed=2)
    _, _, zero = form.codes(x, {})
    bottom, top = form.limits

    def smooth(x):
        ends = jnp.stack([f(x, 1, keepdims=True) for f in (jnp.min, jnp.max)])
        s, _ = form.range(*ends)
        exact = x / s + jax.lax.stop_gradient(jnp.round(x / s) - x / s)
        return s * (jnp.clip(exact + zero, bottom, top) - zero)

    want = jax.vjp(smooth, x)[1](g @ w.dequantize().T)[0]
    np.testing.assert_allclose(gradient(w, form, x, g), want, rtol=1e-3, atol=1e-4)


def test_weights_of_one_input_are_one_call():
    p = {"a": draw(64, 32), "b": draw(64, 48, seed=1)}
    fn = lambda p, x: (x @ p["a"], x @ p["b"])
    x = draw(3, 64, seed=2)
    q = jq.quantize(p, jq.rtn(symmetric=True), jq.sites(fn, p, x))
    form = jq.Activations(8, symmetric=False)
    got = jax.jit(jq.quantized(fn))(jq.ptq.with_activations(q, form), x)
    for y, w in zip(got, q.values(), strict=True):
        np.testing.assert_allclose(y, form.rounded(x, {}) @ w.dequantize(), rtol=1e-4, atol=1e-4)


def test_explain_says_what_is_multiplied():
    q = {"w": jq.quantize_array(draw(64, 32), jq.rtn())}
    said = str(
        jq.explain(
            lambda p, x: x @ p["w"], jq.ptq.with_activations(q, "int8,asymmetric"), draw(3, 64)
        )
    )
    assert "int8,asymmetric activations, integer product, zero points by row sums" in said


@pytest.mark.parametrize("form", ["int4,mean", "int8,top=0.5"])
def test_forms_of_bitnet_a48(form):
    """Their formulas, in integers; and derivatives as if nothing was rounded or masked."""
    w = jq.quantize_array(draw(64, 32, seed=1), jq.rtn())
    x, g, how = draw(3, 64).at[1, 5].set(40.0), draw(3, 32, seed=2), jq.Activations.of(form)
    if how.mean:
        step = np.sqrt(7) / np.mean(np.abs(x), 1, keepdims=True)
        want = np.clip(np.round(x * step), -8, 7) / step
        assert np.min(want * step) == pytest.approx(-8) or np.max(want * step) == pytest.approx(7)
    else:
        kept = np.abs(x) >= np.sort(np.abs(x), 1)[:, 32:33]
        step = 127 / np.max(np.abs(x), 1, keepdims=True)
        want = np.round(np.where(kept, x, 0) * step) / step
        assert np.all(np.sum(want != 0, 1) <= 32)
    np.testing.assert_allclose(how.rounded(x, {}), want, rtol=1e-5, atol=1e-6)
    y = jq.quantized(lambda p, x: x @ p)(jq.ptq.with_activations(w, form), x)
    np.testing.assert_allclose(y, want @ np.asarray(w.dequantize()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        gradient(w, form, x, g), gradient(w, None, x, g), rtol=2e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "text",
    [
        "float",
        "float8",
        "int8",
        "int8/256",
        "int4,asymmetric,clip=0.9",
        "int8,static",
        "int3",
        "int4,mean",
        "int8,top=0.5",
    ],
)
def test_texts(text):
    form = jq.Activations.of(text)
    assert ("float" if form is None else str(form)) == text
    assert jq.Activations.of(form) == form


@pytest.mark.parametrize(
    "bad, message",
    [
        ("int9", "must be 2 to 8, got 9"),
        ("codes", "activations must be"),
        ("int4,clip=2", r"clip must be in \(0, 1\]"),
        ("int4/256", 'per="block" needs symmetric codes'),
        ("int8,clip", "activations must be"),
        ("int8,top=0", r"top must be in \(0, 1\]"),
        ("int8,static,mean", "mean and top need symmetric codes"),
        ("int8/128", "activations must be"),
        (8, "activations must be"),
    ],
)
def test_bad_forms(bad, message):
    with pytest.raises(ValueError, match=message):
        jq.Activations.of(bad)
    with pytest.raises(ValueError, match=message):
        jq.methods.named_method("rtn", activations=bad)


def test_static_scales_are_not_made_up():
    q = {"w": jq.quantize_array(draw(64, 32), jq.rtn())}
    with pytest.raises(ValueError, match="static scales are computed from statistics"):
        jq.ptq.with_activations(q, "int8,static")


def test_nothing_is_rounded_without_a_form():
    x = draw(2, 8)
    rows, form, leave = entered(None, x, {})
    assert rows is x and form == "float" and leave(x) is x
