"""What methods do where there are no values to look at: under `jax.jit`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.sites import Site
from tests.support.arrays import draw

K, N = 64, 32
SPREAD = jnp.logspace(-1, 1, K)
W, X = draw(K, N) * SPREAD[:, None], draw(256, K, seed=1) * SPREAD
METHODS = {
    "rtn": jq.rtn(4, 16),
    "doubly quantized": jq.normal_float(4, 16, double_quant=True),
    "mxfp4": jq.mxfp4(),
    "float8": jq.float8(),
    "aqlm": jq.aqlm(sweeps=1),
    "searched": jq.awq(group_size=16),
    "static": jq.smoothquant(activations="int8,static"),
}
PLANNED = {bits: jq.trellis(bits, block=16, L=8) for bits in (2, 1.5)}


def quantized(method):
    return lambda w, x: jq.quantize_array(w, method, x.T @ x / len(x), inputs=x)


def loss(q):
    e = W - q.dequantize()
    return float(jnp.sum((X @ e) ** 2) / jnp.sum((X @ W) ** 2))


@pytest.mark.parametrize("name", METHODS)
def test_traced_methods_do_the_same_and_nan_stays_nan(name):
    """Of weights or inputs with one NaN or infinity all is NaN, integers too."""
    make = quantized(METHODS[name])
    traced = jax.jit(make)
    np.testing.assert_allclose(loss(traced(W, X)), loss(make(W, X)), rtol=1e-3)
    for bad in (jnp.nan, jnp.inf):
        assert bool(jnp.isnan(traced(W.at[3, 4].set(bad), X).dequantize()).all())
        assert bool(jnp.isnan(traced(W, X.at[5, 6].set(bad)).dequantize()).all())


@pytest.mark.parametrize("bits", PLANNED)
def test_rates_planned_from_values_have_none_when_traced(bits):
    """Uniform rates, which lose several times as much, are no answer; shapes are."""
    make = quantized(PLANNED[bits])
    planned = make(W, X)
    shapes = jax.eval_shape(make, W, X)
    assert shapes.bits_per_weight == planned.bits_per_weight
    assert bool(jnp.isnan(jax.jit(make)(W, X).dequantize()).all())
    twin = jq.Method(
        "uniform", PLANNED[bits].rounder, jq.formats.TrellisBudget(bits, 16, 8).planned(np.ones(4)),
        PLANNED[bits].input, PLANNED[bits].output,
    )  # fmt: skip
    assert loss(quantized(twin)(W, X)) > 2 * loss(planned)


def test_stacks_are_judged_matrix_by_matrix():
    stack = jnp.stack([W, W.at[3, 4].set(jnp.nan)])
    found = {"w": Site("w", stack.shape, contracted=(1,), batch=(0,))}
    q = jax.jit(lambda p: jq.quantize(p, jq.rtn(4, 16), found))({"w": stack})["w"].dequantize()
    assert bool(jnp.isfinite(q[0]).all())
    assert bool(jnp.isnan(q[1]).all())
    by_vmap = jax.vmap(lambda w: jq.quantize_array(w, jq.rtn(4, 16)).dequantize())(stack)
    np.testing.assert_array_equal(by_vmap, q)


@dataclasses.dataclass(frozen=True)
class Spoils(jq.rounding.Rounder):
    """A rounder that makes the second matrix it meets into infinities."""

    def __call__(self, w, format, moments, key=None):
        data = format.encode(w)
        bad = jnp.sum(w) > 0
        data["scale"] = jnp.where(bad, jnp.inf, data["scale"]).astype(data["scale"].dtype)
        return data, {"damping": jnp.float32(0), "dead": jnp.int32(0)}


def test_a_matrix_that_is_not_finite_is_refused_by_name():
    method = jq.Method("spoils", Spoils(), jq.formats.Integer(4, 16))
    kept = {}
    tree = {"layers": {"w": jnp.stack([-jnp.abs(W), jnp.abs(W)])}}
    found = {"layers/w": Site("layers/w", (2, *W.shape), contracted=(1,), batch=(0,))}
    with pytest.raises(
        ValueError, match=r"layers/w\[1\]: spoils turned finite weights into .* not finite"
    ):
        jq.quantize(tree, method, found, finished=kept)
    assert list(kept) == ["layers/w[0]"]
    with pytest.raises(ValueError, match="w: spoils turned"):
        jq.quantize_array(jnp.abs(W), method)
