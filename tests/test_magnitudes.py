"""Every method by name: the units of weights, of statistics and of inputs change no code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.methods import METHODS

from .test_dispatch import draw

# What makes one cheap, where its defaults are not.
OPTIONS = {
    "qtip": {"L": 8, "two_sided": True},
    "trellis": {"bits": 2.25, "block": 32, "L": 8},
    "aqlm": {"codebooks": 1, "bits": 4, "sweeps": 1},
    "vptq": {"length": 4, "bits": 4, "residual_bits": 4, "sweeps": 1},
    "entropy_coded": {"bits": 4, "states": 4, "two_sided": True},
    "smoothquant": {"static": True},
    "awq": {"group_size": 32},
    "duquant": {"block": 32, "steps": 4},
}
METHODS_ = [jq.named_method(name, **OPTIONS.get(name, {})) for name in METHODS] + [
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
    for name, a in want.data.items():
        factor = c if name == "activations.scale" else 1
        np.testing.assert_array_equal(got.data[name], a * jnp.asarray(factor, a.dtype))
