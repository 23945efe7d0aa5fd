"""Stacks that are split over a mesh are rounded by all devices; four CPU devices."""

import pytest

from tests.support.devices import failures_of

SETUP = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
x = jax.random.normal(jax.random.key(1), (16, 64))
def layers(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) @ jnp.ones((32, 64)), None), x, p["w"])[0]
def experts(p, x):
    return layers(p, jnp.broadcast_to(x, (4, *x.shape)))
METHODS = [
    jq.gptq(4, 32), dataclasses.replace(jq.rtn(4, 32), input=jq.transforms.Rotation()),
    jq.quip_sharp(), jq.qtip(2), jq.awq(4, 32),
]
def check(fn, w, spec, kind):
    stats = jq.calibrate(fn, {"w": w}, [x])
    mesh = jax.make_mesh((2, 2), ("stack", "model"), axis_types=(kind,) * 2)
    split = jax.device_put(w, NamedSharding(mesh, P(*spec)))
    for method in METHODS:
        want, seen, store = jq.quantize({"w": w}, method, stats)["w"], [], {}
        for again in (False, True):
            options = {"progress": seen.append, "finished": store}
            got = jq.quantize({"w": split}, method, stats, **options)["w"]
            for name, a in want.named.items():
                np.testing.assert_array_equal(got.named[name], a, err_msg=f"{method.name} {name}")
            codes = got.data["codes"]
            assert tuple(codes.sharding.spec)[:len(spec)] == tuple(spec), codes.sharding
            if again:
                assert not any(done.seconds for done in seen), seen
            paths = [done.path for done in seen]
            assert len(set(paths)) == len(paths) == len(store)
            seen.clear()
"""
CASES = {
    f"{what}, {kind}": f"""
w = jax.random.normal(jax.random.key(0), {shape})
check({what}, w, {spec}, AxisType.{kind})
"""
    for what, shape, spec in (
        ("layers", (8, 64, 32), ("stack",)),
        ("experts", (2, 4, 64, 32), (None, "stack")),
    )
    for kind in ("Auto", "Explicit")
} | {
    "experts that few tokens reach": """
import warnings
warnings.simplefilter("ignore")
w = jax.random.normal(jax.random.key(0), (4, 64, 32))
sizes = jnp.array([14, 1, 0, 1])
def routed(p, x):
    return jax.lax.ragged_dot(x, p["w"], sizes)
check(routed, w, ("stack",), AxisType.Auto)
""",
    "each device rounds its own": """
from jaxquant.ptq import round_over_mesh
w = jax.random.normal(jax.random.key(0), (8, 64, 32))
stats = jq.calibrate(layers, {"w": w}, [x])
mesh = jax.make_mesh((4,), ("stack",), axis_types=(AxisType.Auto,))
calls, real = [], round_over_mesh.round_matrix
def spied(matrix, *rest):
    calls.append(matrix.shape)
    return real(matrix, *rest)
round_over_mesh.round_matrix = spied
jq.quantize({"w": jax.device_put(w, NamedSharding(mesh, P("stack")))}, jq.gptq(4, 32), stats)
assert calls == [(64, 32)], calls  # one program, inside a shard_map, for two rounds of four
""",
}


@pytest.fixture(scope="module")
def failures():
    return failures_of({name: SETUP + case for name, case in CASES.items()}, devices=4)


@pytest.mark.parametrize("case", CASES)
def test_four_devices(case, failures):
    assert case not in failures, failures[case]
