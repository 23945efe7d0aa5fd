"""Derivatives of estimators: each equals its written formula, by differences of its surrogate.

Where every rounding R(u) is u + c, with c held at what it is, the rounded weight is a smooth
function; its central differences, in float64, are what a backward rule has to give.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.estimators.weight_estimators import scaled_gradient, stepped
from jaxquant.rounding import Nearest
from tests.support.arrays import draw

F32 = {"scale_dtype": "float32"}
# A format, its estimator, and the ends of the inside in steps where no zero point moves them.
LEARNED = [
    (jq.formats.Integer(2, 16, symmetric=True, **F32), jq.estimators.LSQ(), (-2, 1)),
    (jq.formats.Integer(3, 16, symmetric=True, **F32), jq.estimators.LSQ(), (-4, 3)),
    (jq.formats.Integer(4, -1, symmetric=True, **F32), jq.estimators.LSQ(), (-8, 7)),
    (jq.formats.Integer(8, "tensor", symmetric=True, **F32), jq.estimators.LSQ(), (-128, 127)),
    (jq.formats.Integer(2, 16, **F32), jq.estimators.LSQ(), None),
    (jq.formats.Integer(4, 16, **F32), jq.estimators.LSQ(), None),
    (jq.formats.Ternary(group_size=16, **F32), jq.estimators.LSQ(), (-1, 1)),
    (jq.formats.NormalFloat(4, 16), jq.estimators.LSQ(), (-1, 1)),
    (jq.formats.Float8("e4m3", 16), jq.estimators.LSQ(), (-448, 448)),
    (jq.formats.Stretched(16, **F32), jq.estimators.StretchedElastic(), (-0.99, 0.99)),
    (jq.formats.Ternary(group_size=16, **F32), jq.estimators.StretchedElastic(), (-1.485, 1.485)),
]
learned = pytest.mark.parametrize("format, estimator, ends", LEARNED, ids=str)


def at(format, shape=(32, 6), squeeze=0.5):
    """Weights, and the scales and zero points of a narrower matrix: a part of them is beyond."""
    w = draw(*shape, seed=3)
    arrays = jq.estimators.LSQ().start(w, format, format.encode(w * squeeze))
    return w, arrays


def spread(a, format, k):
    rows = format.rows_per_group(k)
    return np.repeat(np.asarray(a, np.float64), rows, axis=0)[:k]


def surrogate(format, ends, w, scale, zero, base):
    """The rounded weights at (w, scale, zero), roundings held at those of `base`, in float64."""
    k = w.shape[0]
    s, s0 = (spread(a, format, k) for a in (scale, base[1]))
    if ends is not None:
        clip = lambda v: np.clip(v, ends[0] - EDGE, ends[1] + EDGE)
        v0 = np.asarray(base[0] / s0, np.float32)
        level = format.level(jnp.asarray(v0), jnp.zeros(()))
        c = np.asarray(level, np.float64) - clip(np.asarray(base[0], np.float64) / s0)
        return s * (clip(w / s) + c)
    z, z0 = (spread(a, format, k) for a in (zero, base[2]))
    c = np.round(base[0] / s0) - base[0] / s0
    cz = np.round(z0) - z0
    bottom, top = format.limits
    return s * (np.clip(w / s + c + z + cz, bottom - EDGE, top + EDGE) - (z + cz))


EDGE = 2e-6  # what lies at an end is inside
LEARNED_BY = {(f, ends): e for f, e, ends in LEARNED}


@learned
def test_derivatives_are_those_of_the_surrogate(format, estimator, ends):
    w, arrays = at(format)
    cotangent = draw(*w.shape, seed=4)
    value = lambda w, arrays: jnp.sum(cotangent * estimator.value(w, arrays, format))
    dw, of = jax.grad(value, (0, 1))(w, arrays)
    base = [np.asarray(a, np.float64) for a in (w, arrays["scale"], arrays.get("zero", 0))]
    g = np.asarray(cotangent, np.float64)
    total = lambda *at: np.sum(g * surrogate(format, ends, *at, base), dtype=np.float64)
    h = 1e-8

    def difference(i, index):
        low, high = ([a.copy() for a in base] for _ in range(2))
        high[i][index] += h
        low[i][index] -= h
        return (total(*high) - total(*low)) / (2 * h)

    inside = estimator.value(w, arrays, format) * 0 + jax.grad(value)(w, arrays) / cotangent
    assert 0.05 < float(jnp.mean(inside == 0)) < 0.7  # both branches are there
    for index in [(0, 0), (5, 1), (9, 3), (17, 2), (31, 5)]:
        np.testing.assert_allclose(dw[index], difference(0, index), rtol=1e-4, atol=1e-6)
    factor = estimator._factor(format, w.shape)
    shape = arrays["scale"].shape
    for index in np.ndindex(*shape) if shape[1] > 1 else [(0, 0)]:
        want = difference(1, index)
        np.testing.assert_allclose(of["scale"][index], factor * want, rtol=2e-4, atol=1e-4)
        if "zero" in arrays:
            want = difference(2, index)
            np.testing.assert_allclose(of["zero"][index], want, rtol=1e-4, atol=1e-4)


def test_a_clip_that_shares_out_ties_is_seen():
    """The twin: `jnp.clip` after rounding halves the derivative of every first and last code."""
    format = jq.formats.Integer(2, 16, **F32)
    w, arrays = at(format, squeeze=1.0)
    ours = jax.grad(lambda w: jnp.sum(jq.estimators.LSQ().value(w, arrays, format)))(w)

    def halved(w):
        s, z = (spread(arrays[n], format, 32).astype(np.float32) for n in ("scale", "zero"))
        v = w / s
        return jnp.sum(s * (jnp.clip(v + jax.lax.stop_gradient(jnp.round(v) - v) + z, -2, 1) - z))

    theirs = jax.grad(halved)(w)
    assert float(jnp.mean(theirs == 0.5)) > 0.2 and not float(jnp.mean(ours == 0.5))


@pytest.mark.parametrize(
    "estimator", [jq.estimators.StraightThrough(), jq.estimators.AbsMean()], ids=str
)
def test_straight_through_is_the_identity_everywhere(estimator):
    format = jq.formats.Ternary(group_size="tensor")
    w = draw(32, 6) * 10
    g = jax.grad(lambda w: jnp.sum(draw(32, 6, seed=1) * estimator.value(w, {}, format)))(w)
    np.testing.assert_array_equal(g, draw(32, 6, seed=1))


def test_clipped_is_the_identity_inside():
    format = jq.formats.Integer(3, 16, symmetric=True, clip=0.6)
    w = draw(32, 6)
    g = jax.grad(
        lambda w: jnp.sum(jq.estimators.StraightThrough(clipped=True).value(w, {}, format))
    )(w)
    v = w / jnp.repeat(format.grids(w).scale, 16, axis=0)
    np.testing.assert_array_equal(g, (v >= -4) & (v <= 3))
    assert 0 < float(jnp.mean(g == 0)) < 0.5


def published(format, estimator, s, w, zero=None):
    w = jnp.asarray(w, jnp.float32)
    one = jnp.ones(w.shape, jnp.float32)
    z = jnp.full(w.shape, zero, jnp.float32) if zero is not None else jnp.zeros(())
    value, back = jax.vjp(lambda *a: stepped((format, estimator), *a), w, s * one, z)
    return value, back(one)


def test_published_examples():
    """Vectors of the papers' own programs."""
    three = jq.formats.Integer(3, -1, symmetric=True)
    w = [-1.30, -0.52, -0.26, -0.11, 0, 0.07, 0.26, 0.44, 0.90]
    value, (dw, ds, _) = published(three, jq.estimators.LSQ(), 0.2, w)
    np.testing.assert_allclose(value / 0.2, [-4, -3, -1, -1, 0, 0, 1, 2, 3], atol=1e-5)
    np.testing.assert_allclose(dw, [0, 1, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(ds, [-4, -0.4, 0.3, -0.45, 0, -0.35, -0.3, -0.2, 3], atol=1e-5)
    # EfficientQAT: codes 0 to 3 with zero point 2 are ours, less 2.
    value, (dw, ds, dz) = published(
        jq.formats.Integer(2, -1), jq.estimators.LSQ(), 0.2, [-0.15, 0.9], zero=0
    )
    np.testing.assert_allclose(value, [-0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(ds, [-0.25, 1], atol=1e-5)
    np.testing.assert_allclose(dz, [0, -0.2], atol=1e-6)
    # ParetoQ, of a range of one: whole at 2 bits, thirds at 1.58.
    w = [-1.2, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 1.2]
    elastic = jq.estimators.StretchedElastic()
    value, _ = published(jq.formats.Stretched(), elastic, 1.0, w)
    np.testing.assert_allclose(value, [-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75])
    ties = [-0.5, -0.0, 0.0, 0.5]  # its code: (round(2 w - 1/2) + 1/2) / 2, halves to even
    code = (np.round(2 * np.array(ties) - 0.5) + 0.5) / 2
    np.testing.assert_array_equal(code, [-0.75, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(published(jq.formats.Stretched(), elastic, 1.0, ties)[0], code)
    value, (_, ds, _) = published(jq.formats.Ternary(), elastic, 2 / 3, w)
    np.testing.assert_allclose(value * 3 / 2, [-1, -1, -1, 0, 0, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(ds[jnp.array([0, -1])], [-1, 1])
    released = jq.estimators.StretchedElastic(released=True)
    _, (_, ds, _) = published(jq.formats.Ternary(), released, 2 / 3, w)
    np.testing.assert_allclose(ds[jnp.array([0, -1])], [-1.5, 1.5])  # times 2/3: one of the range
    _, (_, ds, _) = published(jq.formats.Stretched(), released, 1.0, w)
    np.testing.assert_allclose(ds[jnp.array([0, -1])], [-0.75, 0.75])


def test_the_range_is_closed_a_hundredth_early():
    """With 1.0 a weight at the end of the range would be rounded a level past the last."""
    value, (dw, _, _) = published(
        jq.formats.Stretched(), jq.estimators.StretchedElastic(), 1.0, [0.985, 0.995, 1.0]
    )
    np.testing.assert_allclose(value, 0.75)
    np.testing.assert_allclose(dw, [1, 0, 0])


@pytest.mark.parametrize("bits, optimum", [(2, 1.097), (3, 0.609), (4, 0.338)])
def test_a_scale_alone_finds_the_least_error(bits, optimum):
    """All three branches at work; measured in PyTorch terms in the reference notes."""
    format = jq.formats.Integer(bits, "tensor", symmetric=True, scale_dtype="float32")
    w, estimator = draw(4096, 4), jq.estimators.LSQ(scale_gradient="none")
    loss = lambda s: jnp.mean((estimator.value(w, {"scale": s}, format) - w) ** 2)
    step = jax.jit(lambda s: s - 0.3 * jax.grad(loss)(s))
    scale = jnp.full((1, 1), 0.8)
    for _ in range(200):
        scale = step(scale)
    assert float(scale[0, 0]) == pytest.approx(optimum, rel=0.03)


def test_where_scales_begin():
    w = draw(64, 8)
    four = jq.formats.Integer(4, 16, symmetric=True)
    groups = np.abs(w).reshape(4, 16, 8)
    mean = jq.estimators.LSQ("mean").start(w, four, four.encode(w))["scale"]
    np.testing.assert_allclose(mean, 2 * groups.mean(1) / np.sqrt(7), rtol=1e-5)
    top = jq.estimators.LSQ("range").start(w, four, four.encode(w))["scale"]
    np.testing.assert_allclose(top, groups.max(1) / 7, rtol=1e-5)
    elastic = jq.estimators.StretchedElastic()
    thirds = jq.formats.Ternary(group_size=-1)
    found = elastic.start(w, thirds, thirds.encode(w))["scale"]
    np.testing.assert_allclose(found, np.abs(w).max(0, keepdims=True) / 1.5, rtol=1e-5)


def test_gradient_factors():
    """1 / sqrt(weights of a step x largest code), or of the matrix."""
    four = jq.formats.Integer(4, 16, symmetric=True)
    assert jq.estimators.LSQ()._factor(four, (64, 8)) == pytest.approx((16 * 7) ** -0.5)
    assert jq.estimators.LSQ(scale_gradient="matrix")._factor(four, (64, 8)) == pytest.approx(
        (512 * 7) ** -0.5
    )
    whole = jq.formats.Integer(4, "tensor", symmetric=True)
    assert jq.estimators.LSQ()._factor(whole, (64, 8)) == pytest.approx((512 * 7) ** -0.5)
    assert float(jax.grad(lambda x: scaled_gradient(x, 0.25))(2.0)) == 0.25


def test_stochastic_rounding_is_right_on_average():
    """Its mean is the weight, its variance a sixth of a step squared on average."""
    p = jq.latent({"w": draw(64, 16)}, jq.ste(4, 64, symmetric=True, stochastic=True))
    rounded = jax.jit(jax.vmap(lambda key: _under(key, p)))(
        jax.random.split(jax.random.key(1), 400)
    )
    scale = jnp.repeat(p["w"].format.format.grids(draw(64, 16)).scale, 64, axis=0)
    error = (rounded - draw(64, 16)) / scale
    inside = jnp.abs(draw(64, 16)) < 0.8 * jnp.max(jnp.abs(draw(64, 16)), axis=0)
    assert float(jnp.mean(inside)) > 0.8
    mean = jnp.where(inside, jnp.mean(error, axis=0), 0)
    assert float(jnp.max(jnp.abs(mean))) < 5 * 0.5 / 20
    assert float(jnp.mean(jnp.where(inside, error**2, 1 / 6))) == pytest.approx(1 / 6, rel=0.03)
    nearest = jq.freeze(p)["w"].dequantize()
    np.testing.assert_array_equal(nearest, p["w"].dequantize())  # without a key: what is served


def _under(key, p):
    with jq.estimators.randomness(key):
        return p["w"].dequantize()


@pytest.mark.parametrize(
    "method, message",
    [
        (
            jq.Method("a", Nearest(), jq.formats.E8P(2), estimator=jq.estimators.LSQ()),
            "need a format with levels",
        ),
        (
            jq.Method(
                "a",
                Nearest(),
                jq.formats.NormalFloat(4, 16, double_quant=True),
                estimator=jq.estimators.LSQ(),
            ),
            "use ste",
        ),
        (
            jq.Method("a", Nearest(), jq.formats.Integer(4), estimator=jq.estimators.LSQ("mean")),
            "zero point",
        ),
        (
            jq.Method("a", Nearest(), jq.formats.Integer(4), estimator=jq.estimators.AbsMean()),
            "Ternary",
        ),
        (
            jq.Method(
                "a", Nearest(), jq.formats.Integer(4), estimator=jq.estimators.StretchedElastic()
            ),
            "Stretched",
        ),
        (
            jq.Method(
                "a",
                Nearest(),
                jq.formats.MXFP4(),
                estimator=jq.estimators.StraightThrough(stochastic=True),
            ),
            "stochastic=True needs an integer format",
        ),
        (
            jq.Method(
                "a",
                Nearest(),
                jq.formats.E8P(2),
                estimator=jq.estimators.StraightThrough(clipped=True),
            ),
            "clipped=True needs a format with levels",
        ),
    ],
)
def test_a_format_that_an_estimator_does_not_train(method, message):
    with pytest.raises(ValueError, match=message):
        jq.latent({"w": draw(64, 64)}, method)


@pytest.mark.parametrize("bad", [{"init": "best"}, {"scale_gradient": "rows"}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match="must be one of"):
        jq.estimators.LSQ(**bad)


def test_bits_that_have_no_stretched_codes():
    with pytest.raises(ValueError, match=r"1\.58, 2, 3 or 4"):
        jq.stretched_elastic(5)
