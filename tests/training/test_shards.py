"""Latent weights and zeroth-order steps on four devices; CPU devices in a process of their own."""

import os
import subprocess
import sys

import pytest

SETUP = """
import functools, equinox as eqx
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
w = jax.random.normal(jax.random.key(0), (32, 64))
x = jax.random.normal(jax.random.key(1), (8, 32))
loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2)
near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
p = jq.latent({"w": w}, jq.lsq(2, 16))
value, slope = jax.value_and_grad(jq.quantized(loss))(p, x)
"""
CASES = {
    "data, jit": """
got, g = jax.jit(jax.value_and_grad(jq.quantized(loss)))(p, put(x, "d"))
near(got, value)
jax.tree.map(near, g, slope)
""",
    "columns, jit": """
columns = jax.tree.map(lambda a: put(a, None, "d"), p)
got, g = jax.jit(jax.value_and_grad(jq.quantized(loss)))(columns, put(x))
near(got, value)
jax.tree.map(near, g, slope)
assert g["w"].data["codes"].sharding.spec == P(None, "d")
""",
    "data, shard_map": """
def mean(p, x):  # every device has its rows; derivatives are averaged
    got, g = jax.value_and_grad(jq.quantized(loss))(p, x)
    return jax.lax.pmean((got, g), "d")
run = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False)
got, g = jax.jit(run)(p, x)
near(got, value)
jax.tree.map(near, g, slope)
""",
    "BitNet's mean over columns, shard_map": """
method = lambda axis: jq.bitnet(activations=None, axis=axis)
whole = jq.quantized(lambda p, x: x @ p["w"])(jq.latent({"w": w}, method("")), x)
part = jq.latent({"w": w}, method("d"))
run = jax.shard_map(jq.quantized(lambda p, x: x @ p["w"]), mesh=mesh, in_specs=(P(None, "d"), P()),
                    out_specs=P(None, "d"), check_vma=False)
codes = {"w": eqx.tree_at(lambda w: w.data["codes"], part["w"], put(w, None, "d"))}
near(run(codes, x), whole)
""",
    "zeroth order, jit": """
how = jq.training.Zeroth(epsilon=0.5, samples=3)
step = jax.jit(jq.training.zo_step(jq.quantized(loss), how))
after, got, _ = step(p, jax.random.key(2), 0.1, x)
again, same, _ = step(jax.tree.map(lambda a: put(a, None, "d"), p), jax.random.key(2), 0.1, put(x))
near(got, same)
near(after["w"].data["codes"], again["w"].data["codes"])
assert again["w"].data["codes"].sharding.spec == P(None, "d")
""",
}


@pytest.mark.slow
def test_four_devices():
    """In one process, which takes seconds to start."""
    code = SETUP + "".join(f"print({case!r}){body}" for case, body in CASES.items())
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=env | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == list(CASES)
