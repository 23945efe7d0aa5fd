"""Products that share an input: one native call on the CPU, and the same numbers as one by one."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.ptq.layer_stacks import layers_of
from pallas_kernels.cpu import native
from tests.support.compiling import compilations
from tests.support.lowering import lowered_text

REASON = native.load()
needs_native = pytest.mark.skipif(
    bool(REASON) or jax.default_backend() != "cpu", reason=f"no native kernels: {REASON}"
)
METHODS = {
    "integers": jq.rtn(bits=4, group_size=32),
    "integers, int8": dataclasses.replace(jq.rtn(bits=2, group_size=64), activations="int8"),
    "NF4": jq.normal_float(),
    "ternary": jq.ternary(),
    "trellis, rotated": jq.qtip(bits=2, L=12),
    "E8P, rotated": jq.quip_sharp(),
}


def apart(params, x):
    """Two weights read x, and two, one after the other, what becomes of it."""
    return x @ params["q"], x @ params["k"], (jnp.sin(x) @ params["v"]) @ params["o"]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": (128, 128), "k": (128, 64), "v": (128, 64), "o": (64, 128)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def qk(p, x):
    return x @ p["q"], x @ p["k"]


X = jax.random.normal(jax.random.key(1), (3, 128))


def packed(params, method, fn=apart):
    stats = jq.calibrate(fn, params, [X]) if method.needs_gram else jq.sites(fn, params, X)
    return jq.quantize(params, jq.Recipe([("*", method)]), stats)


def calls(fn, *args):
    text = lowered_text(jq.quantized(fn), *args, platform="cpu")
    return len(re.findall(r"custom_call @jaxquant_\w+", text))


@pytest.mark.parametrize("name", METHODS)
def test_one_call_is_the_products_one_by_one(params, name):
    q = packed(params, METHODS[name])
    got = jq.quantized(apart)(q, X)
    alone = {n: jq.quantized(lambda w, x: x @ w)(q[n], X) for n in ("q", "k")}
    for y, n in zip(got, alone, strict=False):
        np.testing.assert_allclose(y, alone[n], atol=2e-6 * float(jnp.abs(y).max()))
    assert q["q"].shared == q["k"].shared != q["v"].shared != q["o"].shared
    if not REASON:
        assert calls(apart, q, X) == 3
        assert calls(lambda p, x: (x @ p["q"], (x + 1) @ p["k"]), q, X) == 2  # not one input


@needs_native
def test_cotangents_are_those_of_the_products_one_by_one(params):
    q = packed(params, METHODS["integers"])

    def loss(fn):
        return lambda x: sum(jnp.sum(jnp.cos(y)) for y in fn(q, x))

    one_by_one = lambda p, x: tuple(jq.quantized(lambda w, x: x @ w)(p[n], x) for n in ("q", "k"))
    both = jq.quantized(lambda p, x: (x @ p["q"], x @ p["k"]))
    np.testing.assert_allclose(
        jax.grad(loss(both))(X), jax.grad(loss(one_by_one))(X), rtol=1e-5, atol=1e-5
    )
    rows = jax.vmap(lambda x: both(q, x[None]))(X)
    np.testing.assert_allclose(rows[0][:, 0], both(q, X)[0], rtol=1e-5, atol=1e-5)


@needs_native
def test_weights_stored_the_other_way_round_are_in_the_same_call(params):
    fn = lambda p, x: (x @ p["q"], jnp.einsum("mk,nk->mn", x, p["k"]))
    turned = {"q": params["q"], "k": params["k"].T}
    q = packed(turned, METHODS["integers"], fn)
    assert calls(fn, q, X) == 1
    for y, want in zip(jq.quantized(fn)(q, X), fn(jq.dequantize(q), X), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@needs_native
def test_explain_says_so(params):
    q = packed(params, METHODS["integers"])
    why = {use.path: use.why for use in jq.explain(apart, q, X, platform="cpu").uses}
    assert "one call for 2" in why["q"] and "one call for 2" in why["k"]
    assert "one call" not in why["v"] + why["o"]
    tpu = {use.path: use.why for use in jq.explain(apart, q, X, platform="tpu").uses}
    assert "one call" not in tpu["q"]


def test_the_layers_of_a_stack_share_within_each(params):
    def stacked(params, x):
        def layer(x, p):
            return jnp.tanh(x @ p["q"] + jnp.tile(x @ p["k"], 2)), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    def in_turn(params, x):
        for p in layers_of(params, "layers"):
            x = jnp.tanh(x @ p["q"] + jnp.tile(x @ p["k"], 2))
        return x

    # An eighth, so that layers without a norm do not carry the last bit of a sum far: 70-fold else.
    params = {"layers": {n: jnp.stack([params[n] / 8] * 3) for n in ("q", "k")}}
    q = packed(params, METHODS["integers"], stacked)
    cut = jq.ptq.unstack(q, "layers")
    names = [layer[n].shared for layer in layers_of(cut, "layers") for n in ("q", "k")]
    assert names[0::2] == names[1::2] and len(set(names)) == 3
    whole = jq.ptq.restack(cut, "layers")
    assert jax.tree.structure(whole) == jax.tree.structure(q)
    np.testing.assert_allclose(
        jq.quantized(in_turn)(cut, X), jq.quantized(stacked)(q, X), rtol=1e-5, atol=1e-5
    )
    if not REASON:
        assert calls(in_turn, cut, X) == 3


def test_two_models_that_read_one_input_do_not_mix_their_transforms(params):
    """Names are equal, for each model is quantized by itself; the transforms are not."""
    rotated = dataclasses.replace(METHODS["integers"], input=jq.transforms.Rotation())
    in_blocks = dataclasses.replace(METHODS["integers"], input=jq.transforms.Rotation(block=32))
    one, other = packed(params, rotated), packed(params, in_blocks)
    assert one["q"].shared == other["q"].shared
    both = jq.quantized(lambda a, b, x: (x @ a["q"], x @ b["q"]))(one, other, X)
    for y, q in zip(both, (one, other), strict=True):
        np.testing.assert_allclose(
            y, jq.quantized(lambda q, x: x @ q["q"])(q, X), rtol=1e-5, atol=1e-4
        )


@needs_native
def test_trees_that_were_quantized_one_by_one_share_nothing(params):
    """Their names are equal, and so are their inputs' shapes; in one call they would meet one x."""
    layers = [
        packed({n: params[n] + i for n in ("q", "k")}, METHODS["integers"], qk) for i in (0, 1)
    ]
    lone = [jq.quantize_array(params[n], METHODS["integers"]) for n in ("q", "k", "o")]
    lone.append(jq.quantize_array(params["q"][:64], METHODS["integers"]))
    assert len({w.shared for w in lone}) == 1

    def alone(ws, x):
        return [x[:, : w.shape[0]] @ w for w in ws]

    def deep(layers, x):
        for p in layers:
            y = qk(p, x)
            x = jnp.tanh(y[0]) + jnp.tile(y[1], 2)
        return x

    for fn, ws, count in ((deep, layers, 4), (alone, lone, 4)):
        dense = jax.tree.map(
            lambda w: w.dequantize(), ws, is_leaf=lambda w: isinstance(w, jq.QTensor)
        )
        got, want = jq.quantized(fn)(ws, X), fn(dense, X)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
        assert calls(fn, ws, X) == count


@pytest.mark.parametrize("kind", ["smoothquant", "awq", "flatquant"])
def test_transforms_that_were_fitted_one_by_one_are_not_mixed(params, kind):
    """Of weights with equal names that read one input: each its own, to the last array."""
    rows = X * jnp.exp2(jax.random.randint(jax.random.key(2), (3, 128), -3, 4))
    method = {"smoothquant": jq.smoothquant(), "awq": jq.awq(4), "flatquant": jq.flatquant(4)}[kind]
    ws = [
        jq.quantize_array(params[n], method, inputs=i * rows)
        for n, i in (("q", 1), ("k", 3), ("v", 9))
    ]
    got = jq.quantized(lambda ws, x: [x @ w for w in ws])(ws, rows)
    for y, w in zip(got, ws, strict=True):
        want = jq.quantized(lambda w, x: x @ w)(dataclasses.replace(w, shared=""), rows)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def test_static_scales_of_two_trees_are_not_mixed(params):
    static = jq.smoothquant(alpha=0.5, activations="int8,static")
    trees = []
    for size in (1.0, 100.0):
        stats = jq.calibrate(qk, {n: params[n] for n in "qk"}, [size * X], sample=8)
        trees.append(jq.quantize({n: params[n] for n in "qk"}, static, stats))
    a, b = trees
    assert a["q"].shared == a["k"].shared != b["q"].shared
    got = jq.quantized(lambda a, b, x: (x @ a["q"], x @ b["k"]))(a, b, X)
    for y, w in zip(got, (a["q"], b["k"]), strict=True):
        want = jq.quantized(lambda w, x: x @ w)(dataclasses.replace(w, shared=""), X)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@needs_native
def test_what_was_compiled_once_serves_calls_outside_of_jit(params):
    q = packed(params, METHODS["integers"])
    run = lambda: jq.quantized(apart)(q, X)
    run()
    with compilations() as compiled:
        jax.block_until_ready([run() for _ in range(3)])
    assert compiled == []


def test_formats_without_an_op_of_their_own_are_served_one_by_one(params):
    q = packed(params, jq.entropy_coded(bits=2))
    assert q["q"].shared == q["k"].shared
    for y, want in zip(jq.quantized(apart)(q, X), apart(jq.dequantize(q), X), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_layers_of_which_one_is_kept_are_stacked_decoded(params):
    stack = {"layers": {"q": jnp.stack([params["q"]] * 2)}}
    one_kept = jq.Recipe([("layers/1/q", METHODS["integers"]), ("*", jq.KEEP)])
    mixed = jq.quantize(jq.ptq.unstack(stack, "layers"), one_kept)
    assert jq.ptq.restack(mixed, "layers")["layers"]["q"].shape == (2, 128, 128)


def test_weights_that_share_codes_and_not_scales_are_two(params):
    a = packed(params, METHODS["integers"])["q"]
    b = dataclasses.replace(a, data=a.data | {"scale": 2 * a.data["scale"]})
    y, twice = jq.quantized(lambda a, b, x: (x @ a, x @ b))(a, b, X)
    np.testing.assert_allclose(2 * y, twice, rtol=1e-5)
