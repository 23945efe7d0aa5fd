"""Two-sided feedback against a NumPy twin, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.rounding import LDLQ, TwoSided
from tests.support.arrays import draw
from tests.support.layer import problem


def output_moment(n=20, seed=5):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(300, n)) @ rng.normal(size=(n, n))
    return (g.T @ g / 300).astype(np.float32)


def two_sided64(w, h, g, step, damping=0.01, output_damping=0.02):
    """Weight by weight, row-major: T = W + (U^T E V - E), from the definition."""
    factor = lambda m, d: (lambda c: c / np.diag(c))(
        np.linalg.cholesky((m / np.mean(np.diag(m)) + d * np.eye(len(m)))[::-1, ::-1])[::-1, ::-1]
    )
    u, v = factor(h.astype(float), damping), factor(g.astype(float), output_damping)
    e, q = np.zeros(w.shape), np.zeros(w.shape)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            target = w[i, j] + u[:, i] @ e @ v[:, j]
            q[i, j] = step * np.clip(np.round(target / step), -7, 7)
            e[i, j] = w[i, j] - q[i, j]
    return q


def loss(w, q, h, g):
    e = np.asarray(w, float) - np.asarray(q, float)
    return np.sum((h @ e) * (e @ g))


METHOD = jq.Method(
    "m", TwoSided(), jq.formats.Integer(4, "tensor", symmetric=True, scale_dtype="float32")
)


def test_it_is_the_definition():
    w, h = problem()
    g = output_moment()
    q = jq.quantize_array(jnp.asarray(w), METHOD, jnp.asarray(h), output_gram=jnp.asarray(g))
    want = two_sided64(w, h, g, float(q.data["scale"].ravel()[0]))
    assert np.mean(np.abs(q.dequantize() - want) < 1e-3) > 0.9  # a tie moves what comes after it
    np.testing.assert_allclose(loss(w, q.dequantize(), h, g), loss(w, want, h, g), rtol=0.05)
    one = jq.Method("m", LDLQ(act_order=False), METHOD.format)
    other = jq.quantize_array(jnp.asarray(w), one, jnp.asarray(h)).dequantize()
    assert loss(w, q.dequantize(), h, g) < 0.7 * loss(w, other, h, g)


@pytest.mark.parametrize(
    "format", [METHOD.format, jq.formats.Trellis((2,), L=8), jq.formats.E8P()], ids=str
)
def test_without_output_correlation_it_is_ldlq(format):
    w, x = draw(32, 32), draw(200, 32, seed=1)
    h = x.T @ x / 200 + 0.3 * jnp.ones((32, 32))
    two = jq.Method("m", TwoSided(), format)
    one = jq.Method("m", LDLQ(act_order=False), format)
    got = jq.quantize_array(w, two, h, output_gram=jnp.eye(32)).dequantize()
    np.testing.assert_allclose(got, jq.quantize_array(w, one, h).dequantize(), atol=1e-5)


def test_output_statistics_are_cotangents():
    """mean of g g^T, stacked layers included, against the explicit sum."""
    p = {"w": draw(3, 8, 8) / 3, "v": draw(8, 5, seed=3)}
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] @ p["v"]
    loss = lambda y, _: jnp.mean(jnp.sin(y))
    x = draw(4, 6, 8, seed=1)
    stats = jq.calibrate(fn, p, x, loss=loss, output=["*"])

    def through(bumps, x):
        h = x
        for i in range(3):
            h = jnp.tanh(h @ p["w"][i] + bumps[i])
        return loss(h @ p["v"], None)

    g = jnp.stack([jnp.stack(jax.grad(through)([jnp.zeros((6, 8))] * 3, one)) for one in x])
    want = jnp.einsum("blti,bltj->lij", g, g) / 24
    np.testing.assert_allclose(stats.output_gram("w"), want, rtol=1e-4, atol=1e-9)
    some = jq.calibrate(fn, p, x, loss=loss, output=["w"])
    np.testing.assert_allclose(some.output_gram("w"), want, rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match=r"no output-side statistics for 'v': pass output=\['v'\]"):
        some.output_gram("v")


def test_bad_input():
    w, h = problem()
    with pytest.raises(ValueError, match="needs output_gram="):
        jq.quantize_array(jnp.asarray(w), METHOD, jnp.asarray(h))
    grouped = jq.Method("m", TwoSided(), jq.formats.Integer(4, 16))
    with pytest.raises(ValueError, match="one scale per matrix"):
        jq.quantize_array(jnp.asarray(w), grouped, jnp.asarray(h), output_gram=jnp.eye(20))
    with pytest.raises(ValueError, match='needs weighting="gradient"'):
        jq.calibrate(lambda p, x: x @ p, jnp.ones((3, 3)), [jnp.ones((2, 3))], output=["*"])
