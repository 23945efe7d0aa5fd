"""Every kernel on the real device against its float32 reference, on fresh random operands."""

import time

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from tests.support.arrays import draw
from tests.support.operands import CASES, operands

if jax.default_backend() == "cpu":
    pytest.skip("no accelerator: JAX runs on the CPU", allow_module_level=True)

# Share of the output's energy that may be lost, by x's dtype: half precision multiplies in half.
BUDGETS = {"float32": 1e-9, "bfloat16": 2e-5}


@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_its_reference(case, m, form, dtype):
    seed = time.time_ns() % (1 << 31)  # fresh; printed where it fails
    op, arrays, static = operands(case, 1536, 1040, seed)
    x = draw(m, 1536, seed=seed).astype(dtype)
    kernel, reason = dispatch.choose(
        op, dispatch.default_platform(), (x, *arrays), {**static, "activations": form}
    )
    if kernel is None:
        pytest.skip(reason)
    run = jax.jit(lambda x, *a: dispatch.product(op, x, *a, **static, activations=form))
    with jax.default_matmul_precision("highest"), dispatch.using("reference"):
        want = run(x.astype(jnp.float32), *arrays)
    run.clear_cache()
    got = run(x, *arrays)
    lost = float(jnp.sum((got - want) ** 2) / jnp.sum(want**2))
    assert lost <= BUDGETS[dtype], f"seed {seed}: {lost:.2e} of the energy lost"
