"""`jax.lax.ragged_dot` of tokens with stacks of packed weights: mixtures of experts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.support.devices import failures_of

E, K, N, M = 4, 128, 96, 13
SIZES = jnp.array([3, 0, 6, 2], jnp.int32)
X = jax.random.normal(jax.random.key(1), (M, K))
OWNERS = np.repeat(np.arange(E), SIZES)


def experts(p, x):
    """Every expert with rows of its own, for calibration."""
    return jnp.einsum("emk,ekn->emn", x, p["w"])


def moe(p, x, sizes=SIZES):
    return jax.lax.ragged_dot(x, p["w"], sizes)


@pytest.fixture(scope="module")
def params():
    return {"w": jax.random.normal(jax.random.key(0), (E, K, N))}


@pytest.fixture(scope="module")
def stats(params):
    rows = jax.random.normal(jax.random.key(2), (E, 64, K))
    return jq.calibrate(experts, params, [rows], sample=64)


def packed(params, stats, method, activations=None):
    if activations is not None:
        method = dataclasses.replace(method, activations=activations)
    return jq.quantize(params, jq.Recipe([("*", method)]), stats)


def one_by_one(q, x=X):
    """The products of the rows with the matrices of their experts, each by itself."""
    alone = jq.quantized(lambda p, x, e: x @ p["w"][e])
    rows = [alone(q, x[i : i + 1], e) for i, e in enumerate(OWNERS)]
    return np.concatenate([*rows, np.zeros((M - len(OWNERS), N))])


def close(y, want, budget=1e-5):
    np.testing.assert_allclose(y, want, atol=budget * np.abs(want).max())


METHODS = {
    "integers": jq.rtn(bits=4, group_size=32),
    "GPTQ": jq.gptq(bits=3, group_size=64),
    "AWQ, scaled inputs": jq.awq(bits=4, group_size=32),
    "NF4": jq.normal_float(),
    "ternary": jq.ternary(),
    "float8": jq.float8(),
    "trellis, rotated on both sides": jq.qtip(bits=2, L=12),
    "E8P, rotated on both sides": jq.quip_sharp(),
    "vector codebooks, without an op": jq.vptq(),
}


@pytest.mark.parametrize("name", METHODS)
def test_rows_meet_the_packed_matrices_of_their_experts(params, stats, name):
    """With transforms of each expert; cotangents too, inside of the function and outside."""
    q = packed(params, stats, METHODS[name])
    w = jq.dequantize(q)["w"]
    close(jax.jit(jq.quantized(moe))(q, X), moe({"w": w}, X))
    said = jq.explain(moe, q, X)
    assert [use.rule for use in said.uses] == ["packed grouped matmul"]
    loss = lambda p, x: jnp.sum(jnp.sin(moe(p, x)))
    want = jax.grad(loss, 1)({"w": w}, X)
    close(jax.jit(jax.grad(jq.quantized(loss), 1))(q, X), want)
    close(jax.jit(jq.quantized(jax.grad(loss, 1)))(q, X), want)


@pytest.mark.parametrize("form", [
    "int8", "int8/256", "float8", "int8,asymmetric", "int4", "int4,asymmetric", "int4,static",
    "int8,asymmetric,static", "int8,top=0.5",
])  # fmt: skip
@pytest.mark.parametrize("name", ["integers", "E8P, rotated on both sides"])
def test_activations_are_rounded_as_for_a_single_expert(params, stats, form, name):
    """Static scales and zero points too, which belong to an expert."""
    q = packed(params, stats, METHODS[name], jq.Activations.of(form))
    y = jax.jit(jq.quantized(moe))(q, X)
    close(y, one_by_one(q))
    spoilt = X.at[12].set(jnp.nan)  # a row of no expert
    np.testing.assert_array_equal(jax.jit(jq.quantized(moe))(q, spoilt), y)


def test_a_wrong_variant_fails(params, stats):
    """The matrices of other experts."""
    q = packed(params, stats, METHODS["integers"])
    y = jq.quantized(moe)(q, X, jnp.roll(SIZES, 1))
    with pytest.raises(AssertionError):
        close(y, one_by_one(q), 1e-1)


def test_explain_says_what_runs(params, stats):
    q = packed(params, stats, METHODS["integers"], jq.Activations.of("int8"))
    for platform in ("cpu", "tpu", "cuda"):
        large = jax.ShapeDtypeStruct((64, K), jnp.float32)
        (use,) = jq.explain(moe, q, large, SIZES, platform=platform).uses
        assert use.path == "w" and use.primitive == "ragged_dot_general"
        assert "packed_matmul, 4-bit words; int8 activations" in use.why
    assert "cpu kernel" in jq.explain(moe, q, X, platform="cpu").uses[0].why
    vectors = packed(params, stats, METHODS["vector codebooks, without an op"])
    assert "one tile of rows after the other" in jq.explain(moe, vectors, X).uses[0].why


def general(x, w, sizes, contract, ragged=0, group=0):
    """A ragged_dot_general of these contracted axes."""
    of = jax.lax.RaggedDotDimensionNumbers((contract, ((), ())), (ragged,), (group,))
    return jax.lax.ragged_dot_general(x, w, sizes, of)


# Name -> how the weight is stored, for which product it is quantized, and the product with it.
LAYOUTS = {
    "tokens along the last axis": (
        lambda w: w, experts,
        lambda p, x: general(x.T, p["w"], SIZES, ((0,), (1,)), ragged=1),
    ),
    "stored the other way round": (
        lambda w: jnp.swapaxes(w, 1, 2),
        lambda p, x: jnp.einsum("emk,enk->emn", x, p["w"]),
        lambda p, x: general(x, p["w"], SIZES, ((1,), (2,))),
    ),
    "experts on the second axis": (
        lambda w: jnp.swapaxes(w, 0, 1),
        lambda p, x: jnp.einsum("emk,ken->emn", x, p["w"]),
        lambda p, x: general(x, p["w"], SIZES, ((1,), (0,)), group=1),
    ),
    "transposed in the function": (
        lambda w: jnp.swapaxes(w, 1, 2),
        lambda p, x: jnp.einsum("emk,enk->emn", x, p["w"]),
        lambda p, x: jax.lax.ragged_dot(x, jnp.swapaxes(p["w"], 1, 2), SIZES),
    ),
    "two axes of columns, in the other order": (
        lambda w: jnp.moveaxis(w.reshape(E, K, 2, N // 2), 3, 1),
        lambda p, x: jnp.einsum("emk,edkh->emhd", x, p["w"]),
        lambda p, x: general(x, p["w"], SIZES, ((1,), (2,))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_weight(params, name):
    stored, site, fn = LAYOUTS[name]
    params = {"w": stored(params["w"])}
    found = jq.sites(site, params, jax.ShapeDtypeStruct((E, 3, K), jnp.float32))
    q = packed(params, found, METHODS["integers"])
    want = fn(jq.dequantize(q), X)
    y = jq.quantized(fn)(q, X)
    assert y.shape == want.shape
    close(y, want)
    assert jq.explain(fn, q, X).materialised == ()


def test_other_products_are_dequantized_and_told(params):
    """Of a weight whose experts are columns, as they were in the function it was quantized for."""
    every = lambda p, x: jnp.einsum("mk,ekn->emn", x, p["w"])
    q = packed(params, jq.sites(every, params, X), METHODS["integers"])
    close(jq.quantized(moe)(q, X), moe(jq.dequantize(q), X))
    assert jq.explain(moe, q, X).materialised == ("w",)


def test_no_rows(params, stats):
    q = packed(params, stats, METHODS["E8P, rotated on both sides"])
    y = jq.quantized(moe)(q, X[:0], jnp.zeros(E, jnp.int32))
    assert y.shape == (0, N)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_those_of_ragged_dot(params, stats, dtype):
    q = packed(jax.tree.map(lambda a: a.astype(dtype), params), stats, METHODS["integers"])
    x = X.astype(dtype)
    assert jq.quantized(moe)(q, x).dtype == moe(jq.dequantize(q), x).dtype == dtype
    wide = lambda p, x: jax.lax.ragged_dot(x, p["w"], SIZES, preferred_element_type=jnp.float32)
    assert jq.quantized(wide)(q, x).dtype == jnp.float32


def test_layers_of_a_scan(params, stats):
    """Weights [layers, experts, k, n], scanned over, with remat."""
    layers = {"w": jnp.stack([params["w"], params["w"][::-1]])}
    found = jq.sites(
        lambda p, x: jnp.einsum("lemk,lekn->lemn", x, p["w"]), layers,
        jax.ShapeDtypeStruct((2, E, 3, K), jnp.float32),
    )  # fmt: skip
    q = packed(layers, found, METHODS["integers"])

    def deep(p, x):
        layer = jax.checkpoint(lambda x, p: jnp.tile(jnp.tanh(moe(p, x)), 2)[:, :K])
        return jax.lax.scan(lambda x, p: (layer(x, p), None), x, p)[0]

    want = deep(jq.dequantize(q), X)
    close(jax.jit(jq.quantized(deep))(q, X), want, 1e-4)
    assert jq.explain(deep, q, X).materialised == ()
    loss = lambda p, x: jnp.sum(deep(p, x) ** 2)
    got = jax.jit(jax.grad(jq.quantized(loss), 1))(q, X)
    close(got, jax.grad(loss, 1)(jq.dequantize(q), X), 1e-4)


def test_gradients_of_scales(params, stats):
    """Those of the dequantized weights, as training of packed weights takes them."""
    q = packed(params, stats, METHODS["integers"])
    scale = q["w"].data["scale"].astype(jnp.float32)

    def loss(dense, scale):
        w = {"w": q["w"].with_named(q["w"].named | {"scale": scale})}
        p = jq.dequantize(w) if dense else w
        return jnp.sum(jnp.sin(jq.quantized(moe)(p, X)))

    got, want = (jax.jit(jax.grad(loss, 1), static_argnums=0)(d, scale) for d in (False, True))
    close(got, want, 1e-4)
    assert math.isfinite(float(jnp.sum(got))) and np.any(got)


EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "model"))
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
params = {"w": jax.random.normal(jax.random.key(0), (8, 64, 32))}
found = jq.sites(lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"]), params,
                 jax.ShapeDtypeStruct((8, 2, 64), jnp.float32))
q = jq.quantize(params, jq.Recipe([("*", jq.rtn(4, 32))]), found)
x, sizes = jax.random.normal(jax.random.key(1), (16, 64)), jnp.array([3, 0, 4, 1, 0, 5, 1, 0])
fn = lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes)
want = jq.quantized(fn)(q, x, sizes)
split = {"w": jax.tree.map(lambda a: put(a, SPEC), q["w"])}
run = jax.jit(jq.quantized(fn))
np.testing.assert_allclose(run(split, put(x, TOKENS), put(sizes)), want, atol=1e-4)
text = run.lower(split, put(x, TOKENS), put(sizes)).compile().as_text()
assert "all-gather" not in text, text
"""


def test_experts_split_over_explicit_axes():
    """Every device multiplies the rows of its own experts; no words are sent."""
    specs = {
        "whole": ("None", "None"),
        "experts": ("'model'", "None"),
        "experts and tokens": ("'model'", "'data'"),
        "two axes": ("('data', 'model')", "None"),
    }
    cases = {
        name: EXPLICIT.replace("SPEC", spec).replace("TOKENS", tokens)
        for name, (spec, tokens) in specs.items()
    }
    assert failures_of(cases, 8) == {}
