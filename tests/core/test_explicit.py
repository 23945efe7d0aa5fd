"""Packed weights on meshes with Explicit axes; eight CPU devices in a process of their own."""

import pytest

from tests.support.devices import failures_of

SETUP = """
import dataclasses, re
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from pallas_kernels.cpu import native
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "model"))  # Explicit axes are the default
assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
w = jax.random.normal(jax.random.key(0), (256, 256)) / 16
x = jax.random.normal(jax.random.key(1), (8, 256))
fn = lambda p, x: jnp.tanh(x @ p["w"])
q = {"w": jq.quantize_array(w, jq.rtn(4, 32))}
at = lambda q, *spec: jq.core.packed_sharding(q["w"], mesh, P(*spec))
split = lambda q, *spec: {"w": jax.device_put(q["w"], at(q, *spec))}

def served(fn, q, x, spec, *, gathers="", native_call=True):
    run = jax.jit(jq.quantized(fn))
    y = run(q, x)
    assert jax.typeof(y).sharding.spec == P(*spec), jax.typeof(y)
    text = run.lower(q, x).compile().as_text()
    if native.load() == "" and native_call:
        assert "jaxquant_packed" in text
    moved = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\\(", line)]
    assert bool(moved) == bool(gathers), moved
    for line in moved:
        assert re.match(gathers, line.split(" = ")[1].strip(" (")), line
    return y

WORDS = r"\\(?(s32|f16|u8)\\["
want = jq.quantized(fn)(q, x)
"""
CASES = {
    "tokens": 'y = served(fn, split(q), put(x, "data"), ("data", None))',
    "columns": 'y = served(fn, split(q, None, "model"), put(x), (None, "model"))',
    "tokens and columns": """
y = served(fn, split(q, None, "model"), put(x, "data"), ("data", "model"))
assert "cpu kernel" in str(jq.explain(fn, split(q, None, "model"), put(x, "data"))) or native.load()
""",
    "rows": 'y = served(fn, split(q, "model"), put(x, "data"), ("data", None))',
    "rows and channels": """
summed = lambda p, x: jnp.tanh(jnp.dot(x, p["w"], out_sharding=NamedSharding(mesh, P("data"))))
y = served(summed, split(q, "model"), put(x, "data", "model"), ("data", None))
try:
    jax.jit(jq.quantized(fn))(split(q, "model"), put(x, "data", "model"))
    raise SystemExit("accepted")
except jax.errors.ShardingTypeError if hasattr(jax.errors, "ShardingTypeError") else Exception as e:
    assert "out_sharding" in str(e), e  # as for floats
""",
    "fully sharded: words are gathered": """
y = served(fn, split(q, "data"), put(x, "data"), ("data", None), gathers=WORDS)
""",
    "two axes": """
y = served(fn, split(q, "data", "model"), put(x, "data"), ("data", "model"), gathers=WORDS)
""",
    "activations are rounded in whole tokens": """
rounded = dataclasses.replace(jq.rtn(4, 32), activations=jq.Activations.of("int8"))
q = {"w": jq.quantize_array(w, rounded)}
want = jq.quantized(fn)(q, x)
y = served(fn, split(q, "model"), put(x, "data"), ("data", None), gathers=WORDS)
""",
    "a rotated input": """
q = {"w": jq.quantize_array(w, dataclasses.replace(jq.rtn(4, 32), input=jq.transforms.Rotation()))}
want = jq.quantized(fn)(q, x)
y = served(fn, split(q, None, "model"), put(x, "data"), ("data", "model"))
""",
    "gradients": """
loss = lambda x, q: jnp.sum(jq.quantized(fn)(q, x) ** 2)
want = jax.grad(loss)(x, q)
for spec in ((None, "model"), ("data",), ()):
    y = jax.jit(jax.grad(loss))(put(x, "data"), split(q, *spec))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
""",
    "training": """
at = lambda *spec: NamedSharding(mesh, P(*spec))
values = {"up": w, "down": w.T}
x = jax.random.normal(jax.random.key(1), (8, 16, 256)) / 16
def network(tokens, inner):
    "A function that says how its results are split, as functions of split floats have to."
    def fn(p, x):
        split = isinstance(tokens, P)
        to = lambda *axes: {"out_sharding": at(*tokens, *axes)} if split else {}
        h = jnp.tanh(jnp.einsum("bti,io->bto", x, p["up"], **to(inner)))
        return jnp.einsum("bti,io->bto", h, p["down"], **to())
    return fn
plain = network(None, None)
rows = jq.rtn(4, 64)
q = jq.quantize(values, jq.Recipe([("*", rows)]), jq.sites(plain, values, x))
KINDS = {
    "packed": q, "LoRA": jq.adapt(q, jq.adapters.LoRA(4, dora=True)),
    "QA-LoRA": jq.adapt(jq.quantize(values, jq.Recipe([("*", jq.rtn(4, 64, symmetric=False))]),
                                    jq.sites(plain, values, x)), jq.adapters.QALoRA(4)),
    "latent": jq.latent(values, jq.Recipe([("*", jq.lsq(4, 32))]), jq.sites(plain, values, x)),
}
def slopes(fn):
    def of(q, x):
        leaves, tree = jax.tree.flatten(q)
        trained = [a.dtype == jnp.float32 for a in leaves]
        def loss(floats, x):
            left = iter(floats)
            new = [next(left) if is_trained else a for a, is_trained in zip(leaves, trained)]
            return jnp.mean(jq.quantized(fn)(jax.tree.unflatten(tree, new), x) ** 2)
        floats = [a for a, is_trained in zip(leaves, trained) if is_trained]
        return jax.value_and_grad(loss, argnums=(0, 1))(floats, x)
    return jax.jit(of)
AXES = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
for kind, value in KINDS.items():
    want = slopes(plain)(value, x)
    for embed, mlp in ((None, "model"), ("data", None), ("data", "model")):
        rules = [pair for pair in (("embed", embed), ("mlp", mlp)) if pair[1]]
        there = jax.device_put(value, jq.distributed.sharding(value, mesh, rules, AXES))
        for tokens in (P("data", None), P(None, "data")):
            got = slopes(network(tokens, mlp))(there, put(x, *tokens))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()),
                                           err_msg=f"{kind} {embed} {mlp} {tokens}")
y = want = 0.0
""",
    "Auto axes beside Explicit ones": """
for kinds in (("Explicit", "Auto"), ("Auto", "Explicit")):
    mixed = jax.make_mesh((2, 4), ("data", "model"),
                          axis_types=tuple(jax.sharding.AxisType[kind] for kind in kinds))
    there = jax.device_put(x, NamedSharding(mixed, P("data")))
    for spec in (P(None, "model"), P("model"), P("data"), P("data", "model")):
        at = {"w": jq.core.packed_sharding(q["w"], mixed, spec)}
        run = jax.jit(jq.quantized(fn, shardings=at, data_axes=["data"]))
        on = jax.device_put(q, at)
        np.testing.assert_allclose(run(on, there), want, rtol=1e-5, atol=1e-5)
        text = run.lower(on, there).compile().as_text()
        assert ("all-gather" in text) == ("data" in spec), spec
    rows = {"w": jq.core.packed_sharding(q["w"], mixed, P(("data", "model")))}
    run = jax.jit(jq.quantized(fn, shardings=rows, data_axes=[]))
    whole = jax.device_put(x, NamedSharding(mixed, P()))
    text = run.lower(jax.device_put(q, rows), whole).compile().as_text()
    assert not re.search("collective-permute|all-gather|all-to-all", text)
stack = jax.random.normal(jax.random.key(0), (3, 4, 256, 128)) / 16
experts = lambda p, x: jax.lax.scan(
    lambda _, w: (None, jnp.einsum("emk,ekn->emn", x, w)), None, p["w"])[1]
xs = jnp.ones((4, 8, 256))
stacks = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(experts, {"w": stack}, xs))
at = {"w": jq.core.packed_sharding(stacks["w"], mixed, P(None, "data"))}
run = jax.jit(jq.quantized(experts, shardings=at, data_axes=[]))
given = jax.device_put(stacks, at), jax.device_put(xs, NamedSharding(mixed, P()))
assert "all-gather" not in run.lower(*given).compile().as_text()
np.testing.assert_allclose(run(*given), jq.quantized(experts)(stacks, xs), rtol=1e-4, atol=1e-4)
y = want
""",
    "mapped over an axis that is split": """
y = jax.jit(jax.vmap(jq.quantized(fn), in_axes=(None, 0)))(
    split(q, None, "model"), put(jnp.stack([x, -x]), "data"))
want = jnp.stack([want, -want])
""",
    "a mesh of one device": """
one = jax.make_mesh((1,), ("data",))
at = lambda *spec: NamedSharding(one, P(*spec))
def fn(p, x):
    step = lambda h, _: (jnp.dot(h, p["w"], out_sharding=at("data", None)), None)
    return jax.lax.scan(step, x, length=2)[0]
run = jq.quantized(lambda p, x: jnp.dot(x, p["w"], out_sharding=at("data", None)))
y = jax.jit(jq.quantized(fn))(q, jax.device_put(x, at("data", None)))
assert jax.typeof(y).sharding.spec == P("data", None), jax.typeof(y)
want = x @ q["w"].dequantize() @ q["w"].dequantize()
""",
    "formats that plan their rates": """
gram = put(x.T @ x)
got = jq.quantize_array(put(w, None, "model"), jq.trellis(2), gram)
assert jax.typeof(got.data["codes"]).sharding.spec == P(None, "model")
y = want
""",
    "batch axes of whole stacks": """
stack = jax.random.normal(jax.random.key(0), (4, 256, 128)) / 16
y = want  # JAX 0.11 and later refuse batch axes that are split in different ways
for fn, x in () if jax.__version_info__ >= (0, 11) else (
    (lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"]), jnp.ones((4, 8, 256))),
    (lambda p, x: jnp.einsum("mk,mkn->mn", x, p["w"][jnp.arange(8) % 4]), jnp.ones((8, 256))),
):
    q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(fn, {"w": stack}, x))
    want = jq.quantized(fn)(q, x)
    there = jax.device_put(q, jax.tree.map(lambda a: NamedSharding(mesh, P()), q))
    y = jax.jit(jq.quantized(fn))(there, put(x, "data"))
    assert jax.typeof(y).sharding.spec[0] == "data", jax.typeof(y)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
""",
    "transforms of a shared input": """
rotated = dataclasses.replace(jq.rtn(4, 32), input=jq.transforms.Rotation())
fn = lambda p, x: (x @ p["a"], x @ p["b"])
plain = {"a": w, "b": w.T}
q = jq.quantize(plain, rotated, jq.sites(fn, plain, x))
want = jq.quantized(fn)(q, x)
calls, real = [], jq.QTensor.transformed
def counted(self, *given):
    calls.append(1)
    return real(self, *given)
jq.QTensor.transformed = counted
there = jax.device_put(q, {n: jq.core.packed_sharding(q[n], mesh, P(None, "model")) for n in q})
y = jax.jit(jq.quantized(fn))(there, put(x, "data"))
assert len(calls) == 1, calls
""",
    "look-ups": """
table = jax.random.normal(jax.random.key(0), (64, 256))
ids = jnp.arange(8) * 5
fn = lambda p, i: p["t"].at[i].get(out_sharding=NamedSharding(mesh, P("data")))
plain = lambda p, i: p["t"][i]
q = {"t": jq.quantize_array(table, jq.rtn(4, 32))}
there = jax.device_put(q, {"t": jq.core.packed_sharding(q["t"], mesh, P(None, "model"))})
y, want = jax.jit(jq.quantized(fn))(there, put(ids, "data")), jq.quantized(plain)(q, ids)
assert jax.typeof(y).sharding.spec == P("data", None)
""",
    "shardings over another mesh": """
other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
on_other = {"w": jq.core.packed_sharding(q["w"], other, P(None, "b"))}
try:
    jax.jit(jq.quantized(fn, shardings=on_other))(split(q, None, "model"), put(x, "data"))
    raise SystemExit("accepted")
except ValueError as error:
    assert "use one mesh for both" in str(error), error
y = want
""",
    "calibrate experts": """
stack = jax.random.normal(jax.random.key(0), (4, 256, 128)) / 16
sizes = jnp.array([3, 1, 0, 4])
numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
def fn(p, x):
    return jax.lax.ragged_dot_general(
        x, p["w"], put(sizes), numbers, out_sharding=NamedSharding(mesh, P()))
plain = lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes)
there = {"w": put(stack)}
import inspect
if "out_sharding" in inspect.signature(jax.lax.ragged_dot_general).parameters:
    found = jq.calibrate(fn, there, [put(x, "data")]).gram("w")
    known = jq.calibrate(plain, {"w": stack}, [x]).gram("w")
    np.testing.assert_allclose(found, known, rtol=1e-4, atol=1e-5)
y = want
""",
    "calibrate": """
def fn(p, x):
    h = jnp.tanh(jnp.matmul(x, p["up"], out_sharding=NamedSharding(mesh, P("data", "model"))))
    return jnp.matmul(h, p["down"], out_sharding=NamedSharding(mesh, P("data")))
plain = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
values = {"up": w, "down": w.T}
there = {"up": put(w, None, "model"), "down": put(w.T, "model")}
found, stats = jq.calibrate(fn, there, [put(x, "data")]), jq.calibrate(plain, values, [x])
for path in values:
    np.testing.assert_allclose(found.gram(path), stats.gram(path), rtol=1e-4, atol=1e-5)
y = want = 0.0
""",
    "layers of a scan": """
stack = jax.random.normal(jax.random.key(0), (3, 256, 256)) / 16
tokens = NamedSharding(mesh, P("data", None))
def fn(p, x):
    step = lambda h, w: (jax.sharding.reshard(jnp.tanh(h @ w), tokens), None)
    return jax.lax.scan(step, x, p["w"])[0]
plain = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(plain, {"w": stack}, x))
want = jq.quantized(plain)(q, x)
y = jax.jit(jq.quantized(fn))(split(q, None, None, "model"), put(x, "data"))
""",
    "experts": """
stack = jax.random.normal(jax.random.key(0), (4, 256, 128)) / 16
x = jax.random.normal(jax.random.key(1), (4, 8, 256))
fn = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
q = jq.quantize({"w": stack}, jq.rtn(4, 32), jq.sites(fn, {"w": stack}, x))
want = jq.quantized(fn)(q, x)
y = served(fn, split(q, "model"), put(x, "model"), ("model", None, None))
""",
    "quantize": """
sites = jq.sites(fn, {"w": w}, x)
for spec in ((None, "model"), ("model",), ("data", "model"), ()):
    got = jq.quantize({"w": put(w, *spec)}, jq.rtn(4, 32), sites)
    assert {a.sharding.mesh for a in jax.tree.leaves(got)} == {mesh}
    for name, a in got["w"].named.items():
        np.testing.assert_array_equal(a, q["w"].named[name])
    assert jax.typeof(got["w"].data["codes"]).sharding.spec == P(*spec, *(None,) * (2 - len(spec)))
gram = put(x.T @ x)
got = jq.quantize_array(put(w, None, "model"), jq.gptq(4, 32), gram)
assert jax.typeof(got.data["codes"]).sharding.spec == P(None, "model")
try:
    jq.quantize_array(put(w, "model"), jq.gptq(4, 128), gram)
    raise SystemExit("accepted")
except ValueError as error:
    assert "256 rows in 4 shards must be whole words and groups" in str(error), error
rounded = []
try:
    values = {"a": put(w), "w": put(w, "model")}
    jq.quantize(values, jq.rtn(4, 128), progress=rounded.append)
    raise SystemExit("accepted")
except ValueError as error:
    assert str(error).startswith("w: ") and not rounded, error  # before anything is rounded
y = x @ got.dequantize()
want = x @ jq.quantize_array(w, jq.gptq(4, 32), x.T @ x).dequantize()
""",
    "an axis of tokens, then another": """
for spec in ((("data", "model"),), (("model", "data"),)):
    y = jax.jit(jq.quantized(fn))(split(q, *spec), put(x, "data"))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
""",
    "quantize under set_mesh": """
sites = jq.sites(fn, {"w": w}, x)
stats = jq.calibrate(fn, {"w": w}, [x])
from jaxquant.ptq.quantize import importance
near = importance({"w": w}, jq.trellis(2), stats)
with jax.set_mesh(mesh):
    got = jq.quantize({"w": put(w, None, "model")}, jq.rtn(4, 32), sites)
    one = jq.quantize_array(put(w, None, "model"), jq.rtn(4, 32), key=jax.random.key(3))
    y = jax.jit(jq.quantized(fn))(got, put(x, "data"))
    found = importance({"w": put(w, None, "model")}, jq.trellis(2), stats)
np.testing.assert_array_equal(got["w"].data["codes"], q["w"].data["codes"])
np.testing.assert_array_equal(one.data["codes"], q["w"].data["codes"])
np.testing.assert_allclose(found["w"], near["w"], rtol=1e-3)
""",
    "arrays that are split in different ways are refused": """
q = {"w": q["w"].with_named({n: put(a, None, "model") if n == "codes" else put(a, None, "data")
                             for n, a in q["w"].named.items()})}
try:
    jax.jit(jq.quantized(fn))(q, put(x))
    raise SystemExit("accepted")
except ValueError as error:
    assert "split in different ways" in str(error), error
y = want
""",
}
CHECK = """
for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
"""


@pytest.fixture(scope="module")
def failures():
    return failures_of({name: SETUP + case + CHECK for name, case in CASES.items()}, devices=8)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices(case, failures):
    assert case not in failures, failures[case]
