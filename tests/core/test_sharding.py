"""Packed weights split over devices; four CPU devices in a process of their own."""

import pytest

from tests.support.devices import failures_of

SETUP = """
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from pallas_kernels import shard
from pallas_kernels.cpu import native
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
w = jax.random.normal(jax.random.key(0), (32, 64))
x = jax.random.normal(jax.random.key(1), (8, 32))
q = {"w": jq.quantize_array(w, jq.rtn(4, 16))}
arrays, static = q["w"].format.arguments(q["w"].data, 32)
fn = lambda p, x: x @ p["w"]
want = fn(jq.dequantize(q), x)
"""
CASES = {
    "columns, jit": """
columns = jax.tree.map(lambda a: put(a, None, "d"), q)
y = jax.jit(jq.quantized(fn))(columns, put(x))
assert y.sharding.spec == P(None, "d"), y.sharding
""",
    "batch, jit": """
y = jax.jit(jq.quantized(fn))(q, put(x, "d"))
assert y.sharding.spec[0] == "d", y.sharding
""",
    "one device of several, jit": """
ready = not native.load()
on_last = jax.device_put((q, x), jax.devices()[3])
for args in ((q, x), on_last):
    text = jax.jit(jq.quantized(fn)).lower(*args).compile().as_text()
    assert ("jaxquant_packed" in text) == ready, text
    assert ("cpu kernel" in str(jq.explain(fn, *args))) == ready
    np.testing.assert_allclose(jax.jit(jq.quantized(fn))(*args), want, rtol=1e-4, atol=1e-4)
split = jax.tree.map(lambda a: put(a, None, "d"), q)
text = jax.jit(jq.quantized(fn)).lower(split, put(x)).compile().as_text()
assert "jaxquant_packed" not in text
assert "only shard_map can split a kernel over 4 devices" in str(jq.explain(fn, split, put(x)))
y = jax.vmap(jq.quantized(fn), in_axes=(None, 0))(q, x[:, None])[:, 0]
""",
    "some axes split by hand": """
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
run = lambda axes: jax.jit(jax.shard_map(
    jq.quantized(fn), mesh=mesh, in_specs=(P(), P("a")), out_specs=P("a"), check_vma=False,
    axis_names=axes,
))
assert "jaxquant_packed" not in run({"a"}).lower(q, x).as_text()
np.testing.assert_allclose(run({"a"})(q, x), want, rtol=1e-4, atol=1e-4)
y = run({"a", "b"})(q, x)
assert native.load() or "jaxquant_packed" in run({"a", "b"}).lower(q, x).as_text()
""",
    "columns, shard_map": """
y = jax.shard_map(
    jq.quantized(fn), mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d")
)(q, x)
""",
    "kernels inside a checked shard_map, and their derivatives": """
w4 = jax.random.normal(jax.random.key(0), (256, 64))
x4 = jax.random.normal(jax.random.key(1), (8, 256))
q4 = {"w": jq.quantize_array(w4, jq.rtn(4, 16))}
y, want = jq.quantized(fn)(q4, x4), jq.quantized(fn)(q4, x4)
slope = jax.grad(lambda x: jnp.sum(jnp.sin(jq.quantized(fn)(q4, x))))(x4)
adapted = jq.adapt(q4, jq.adapters.LoRA(4))
latent = jq.latent({"w": w4}, jq.lsq(4, 16))
parts = lambda p, x: jax.lax.psum(x @ p["w"], "d")
for of, into, out in (
    (fn, (P(None, "d"), P()), P(None, "d")), (parts, (P("d"), P(None, "d")), P()),
    (fn, (P(), P("d")), P("d")),
):
    run = jax.jit(jax.shard_map(jq.quantized(of), mesh=mesh, in_specs=into, out_specs=out))
    assert native.load() or "jaxquant_packed" in run.lower(q4, x4).compile().as_text()
    np.testing.assert_allclose(run(q4, x4), want, rtol=1e-4, atol=1e-4)
    got = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(run(q4, x)))))(x4)
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-4)
for tree in (adapted, latent):
    of = jq.quantized(fn)
    run = jax.jit(jax.shard_map(of, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")))
    loss = lambda run: jax.grad(lambda x: jnp.sum(jnp.sin(run(tree, x))))(x4)
    np.testing.assert_allclose(loss(run), loss(jq.quantized(fn)), rtol=1e-4, atol=1e-4)
""",
    "rows, shard_map": """
w4 = jax.random.normal(jax.random.key(0), (256, 64))
x4 = jax.random.normal(jax.random.key(1), (8, 256))
parts = lambda p, x: jax.lax.psum(x @ p["w"], "d")
run = jax.shard_map(
    jq.quantized(parts), mesh=mesh, in_specs=(P("d"), P(None, "d")), out_specs=P()
)
for rule in (jq.rtn(4, 32), jq.rtn(8, 16, symmetric=True), jq.ternary(32), jq.mxfp4()):
    q4 = {"w": jq.quantize_array(w4, rule)}
    y, want = run(q4, x4), x4 @ q4["w"].dequantize()
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
turned = {"w": jq.quantize_array(w4, jq.Method("m", jq.rtn().rounder, jq.rtn(4, 16).format,
                                               input=jq.transforms.Rotation()))}
try:
    jax.shard_map(jq.quantized(parts), mesh=mesh, in_specs=(P("d"), P(None, "d")), out_specs=P())(
        turned, x4)
    raise SystemExit("accepted")
except ValueError as error:
    assert "the rows of a weight [256] by [64] are split" in str(error), error
learning = [jq.adapt({"w": jq.quantize_array(w4, jq.rtn(4, 32))}, jq.adapters.LoRA(4)),
            jq.latent({"w": w4}, jq.lsq(4, 32))]
for tree in learning:  # what learns belongs to all rows
    specs = jax.tree.map(lambda a: P("d") if a.shape[0] > 4 else P(), tree)
    try:
        jax.shard_map(jq.quantized(parts), mesh=mesh, in_specs=(specs, P(None, "d")), out_specs=P(),
                      check_vma=False)(tree, x4)
        raise SystemExit("accepted")
    except ValueError as error:
        assert "a weight in training cannot be" in str(error), error
""",
    "quantize split columns": """
rule = jq.gptq(4, 16)
gram = x.T @ x
got = jq.quantize_array(put(w, None, "d"), rule, gram)
y, want = x @ got.dequantize(), x @ jq.quantize_array(w, rule, gram).dequantize()
""",
    "an op, columns": """
y = shard.column_parallel("packed_matmul", mesh, "d", x, *arrays, **static)
assert y.sharding.spec == P(None, "d"), y.sharding
""",
    "an op, rows": """
w4 = jax.random.normal(jax.random.key(0), (128, 64))
q4, x = jq.quantize_array(w4, jq.rtn(4, 32)), jax.random.normal(jax.random.key(1), (8, 128))
arrays, static = q4.format.arguments(q4.data, 128)
y, want = shard.row_parallel("packed_matmul", mesh, "d", x, *arrays, **static), x @ q4.dequantize()
for group in (16, -1):  # a scale a group, or one for all rows
    q8 = jq.quantize_array(w4, jq.rtn(8, group, symmetric=True))
    arrays, static = q8.format.arguments(q8.data, 128)
    got = shard.row_parallel("packed_matmul", mesh, "d", x, *arrays, **static)
    np.testing.assert_allclose(got, x @ q8.dequantize(), rtol=1e-4, atol=1e-4)
""",
    "an op, rows, tiles of a trellis": """
method = jq.Method("m", jq.rtn().rounder, jq.formats.Trellis((2, 2, 2, 2), L=8))
q = jq.quantize_array(jax.random.normal(jax.random.key(0), (64, 32)), method)
arrays, static = q.format.arguments(q.data, 64)
x = jax.random.normal(jax.random.key(1), (8, 64))
y, want = shard.row_parallel("trellis_matmul", mesh, "d", x, *arrays, **static), x @ q.dequantize()
""",
    "an op, columns with escapes": """
values = np.asarray(jnp.round(3 * jax.random.normal(jax.random.key(0), (32, 64)))).astype(np.int16)
dual, step = jq.formats.DualScale(), np.linspace(0.5, 2, 32, dtype=np.float32)
data = jax.tree.map(jnp.asarray, dual.pack(values, step, np.full(64, 0.1, np.float32)))
arrays, static = dual.arguments(data, 32)
begins = np.asarray(data["ranges"])[0, ::16]
assert len(set(begins)) == 4, begins  # every device has escapes of its own
y = shard.column_parallel("dual_scale_matmul", mesh, "d", x, *arrays, **static)
assert y.sharding.spec == P(None, "d"), y.sharding
want = x @ (step[:, None] * np.float32(0.1) * values)
for op in (shard.row_parallel, shard.fsdp):
    try:
        op("dual_scale_matmul", mesh, "d", x, *arrays, **static)
        raise SystemExit("accepted")
    except ValueError as error:
        assert "split along columns" in str(error), error
""",
    "an op, pieces gathered packed": """
w4 = jax.random.normal(jax.random.key(0), (128, 64))
q4, x = jq.quantize_array(w4, jq.rtn(4, 32)), jax.random.normal(jax.random.key(1), (8, 128))
arrays, static = q4.format.arguments(q4.data, 128)
run = jax.jit(lambda x, *a: shard.fsdp("packed_matmul", mesh, "d", x, *a, **static))
y, want = run(x, *arrays), x @ q4.dequantize()
text = run.lower(x, *arrays).compile().as_text()
moved = [line for line in text.splitlines() if " all-gather" in line]
assert moved and not any("f32[128,64]" in line or "s8[" in line for line in moved), moved
assert any("s32[16,64]" in line for line in moved), moved
""",
    "an op, shards of broken words are refused": """
y = want
for op, error in ((shard.row_parallel, "multiples of 16 rows"), (shard.fsdp, "multiples of 16")):
    try:
        op("packed_matmul", mesh, "d", x, *arrays, **static)
        raise SystemExit("accepted")
    except ValueError as found:
        assert error in str(found), found
""",
}


CHECK = "np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)\n"


@pytest.fixture(scope="module")
def failures():
    return failures_of({name: SETUP + case + CHECK for name, case in CASES.items()}, devices=4)


@pytest.mark.parametrize("case", CASES)
def test_four_devices(case, failures):
    assert case not in failures, failures[case]
