"""The project's Llama on meshes of eight CPU devices equals the Llama on one."""

import pytest

from tests.support.devices import failures_of

SETUP = """
import re
import jax, jax.numpy as jnp, numpy as np, optax, jaxquant as jq
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxquant_models.architectures import cache, llama
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.shardings import cache_sharding, model_sharding
from pallas_kernels.cpu import native
config = LlamaConfig(vocab_size=512, d_model=256, d_ff=512, n_layers=2, n_heads=8, n_kv_heads=4,
                     head_dim=32)
model = llama.Llama(config)
tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 512)
sequences = np.asarray(tokens)
params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
fn = lambda p, t: llama.apply(model, p, t)
sites = jq.sites(fn, params, tokens)
matrices = ("layers/*kernel", "head/kernel")
recipe = lambda method: jq.Recipe([*((m, method) for m in matrices), ("*", jq.KEEP)])
MESHES = {
    "data": ((8, 1), ("data", "model")), "tensor": ((2, 4), ("data", "model")),
    "both": ((4, 2), ("data", "model")),
}
def mesh_of(name, kind=AxisType.Auto):
    return jax.make_mesh(*MESHES[name], axis_types=(kind,) * 2)
def placed(tree, mesh, rules=None):
    at = model_sharding(tree, config, mesh, rules)
    return jax.device_put(tree, at), at
def split(mesh, a, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*(spec or ("data",)))))
MOVED = re.compile(r"= \\(?(\\w+)\\[([\\d,]*)\\].* all-gather(?:-start)?\\(")
def check_moved(text, largest):
    "Words and scales are gathered, and no floats of the size of a weight."
    found = MOVED.findall(text)
    sizes = [(d, np.prod([int(n) for n in s.split(",") if n])) for d, s in found]
    assert not any(d in ("f32", "bf16") and size >= largest for d, size in sizes), found
    return {d for d, _ in sizes}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
"""
CASES = {}
for kind in ("Auto", "Explicit"):
    for mesh in ("data", "tensor", "both"):
        CASES[f"{mesh} parallel prefill, {kind} axes"] = f"""
q = jq.quantize(params, recipe(jq.rtn(4, 32)), sites)
want = jax.jit(jq.quantized(fn))(q, tokens)
mesh = mesh_of({mesh!r}, AxisType.{kind})
qs, at = placed(q, mesh)
run = jq.quantized(fn, shardings=at, data_axes=("data",))
uses = jq.explain(run, qs, split(mesh, tokens)).uses
served = [use for use in uses if "packed matmul" in use.rule]
assert len(served) == 8 and all(native.load() or "cpu kernel" in use.why for use in served), uses
if mesh.axis_types[0] == AxisType.Explicit:
    run = jax.sharding.auto_axes(run, out_sharding=NamedSharding(mesh, P("data", None, "model")))
t = split(mesh, tokens)
text = jax.jit(run).lower(qs, t).compile().as_text()
assert native.load() or text.count('custom_call_target="jaxquant_packed"') >= 8
assert "s32" in check_moved(text, 256 * 128)
close(jax.jit(run)(qs, t), want)
"""
CASES |= {
    "decode": """
q = jq.quantize(params, recipe(jq.rtn(4, 32)), sites)
mesh = mesh_of("tensor")
qs, at = placed(q, mesh)
empty = cache.init_cache(config, 8, 32, jnp.float32)
step = lambda p, t, c: llama.apply(model, p, t, c)
of = jax.jit(jq.quantized(step))
on = jax.jit(jq.quantized(step, shardings=at, data_axes=("data",)))
c, cs = empty, jax.device_put(empty, cache_sharding(empty, mesh))
for t in (tokens, tokens[:, :1], tokens[:, 1:2]):
    want, c = of(q, t, c)
    y, cs = on(qs, split(mesh, t), cs)
    close(y, want)
close(cs.k, c.k)
assert tuple(cs.k.sharding.spec)[:3] == (None, "data", "model"), cs.k.sharding
""",
    "one token of one sequence": """
q = jq.quantize(params, recipe(jq.rtn(4, 32)), sites)
qs, at = placed(q, mesh_of("tensor"))
run = jax.jit(jq.quantized(fn, shardings=at, data_axes=("data",)))
close(run(qs, tokens[:1, :1]), jax.jit(jq.quantized(fn))(q, tokens[:1, :1]))
""",
    "adapters": """
for method in (jq.nf4(32, double_quant=True),):
    q = jq.adapt(jq.quantize(params, recipe(method), sites), jq.adapters.LoRA(4))
    how = jq.training.Finetuning(steps=2, batch_size=4)
    want = jq.training.finetune(fn, q, sequences, how)
    for name in ("data", "both"):
        qs, at = placed(q, mesh_of(name))
        run = jq.quantized(fn, shardings=at, data_axes=("data",))
        got = jq.training.finetune(run, qs, sequences, how)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(a, b)
        w = got["layers"]["mlp"]["up"]["kernel"]
        there = at["layers"]["mlp"]["up"]["kernel"].data["lora_b"]
        here = w.data["lora_b"].sharding
        assert here.is_equivalent_to(there, 3), (here, there)
""",
    "latent weights": """
p = jq.latent(params, recipe(jq.lsq(4, 32)), sites)
how = jq.training.QAT(steps=2, batch_size=4)
want = jq.qat(fn, p, sequences, how, teacher=params)
for name in ("both",):
    ps, at = placed(p, mesh_of(name))
    teacher, _ = placed(params, mesh_of(name))
    run = jq.quantized(fn, shardings=at, data_axes=("data",))
    got = jq.qat(run, ps, sequences, how, teacher=teacher)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
""",
    "calibrate and quantize": """
stats = jq.calibrate(fn, params, [tokens])
mesh = mesh_of("data")
whole = jax.device_put(params, NamedSharding(mesh, P()))
found = jq.calibrate(fn, whole, [split(mesh, tokens)])
paths = [path for path in stats.holder if path.endswith("kernel")]
assert len(paths) == 8, paths
for path in paths:
    np.testing.assert_allclose(found.gram(path), stats.gram(path), rtol=1e-4, atol=1e-5)
q, want = (jq.quantize(p, recipe(jq.rtn(4, 32)), s) for p, s in ((whole, found), (params, stats)))
for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)
columns = [(name, "model") for name in ("heads", "kv_heads", "mlp", "vocab")]
placed_params, at = placed(params, mesh_of("tensor"), columns)
q, want = (jq.quantize(p, recipe(jq.gptq(4, 32)), stats) for p in (placed_params, params))
up, of = q["layers"]["mlp"]["up"]["kernel"], want["layers"]["mlp"]["up"]["kernel"]
np.testing.assert_array_equal(up.data["codes"], of.data["codes"])
assert tuple(up.data["codes"].sharding.spec) == (None, None, "model"), up.data["codes"].sharding
""",
    "experts": """
config = LlamaConfig(vocab_size=256, d_model=128, d_ff=128, n_layers=2, n_heads=4, n_kv_heads=4,
                     head_dim=32, n_experts=8, experts_per_token=2, expert_d_ff=64)
model = llama.Llama(config)
tokens = tokens % 256
params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
q = jq.quantize(params, jq.Recipe([("layers/*[!r]/kernel", jq.rtn(4, 16)), ("*", jq.KEEP)]),
                jq.sites(fn, params, tokens))
want = jax.jit(jq.quantized(fn))(q, tokens)
for shape in ((2, 2, 2),):
    mesh = jax.make_mesh(shape, ("data", "model", "expert"), axis_types=(AxisType.Auto,) * 3)
    qs, at = placed(q, mesh)
    run = jq.quantized(fn, shardings=at, data_axes=("data",))
    uses = [use for use in jq.explain(run, qs, split(mesh, tokens)).uses if "dot" in use.primitive]
    kernels = [use for use in uses if "cpu kernel" in use.why]
    assert native.load() or len(kernels) == 7, uses
    text = jax.jit(run).lower(qs, split(mesh, tokens)).compile().as_text()
    check_moved(text, 128 * 128)
    close(jax.jit(run)(qs, split(mesh, tokens)), want)
""",
    "healing": """
q = jq.quantize(params, recipe(jq.rtn(2, 32)), sites)
how = jq.tuning.Healing(steps=2, batch_size=8)
want = jq.heal(fn, q, params, sequences, how)
mesh = mesh_of("data")
qs, at = placed(q, mesh)
teacher, _ = placed(params, mesh)
got = jq.heal(jq.quantized(fn, shardings=at, data_axes=("data",)), qs, teacher, sequences, how)
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
""",
    "checkpoints": """
import tempfile
q = jq.quantize(params, recipe(jq.rtn(4, 32)), sites)
qs, at = placed(q, mesh_of("tensor"))
with tempfile.TemporaryDirectory() as folder:
    jq.save(folder, {"params": qs})
    other = model_sharding(jq.storage.outline(folder)["params"], config, mesh_of("both"))
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), q, other)
    back = jq.load(folder, like={"params": like})["params"]
    whole = jq.load(folder)["params"]
for a, b, c, place in zip(*map(jax.tree.leaves, (back, whole, q, other)), strict=True):
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, c)
    assert a.sharding.is_equivalent_to(place, a.ndim), (a.sharding, place)
""",
    "a mesh that does not divide the heads": """
q = jq.quantize(params, recipe(jq.rtn(4, 32)), sites)
mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
try:
    model_sharding(q, config, mesh)
    raise SystemExit("accepted")
except ValueError as error:
    assert "8 devices of ['model'] do not divide the 4 kv_heads" in str(error), error
q = jq.quantize(params, recipe(jq.rtn(4, 128)), sites)
for rules, message in (
    ([("mlp", "model")], "layers/mlp/down/kernel: packed_matmul: k = 512 rows in 8 shards"),
    ([("mlp", "tensor")], "'mlp' is split over ['tensor'], which the mesh lacks"),
):
    try:
        model_sharding(q, config, mesh, rules)
        raise SystemExit("accepted")
    except ValueError as error:
        assert message in str(error), error
try:
    jq.distributed.sharding(q, mesh, [], {"embed/embedding": None})
    raise SystemExit("accepted")
except ValueError as error:
    assert "no names for" in str(error), error
""",
}


@pytest.fixture(scope="module")
def failures():
    return failures_of({name: SETUP + case for name, case in CASES.items()}, devices=8)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices(case, failures):
    assert case not in failures, failures[case]
