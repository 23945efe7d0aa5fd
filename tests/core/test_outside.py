"""Stand-ins outside of jq.quantized: one error that says what to do, and what printing shows."""

import copy
import dataclasses
import pickle
import re
from collections.abc import Iterable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope
from flax import nnx

import jaxquant as jq
from jaxquant.calibration.observed import Observed
from jaxquant.calibration.statistics import Kept

X = jnp.ones((4, 64))
W = jax.random.normal(jax.random.key(0), (64, 64))
PACKED = jq.quantize_array(W, jq.rtn(bits=4))
SAYS = r"^QTensor\(float32\[64, 64\], .*\) stands for a weight and is not an array: wrap the "
SAYS += r"function that uses it, as in jq\.quantized\(fn\)\(params, x\), or unpack it by "
SAYS += r"jq\.dequantize\(params\)(\n|$)"

USES = {
    "x @ w": lambda w: X @ w,
    "w @ x": lambda w: w @ X.T,
    "NumPy x @ w": lambda w: np.ones((4, 64)) @ w,
    "w[0]": lambda w: w[0],
    "w[...]": lambda w: w[...],
    "w[0] = 1": lambda w: w.__setitem__(0, 1),
    "jnp.dot": lambda w: jnp.dot(X, w),
    "jnp.take": lambda w: jnp.take(w, jnp.array([1]), 0),
    "jnp.einsum": lambda w: jnp.einsum("mk,kn->mn", X, w),
    "jnp.sum": lambda w: jnp.sum(w),
    "jnp.linalg.norm": lambda w: jnp.linalg.norm(w),
    "jnp.stack": lambda w: jnp.stack([w, w]),
    "jnp.where": lambda w: jnp.where(w > 0, w, 0),
    "jax.nn.relu": lambda w: jax.nn.relu(w),
    "w * 2": lambda w: w * 2,
    "2 * w": lambda w: 2 * w,
    "w + x": lambda w: w + X[:1],
    "x - w": lambda w: X[:1] - w,
    "w / 2": lambda w: w / 2,
    "w ** 2": lambda w: w**2,
    "-w": lambda w: -w,
    "abs": abs,
    "float": float,
    "bool": bool,
    "len": len,
    "list": list,
    "unpacking": lambda w: [*w],
    "in": lambda w: 3 in w,
    "np.asarray": np.asarray,
    "np.array": lambda w: np.array([w]),
    "np.sum": np.sum,
    "jnp.asarray": jnp.asarray,
}
ATTRIBUTES = ("T", "astype", "reshape", "sum", "at", "mean", "transpose", "tolist", "sharding")


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("name", USES)
def test_a_use_as_an_array_is_one_error(name, jitted):
    use = jax.jit(lambda w: USES[name](w)) if jitted else USES[name]
    with pytest.raises(TypeError, match=SAYS):
        use(PACKED)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_of_arrays_is_the_same_error(name):
    with pytest.raises(AttributeError, match=SAYS):
        getattr(PACKED, name)
    with pytest.raises(AttributeError, match=SAYS):
        jax.jit(lambda w: getattr(w, name))(PACKED)
    assert not hasattr(PACKED, name)


def test_other_attributes_and_failing_properties_keep_their_own_errors():
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        _ = PACKED.colour
    shardings = jax.tree.map(lambda a: a.sharding, PACKED)
    with pytest.raises(AttributeError, match="SingleDeviceSharding' object has no attribute"):
        _ = shardings.shape


def linen(module, *args):
    params = module.init(jax.random.key(0), *args)
    return module.apply, params, args


def nnx_module(module, *args):
    graph, state = nnx.split(module)
    fn = lambda state, *args: nnx.merge(graph, state)(*args)
    return fn, state, args


def equinox(module, *args):
    return lambda module, *args: jax.vmap(module)(*args), module, args


class Scanned(nn.Module):
    """Two layers in a scan."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layer()(x, None)[0]


class Layer(nn.Module):
    """A layer of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(64)(x), None


IDS = jnp.array([1, 2, 3])
MODELS = {
    "linen Dense": lambda: linen(nn.Dense(32), X),
    "linen Embed": lambda: linen(nn.Embed(32, 64), IDS),
    "linen attention": lambda: linen(nn.MultiHeadDotProductAttention(4), X, X),
    "linen scan": lambda: linen(Scanned(), X),
    "NNX Linear": lambda: nnx_module(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), X),
    "NNX Embed": lambda: nnx_module(nnx.Embed(32, 64, rngs=nnx.Rngs(0)), IDS),
    "NNX attention": lambda: nnx_module(
        nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0)), X
    ),
    "Equinox Linear": lambda: equinox(eqx.nn.Linear(64, 32, key=jax.random.key(0)), X),
    "Equinox Embedding": lambda: equinox(eqx.nn.Embedding(32, 64, key=jax.random.key(0)), IDS),
}


def everything(params, found):
    """A recipe of every kernel and table."""
    rules = [(p, jq.rtn(4, -1)) for p, s in found.items() if s.contracted or s.gathered is not None]
    return jq.Recipe([*rules, ("*", jq.KEEP)])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_framework_that_is_called_without_quantized(name):
    fn, params, args = MODELS[name]()
    found = jq.sites(fn, params, *args)
    packed = jq.quantize(params, everything(params, found), found)
    says = SAYS.replace("float32\\[64, 64\\]", "float32.*")
    for call in (fn, eqx.filter_jit(fn)):
        with pytest.raises(TypeError, match=says):
            call(packed, *args)
    want = fn(jq.dequantize(packed), *args)
    for call in (jq.quantized(fn), jax.jit(jq.quantized(fn))):
        np.testing.assert_allclose(call(packed, *args), want, rtol=1e-4, atol=1e-4)


def test_latent_and_observed_weights_say_it_too():
    latent = jq.latent({"w": W}, jq.lsq(bits=4))["w"]
    with pytest.raises(TypeError, match=SAYS):
        X @ latent
    kept = Kept(gram=True, output=False, weighting="uniform", sample=0)
    observed = Observed(W, kept.zeros(64, 64), (-2, -1), 2, (-2,), kept, (64, 64))
    with pytest.raises(TypeError, match=r"^Observed\(float32\[64, 64\]\) stands for a weight"):
        jnp.dot(X, observed)


def test_an_outer_use_does_not_disturb_an_inner_one():
    """What is refused outside is served inside, in the same process and in nested runs."""
    fn = lambda p, x: jnp.dot(x, jnp.asarray(p["w"])) + jnp.take(p["w"], jnp.array([0]), 0)
    want = fn({"w": PACKED.dequantize()}, X)
    np.testing.assert_allclose(jq.quantized(fn)({"w": PACKED}, X), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=SAYS):
        fn({"w": PACKED}, X)
    inner = lambda p, x: jq.quantized(fn)(p, x)
    got = jax.jit(jq.quantized(inner))({"w": PACKED}, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_it_is_still_a_tree_a_value_and_a_shape():
    assert not isinstance(PACKED, Iterable)
    assert jnp.shape(PACKED) == np.shape(PACKED) == PACKED.shape == (64, 64)
    for other in (copy.deepcopy(PACKED), pickle.loads(pickle.dumps(PACKED))):
        assert other == PACKED
        assert other.format == PACKED.format
    assert jax.jit(lambda w: w)(PACKED) == PACKED
    arrays, rest = eqx.partition({"w": PACKED}, eqx.is_array)
    assert eqx.combine(arrays, rest)["w"] == PACKED


# --- what is printed ------------------------------------------------------------------------


def packed_module():
    module = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    fn, state, args = nnx_module(module, X)
    packed = jq.quantize(state, jq.rtn(bits=4), jq.sites(fn, state, *args))
    return nnx.merge(nnx.graphdef(module), packed)


SHORT = "QTensor(float32[64, 64], rtn, Integer(bits=4, group_size=64), 4.312 bits per weight)"


def test_nnx_modules_with_packed_weights_print(capsys):
    module = packed_module()
    for text in (repr(module), str(module), repr(nnx.state(module))):
        assert SHORT in text
    nnx.display(module)
    assert "4.312 bits per weight" in capsys.readouterr().out
    table = re.sub(r"\x1b\[[\d;]*m", "", jq.quantized(nnx.tabulate)(module, X))
    assert "kernel: float32[64,64]" in table
    assert "Total Parameters: 4,160" in table
    assert "Integer(bits=4" in treescope.render_to_text(module)
    assert len(treescope.render_to_html(module)) > 1000


def test_equinox_modules_with_packed_weights_print():
    fn, module, args = equinox(eqx.nn.Linear(64, 64, key=jax.random.key(0)), X)
    packed = jq.quantize(module, jq.rtn(bits=4), jq.sites(fn, module, *args))
    assert f"weight={SHORT}" in repr(packed)


def test_a_packed_weight_prints_its_facts_on_one_line():
    assert repr(PACKED) == SHORT
    rounded = dataclasses.replace(jq.rtn(bits=4, symmetric=True), activations="int8")
    text = repr(jq.quantize_array(W, rounded))
    assert "Integer(bits=4, group_size=64, symmetric=True), int8 inputs, 4.250 bits" in text
    assert repr(jax.eval_shape(lambda: PACKED)) == SHORT
    for of in (lambda a: a.sharding, jnp.shape, lambda a: None):
        assert repr(jax.tree.map(of, PACKED)).startswith("QTensor({'codes': ")


@pytest.mark.parametrize("count", [3, 300])
def test_statistics_print_on_ten_lines(count):
    params = {f"{i:03}": {"w": jnp.eye(8), "bias": jnp.zeros((2, 4))} for i in range(count)}
    params["stack"] = {"w": jnp.stack([jnp.eye(8)] * 3)}

    def fn(p, ids):
        x = jnp.ones((5, 8))
        for name in sorted(p):
            if name != "stack":
                x = x @ p[name]["w"] + p[name]["bias"].reshape(-1)
        chosen = p["stack"]["w"][ids]
        return jnp.einsum("mk,mkn->mn", x, chosen)

    stats = jq.calibrate(fn, params, [jnp.array([0, 0, 1, 1, 2])], gram=count > 3)
    lines = str(stats).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) < 120
    assert lines[0].startswith(
        f"Stats(weights in products: {count + 1}, inputs: {count + 1}, kept:"
    )
    assert ("gram" in lines[0]) == (count > 3)
    assert f"{stats.nbytes:,d} bytes" in lines[0]
    assert re.fullmatch(r"  000/w +\[8, 8\] +5 tokens", lines[1])
    if count == 3:
        assert re.fullmatch(r"  stack/w +\[3, 8, 8\] +1 to 2 tokens", lines[4])
        assert lines[5] == "in no product: 000/bias, 001/bias, 002/bias"
    else:
        assert lines[7] == "  ... and 295 more"
        assert lines[8].endswith("003/bias and 296 more")
