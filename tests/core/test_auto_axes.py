"""Packed weights on meshes with Auto axes, whose splits are given; eight CPU devices."""

import pytest

from tests.support.devices import failures_of

SETUP = """
import dataclasses, re
import equinox as eqx
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.cpu import native
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
w = jax.random.normal(jax.random.key(0), (256, 256)) / 16
x = jax.random.normal(jax.random.key(1), (8, 256))
fn = lambda p, x: jnp.tanh(x @ p["w"])
q = {"w": jq.quantize_array(w, jq.rtn(4, 32))}

def served(fn, q, x, *spec, data_axes=("data",), gathers=""):
    at = {"w": jq.core.packed_sharding(q["w"], mesh, P(*spec))}
    run = jq.quantized(fn, shardings=at, data_axes=data_axes)
    q = jax.device_put(q, at)
    text = jax.jit(run).lower(q, x).compile().as_text()
    if native.load() == "":
        assert "jaxquant_packed" in text
        uses = jq.explain(run, q, x).uses
        assert uses and all("cpu kernel" in use.why for use in uses), uses
        assert not any("cpu kernel" in use.why for use in jq.explain(fn, q, x).uses)
    moved = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\\(", line)]
    if gathers == "none":
        assert not moved, moved
    results = [line.split(" = ")[1] for line in moved]
    big = re.compile(r"\\(?(f32|bf16)\\[(256,256|128,256|256,128)")
    assert not any(map(big.match, results)), moved
    if gathers == "words":
        assert any("s32[" in line for line in moved), moved
    y = jax.jit(run)(q, x)
    return y

want = jq.quantized(fn)(q, x)
"""
CASES = {
    "tokens": 'y = served(fn, q, put(x, "data"), gathers="none")',
    "columns": 'y = served(fn, q, put(x), None, "model", gathers="none")',
    "tokens and columns": 'y = served(fn, q, put(x, "data"), None, "model", gathers="none")',
    "rows": 'y = served(fn, q, put(x, "data"), "model", gathers="none")',
    "rows and channels": 'y = served(fn, q, put(x, "data", "model"), "model", gathers="none")',
    "fully sharded": 'y = served(fn, q, put(x, "data"), "data", gathers="words")',
    "two axes": 'y = served(fn, q, put(x, "data"), "data", "model", gathers="words")',
    "an axis of tokens, then another": """
for spec in ((("data", "model"),), (("model", "data"),), (None, ("data", "model")),
             (None, ("model", "data"))):
    y = served(fn, q, put(x, "data"), *spec, gathers="words")
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
""",
    "parts of a stack": """
stack = jax.random.normal(jax.random.key(0), (4, 256, 256)) / 16
each = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
sites = jq.sites(each, {"w": stack}, jnp.ones((4, 2, 256)))
q = jq.quantize({"w": stack}, jq.rtn(4, 32), sites)
at = {"w": jq.core.packed_sharding(q["w"], mesh, P("model", None, "data"))}
for pick in (lambda w: w[jnp.array([0, 2, 3])], lambda w: w[:3], lambda w: w[1:2]):
    fn = lambda p, x: jnp.einsum("mk,ekn->emn", x, pick(p["w"]))
    want = jq.quantized(fn)(q, x)
    y = jax.jit(jq.quantized(fn, shardings=at))(jax.device_put(q, at), put(x))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
""",
    "options that are given in turn": """
at = {"w": jq.core.packed_sharding(q["w"], mesh, P(None, "model"))}
run = jq.quantized(fn, shardings=at)
assert jq.quantized(run) is run
slow = jq.quantized(run, kernels="reference")
assert "requested" in str(jq.explain(slow, q, x))
assert "shard_map" in str(jax.make_jaxpr(slow)(q, x))
loss = jax.grad(jq.quantized(lambda p, x: jnp.sum(fn(p, x) ** 2)), 1)
assert len(jq.explain(loss, q, x).uses) == 2  # the product, and that of the derivative
try:
    jax.jit(jq.quantized(lambda p, x: run(p, x)))(q, x)
    raise SystemExit("accepted")
except ValueError as error:
    assert "give them to the outermost" in str(error), error
y = want
""",
    "a shard_map over some axes": """
at = {"w": jq.core.packed_sharding(q["w"], mesh, P(None, "model"))}
run = jq.quantized(fn, shardings=at, data_axes=("data",))
of = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"),
                   axis_names={"data"}, check_vma=False)
y = jax.jit(of)(jax.device_put(q, at), put(x, "data"))
""",
    "axes that split no weight": 'y = served(fn, q, put(x, "data"), None, "model", data_axes=None)',
    "three tokens do not divide": """
x, want = x[:3], want[:3]
y = served(fn, q, put(x), None, "model")
""",
    "activations": """
rounded = dataclasses.replace(jq.rtn(4, 32), activations=jq.Activations.of("int8"))
q = {"w": jq.quantize_array(w, rounded)}
want = jq.quantized(fn)(q, x)
y = served(fn, q, put(x, "data"), "model", gathers="words")
""",
    "a rotated input": """
q = {"w": jq.quantize_array(w, dataclasses.replace(jq.rtn(4, 32), input=jq.transforms.Rotation()))}
want = jq.quantized(fn)(q, x)
y = served(fn, q, put(x, "data"), None, "model")
""",
    "layers of a scan": """
stack = jax.random.normal(jax.random.key(0), (3, 256, 256)) / 16
fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(fn, {"w": stack}, x))
want = jq.quantized(fn)(q, x)
y = served(fn, q, put(x, "data"), None, None, "model")
np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
y = served(fn, q, put(x, "data"), None, "model")
np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
y = served(fn, q, put(x, "data"), None, "data", "model", gathers="words")
""",
    "experts": """
stack = jax.random.normal(jax.random.key(0), (4, 256, 128)) / 16
x = jax.random.normal(jax.random.key(1), (4, 8, 256))
fn = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(fn, {"w": stack}, x))
want = jq.quantized(fn)(q, x)
gathers = "none" if jax.__version_info__ >= (0, 11) else ""  # of x, before that
y = served(fn, q, put(x, "model"), "model", gathers=gathers)
""",
    "experts of ragged_dot": """
stack = jax.random.normal(jax.random.key(0), (8, 64, 32)) / 8
x, sizes = jax.random.normal(jax.random.key(1), (48, 64)), jnp.array([5, 0, 7, 9, 3, 0, 20, 2])
dense = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(dense, {"w": stack}, jnp.ones((8, 4, 64))))
fn = lambda p, x: jnp.tanh(jax.lax.ragged_dot(x, p["w"], sizes))
want = fn(jq.dequantize(q), x)
slope = jax.grad(lambda x: jnp.sum(fn(jq.dequantize(q), x) ** 2))(x)
for spec, gathers in ((("model",), "none"), ((None,), "none"), (("model", "data"), "words")):
    y = served(fn, q, put(x, "data"), *spec, gathers=gathers)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    assert y.sharding.spec[0] == "data", y.sharding
    at = {"w": jq.core.packed_sharding(q["w"], mesh, P(*spec))}
    run = jq.quantized(fn, shardings=at, data_axes=("data",))
    loss = lambda x, q: jnp.sum(run(q, x) ** 2)
    got = jax.jit(jax.grad(loss))(put(x, "data"), jax.device_put(q, at))
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-4)
""",
    "experts whose matrices are split too": """
mesh = jax.make_mesh((2, 2, 2), ("data", "model", "expert"), axis_types=(AxisType.Auto,) * 3)
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
stack = jax.random.normal(jax.random.key(0), (8, 64, 32)) / 8
x, sizes = jax.random.normal(jax.random.key(1), (48, 64)), jnp.array([5, 0, 7, 9, 3, 0, 20, 2])
dense = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
sites = jq.sites(dense, {"w": stack}, jnp.ones((8, 4, 64)))
fn = lambda p, x: jnp.tanh(jax.lax.ragged_dot(x, p["w"], sizes))
plain = jq.rtn(4, 32)
rounded = dataclasses.replace(plain, activations=jq.Activations.of("int8"))
turned = dataclasses.replace(plain, input=jq.transforms.Rotation())
for rule, spec, data_axes, gathers in (
    (plain, ("expert", "data", "model"), (), "none"),
    (plain, ("expert", "data", "model"), ("data",), "words"),
    (rounded, ("expert", None, "model"), ("data",), "none"),
    (rounded, ("expert", "model"), ("data",), "words"),  # a token's scale belongs to its whole row
    (turned, ("expert", None, "model"), (), "none"),
    (turned, ("expert", "data"), (), "words"),  # and so does its rotation
):
    q = jq.quantize({"w": stack}, rule, sites)
    want = jq.quantized(fn)(q, x)
    y = served(fn, q, put(x, *data_axes), *spec, data_axes=data_axes, gathers=gathers)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
""",
    "gradients": """
loss = lambda q, x: jnp.sum(fn(q, x) ** 2)
want = jax.grad(jq.quantized(loss), 1)(q, x)
for spec in ((None, "model"), ("data",), ("data", "model"), ()):
    at = {"w": jq.core.packed_sharding(q["w"], mesh, P(*spec))}
    of = jq.quantized(loss, shardings=at, data_axes=("data",))
    y = jax.jit(jax.grad(of, 1))(jax.device_put(q, at), put(x, "data"))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
""",
    "adapters": """
q = jq.adapt(q, jq.adapters.LoRA(4), key=jax.random.key(3))
q = {"w": q["w"].with_named(q["w"].named | {"lora_b": 0.1 + 0 * q["w"].named["lora_b"]})}
loss = lambda p, x: jnp.sum(jnp.sin(fn(p, jnp.tanh(fn(p, x)))))
train, rest = eqx.partition(q, jq.trained(q, "lora_a", "lora_b"))
both = lambda t, r, x, of: of(eqx.combine(t, r), x)
want = jax.jit(jax.grad(both), static_argnums=3)(train, rest, x, jq.quantized(loss))
want = jnp.concatenate([a.ravel() for a in jax.tree.leaves(want)])
for spec in ((None, "model"), ("data", "model"), ("model", None), ()):
    at = {"w": jq.core.packed_sharding(q["w"], mesh, P(*spec))}
    of = jq.quantized(loss, shardings=at, data_axes=("data",))
    of_t, of_r = eqx.partition(jax.device_put(q, at), jq.trained(q, "lora_a", "lora_b"))
    run = jax.jit(jax.grad(both), static_argnums=3)
    text = run.lower(of_t, of_r, put(x, "data"), of).compile().as_text()
    calls = re.findall(r'custom_call_target="(jaxquant\\w+)"', text)
    assert native.load() or len(calls) >= 2, calls
    y = run(of_t, of_r, put(x, "data"), of)
    y = jnp.concatenate([a.ravel() for a in jax.tree.leaves(y)])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
""",
    "adapters in a scan that is computed again": """
stack = jax.random.normal(jax.random.key(0), (3, 256, 256)) / 16
layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
fn = lambda p, x: jax.lax.scan(layer, x, p["w"])[0]
q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(fn, {"w": stack}, x))
q = jq.adapt(q, jq.adapters.LoRA(4), key=jax.random.key(3))
loss = lambda p, x: jnp.sum(jnp.sin(fn(p, x)))
train, rest = eqx.partition(q, jq.trained(q))
both = lambda t, r, x, of: of(eqx.combine(t, r), x)
flat = lambda tree: jnp.concatenate([a.ravel() for a in jax.tree.leaves(tree)])
want = flat(jax.jit(jax.grad(both), static_argnums=3)(train, rest, x, jq.quantized(loss)))
at = {"w": jq.core.packed_sharding(q["w"], mesh, P(None, "data", "model"))}
of = jq.quantized(loss, shardings=at, data_axes=("data",))
of_t, of_r = eqx.partition(jax.device_put(q, at), jq.trained(q))
run = jax.jit(jax.grad(both), static_argnums=3)
text = run.lower(of_t, of_r, put(x, "data"), of).compile().as_text()
calls = re.findall(r'custom_call_target="(jaxquant\\w+)"', text)
assert native.load() or len(calls) >= 2, calls  # forward and transposed
y = flat(run(of_t, of_r, put(x, "data"), of))
""",
    "from the stand-ins": """
at = {"w": jq.core.packed_sharding(q["w"], mesh, P(None, "model"))}
lying = jax.device_put(q, at)
run = jax.jit(lambda x: jq.quantized(fn)(lying, x))  # not an argument, so its sharding is known
assert native.load() or "jaxquant_packed" in run.lower(put(x, "data")).compile().as_text()
y = run(put(x, "data"))
np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
y = jq.quantized(fn)(lying, put(x, "data"))
""",
    "bad input": """
at = {"w": jq.core.packed_sharding(q["w"], mesh, P(None, "model"))}
for of, error in (
    (jq.quantized(fn, shardings=[at]), "must be that of the first argument"),
    (jq.quantized(fn, shardings=at, data_axes=("batch",)), "has no axes ['batch']"),
    (jq.quantized(fn, shardings=jax.tree.map(lambda s: s.spec, at)), "expected a NamedSharding"),
):
    try:
        of(q, x)
        raise SystemExit("accepted")
    except ValueError as found:
        assert error in str(found), found
heads = {"w": jnp.zeros((64, 3, 32))}
sites = jq.sites(lambda p, x: jnp.einsum("mk,khd->mhd", x, p["w"]), heads, jnp.ones((2, 64)))
apart = jq.quantize(heads, jq.rtn(4, 32), sites)
try:
    jq.core.packed_sharding(apart["w"], mesh, P(None, "data"))
    raise SystemExit("accepted")
except ValueError as found:
    assert "an axis of length 3 cannot be split over the 2 devices" in str(found), found
other = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
try:
    with jax.set_mesh(other):
        jq.quantized(fn, shardings=at)(q, x)
    raise SystemExit("accepted")
except ValueError as found:
    assert "use one mesh" in str(found), found
y = want
""",
}
CHECK = "\nnp.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)\n"


@pytest.fixture(scope="module")
def failures():
    return failures_of({name: SETUP + case + CHECK for name, case in CASES.items()}, devices=8)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices(case, failures):
    assert case not in failures, failures[case]
