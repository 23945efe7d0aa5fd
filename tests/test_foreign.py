"""Parts from outside the package: a format, a transform and a rounder, through the whole library.

They are what a user would write by the docstring of `jaxquant.core.protocols`, and no more. The
format is in the contract suite of formats too, by its line in FORMATS of test_formats.py.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import storage
from jaxquant.storage import checkpoint

from .foreign import Coarse, Reversal, SignLog

K, N = 64, 32


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@pytest.fixture(scope="module")
def model():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (K, N)), "down": jax.random.normal(keys[1], (N, K))}
    x = jax.random.normal(keys[2], (128, K)) * jnp.exp(jnp.linspace(0, 2, K))
    return params, x, jq.calibrate(fn, params, [x])


def methods():
    ldlq = jq.gptq().rounder
    return {
        "format": jq.Method("sign_log", jq.rtn().rounder, SignLog()),
        "format, feedback": jq.Method("sign_log", ldlq, SignLog()),
        "transform": jq.Method("reversed", ldlq, jq.Integer(4, 16), input=Reversal()),
        "rounder": jq.Method("coarse", Coarse(), jq.Integer(4, 16)),
        "all": jq.Method("mine", Coarse(), SignLog(), Reversal(), Reversal(0.5)),
    }


@pytest.mark.parametrize("name", methods())
def test_a_method_of_foreign_parts_quantizes_serves_and_is_kept(model, name, tmp_path):
    params, x, stats = model
    q = jq.quantize(params, methods()[name], stats)
    want = fn(jq.dequantize(q), x)
    chex.assert_trees_all_close(jax.jit(jq.quantized(fn))(q, x), want, rtol=1e-4, atol=1e-4)
    error = jnp.linalg.norm(q["up"].dequantize() - params["up"]) / jnp.linalg.norm(params["up"])
    assert 0.01 < error < 0.35
    assert "packed matmul" in str(jq.explain(fn, q, x))
    recipe = jq.Recipe([("*", methods()[name])])
    checkpoint.save(tmp_path / "c", q, recipe=recipe)
    assert storage.stored_recipe(tmp_path / "c") == recipe
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "c"), q)


def test_feedback_serves_a_foreign_format(model):
    """Less of the output is lost than by rounding to nearest; the twin, no correlation, ties."""
    params, x, stats = model
    lost = {}
    for name in ("format", "format, feedback"):
        w = jq.quantize(params, methods()[name], stats)["up"].dequantize()
        lost[name] = float(jnp.sum((x @ (w - params["up"])) ** 2))
    assert lost["format, feedback"] < 0.9 * lost["format"]
    nearest, fed = (
        jq.quantize_array(params["up"], methods()[name], jnp.eye(K)).dequantize()
        for name in ("format", "format, feedback")
    )
    np.testing.assert_array_equal(nearest, fed)


def test_a_foreign_format_trains_and_freezes(model):
    params, x, _ = model
    p = jq.latent(params, methods()["format"])
    np.testing.assert_array_equal(
        p["up"].dequantize(), jq.quantize(params, methods()["format"])["up"].dequantize()
    )
    slope = jax.grad(jq.quantized(lambda p, x: jnp.sum(fn(p, x) ** 2)))(p, x)
    assert bool(jnp.any(slope["up"].data["codes"] != 0))
    frozen = jq.freeze(p)
    assert frozen["up"].format == SignLog()
    chex.assert_trees_all_equal(jq.quantized(fn)(frozen, x), jq.quantized(fn)(p, x))


def test_healing_moves_the_scales_that_a_foreign_format_names(model):
    params, x, _ = model
    q = jq.quantize(params, methods()["format"])
    healed = jq.heal(fn, q, params, np.asarray(x).reshape(16, 8, K), jq.Healing(steps=3))
    np.testing.assert_array_equal(healed["up"].data["codes"], q["up"].data["codes"])
    assert not np.array_equal(healed["up"].data["scale"], q["up"].data["scale"])


def test_what_is_no_part_is_told_what_it_lacks():
    class Mine:
        def encode(self, w):
            return {}

    with pytest.raises(ValueError, match=r"a Mine is no Format: derive it .* and define decode$"):
        jq.Method("mine", jq.rtn().rounder, Mine())
    with pytest.raises(ValueError, match=r"input must be a Transform .* or None, got 3; an int"):
        jq.Method("mine", jq.rtn().rounder, jq.Integer(), input=3)

    @dataclasses.dataclass(frozen=True)
    class Partial(jq.Format):
        def encode(self, w):
            return {}

    with pytest.raises(TypeError, match="decode"):
        Partial()


def test_names_are_taken_once():
    @dataclasses.dataclass(frozen=True)
    class Integer(jq.Rounder):
        def __call__(self, w, format, moments, key=None):
            return format.encode(w), {}

    with pytest.raises(ValueError, match="the name 'Integer' is taken by jaxquant.formats"):
        jq.register(Integer)
    with pytest.raises(ValueError, match="frozen=True"):
        jq.register(type("Loose", (jq.Rounder,), {}))
    assert jq.register(SignLog) is SignLog
