"""Every method by name: the units of weights, of statistics and of inputs change no code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.methods.registry import METHODS
from jaxquant.rounding import Nearest
from tests.support.arrays import draw

# What makes one cheap, where its defaults are not.
OPTIONS = {
    "qtip": {"L": 8, "two_sided": True},
    "trellis": {"bits": 2.25, "block": 32, "L": 8},
    "aqlm": {"codebooks": 1, "bits": 4, "sweeps": 1},
    "vptq": {"length": 4, "bits": 4, "residual_bits": 4, "sweeps": 1},
    "entropy_coded": {"bits": 4, "states": 4, "two_sided": True},
    "smoothquant": {"activations": "int8,static"},
    "awq": {"group_size": 32},
    "duquant": {"block": 32, "steps": 4},
}
METHODS_ = [jq.methods.named_method(name, **OPTIONS.get(name, {})) for name in METHODS] + [
    jq.normal_float(2, feedback=True),
    jq.float8("e5m2", 32, feedback=True),
    jq.nvfp4(feedback=True),
    jq.gptq(3, 32, act_order=False, mse=True, scale_dtype="bfloat16"),
    jq.smoothquant(alpha=None, scale_dtype="float32"),
    jq.awq(4, 32, duo=True, feedback=True, scale_dtype="bfloat16"),
    jq.quarot(scale_dtype="float32"),
]
POWERS = 2.0**-99, 2.0**-3, 2.0**66


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 64)) @ rng.normal(size=(64, 64)) * np.exp(rng.normal(size=64))
    g = rng.normal(size=(256, 64)) * np.exp(rng.normal(size=64))
    return draw(64, 64) * 0.1, *(
        jnp.asarray(a, jnp.float32) for a in (x, x.T @ x / 256, g.T @ g / 256)
    )


@pytest.mark.parametrize("method", METHODS_, ids=lambda m: f"{m.name}-{m.format}")
def test_units_change_no_code(method):
    w, x, gram, outputs = problem()
    wants = method.needs_channels or method.needs_sample

    def made(w=w, x=x, gram=gram, outputs=outputs):
        return jq.quantize_array(w, method, gram, output_gram=outputs, inputs=x if wants else None)

    want = made()
    for c in POWERS:
        for other in (made(gram=gram * c), made(outputs=outputs * c)):
            jax.tree.map(np.testing.assert_array_equal, other.data, want.data)
        if wants:
            check_inputs(made(x=x * c), want, c)
        if not method.format.wide and c != 2.0**-3:
            with pytest.raises(ValueError, match="outside the range of float16"):
                made(w * c)
        else:
            np.testing.assert_array_equal(made(w * c).dequantize(), c * want.dequantize())
    loss = lambda q, c=1.0: float(jnp.sum((q.dequantize() / c - w) ** 2))
    for c in (1e-30, 1e30):
        np.testing.assert_allclose(loss(made(gram=gram * c)), loss(want), rtol=0.2)
    if method.format.wide:
        for c in (1e-30, 1e30):
            np.testing.assert_allclose(loss(made(w * c), c), loss(want), rtol=0.2)


def check_inputs(got, want, c):
    """Only a scale that is known beforehand is that of the inputs."""
    for name, a in want.named.items():
        factor = c if name == "activations.scale" else 1
        np.testing.assert_array_equal(got.named[name], a * jnp.asarray(factor, a.dtype))


LATENT = [
    jq.bitnet(activations=None),
    jq.zeroqat(2, scale_dtype="float32"),
    jq.lsq(2, scale_dtype="bfloat16"),
    jq.Method("made", Nearest(), jq.formats.E8P(2)),
]


@pytest.mark.parametrize("method", LATENT, ids=lambda m: m.name)
def test_nor_do_they_of_weights_that_train(method):
    """BitNet's least scale, 1e-5, would make zeros of small weights."""
    w = draw(64, 16)
    frozen = lambda c: jq.freeze(jq.latent({"w": w * c}, method))["w"].dequantize()
    want = frozen(1.0)
    assert jnp.any(want != 0)
    for c in (2.0**-80, 2.0**66):
        np.testing.assert_array_equal(frozen(c), c * want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_half_precision(dtype):
    """As large and as small as the dtype goes; and nothing finite becomes infinite."""
    w, info = draw(64, 32), jnp.finfo(dtype)
    w = (w / jnp.max(jnp.abs(w))).astype(dtype)
    for method in (jq.rtn(), jq.float8(), jq.quip_sharp(4)):
        for c in (min(float(info.max), 1e30), 1.0, max(float(info.tiny), 1e-30)):
            scaled = (w.astype(jnp.float32) * c).astype(dtype)
            if not (method.format.wide or 1e-5 < c < 1e6):
                with pytest.raises(ValueError, match="outside the range of float16"):
                    jq.quantize_array(scaled, method, jnp.eye(64))
                continue
            q = jq.quantize_array(scaled, method, jnp.eye(64))
            error = q.dequantize().astype(jnp.float32) - scaled.astype(jnp.float32)
            assert jnp.max(jnp.abs(error)) < 0.3 * jnp.max(jnp.abs(scaled)), (method.name, c)


def test_what_is_encoded_directly_is_judged_too():
    for format in (
        jq.formats.Integer(4),
        jq.formats.Float8(scale_dtype="float16"),
        jq.formats.Additive(1, 4, 8),
    ):
        for c in (1e-20, 1e20):
            with pytest.raises(ValueError, match="outside the range of float16"):
                format.encode(draw(64, 8) * c)


def test_bits_are_shared_out_by_magnitudes_that_have_no_squares():
    w = jax.random.normal(jax.random.key(0), (32, 32))
    fn = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], -1)
    for c in (1.0, 1e-25, 1e18):
        params = {"a": c * w, "b": 16 * c * w}
        stats = jq.calibrate(fn, params, [jnp.eye(32)], loss=lambda y, x: jnp.sum(y), output=["*"])
        found = jq.ptq.shares(params, stats)
        np.testing.assert_allclose([found["a"], found["b"]], [-2, 2], atol=1e-4)
