"""Packed weights split over devices; four CPU devices in a process of their own."""

import os
import subprocess
import sys

import pytest

SETUP = """
import jax, jax.numpy as jnp, numpy as np, jaxquant as jq
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
w = jax.random.normal(jax.random.key(0), (32, 64))
x = jax.random.normal(jax.random.key(1), (8, 32))
q = {"w": jq.quantize_array(w, jq.rtn(4, 16))}
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
    "columns, shard_map": """
y = jax.shard_map(
    jq.quantized(fn), mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d")
)(q, x)
""",
    "quantize split columns": """
rule = jq.gptq(4, 16)
gram = x.T @ x
got = jq.quantize_array(put(w, None, "d"), rule, gram)
y, want = x @ got.dequantize(), x @ jq.quantize_array(w, rule, gram).dequantize()
""",
    "explicit axes are refused": """
explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
try:
    jq.quantize_array(jax.device_put(w, NamedSharding(explicit, P())), jq.rtn(4, 16))
    raise SystemExit("accepted")
except ValueError as error:
    assert "w lies on a mesh with Explicit axes" in str(error), error
y = want
""",
}


@pytest.mark.parametrize("case", CASES)
def test_four_devices(case):
    code = SETUP + CASES[case] + "np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=env | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
