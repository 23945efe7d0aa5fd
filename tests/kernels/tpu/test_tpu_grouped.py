"""The TPU kernel of grouped products, interpreted on the CPU, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import reference
from pallas_kernels.tpu import KERNELS
from tests.support.experts import made
from tests.support.operands import assert_rows_hold

KERNEL = KERNELS["grouped_packed_matmul"]
# experts, m, k, n, bits, group, zero points, x, activations, unit, rows of each expert.
CASES = [
    (5, 13, 520, 130, 4, 128, False, "bfloat16", "float", "int8", [3, 0, 6, 1, 1]),
    (5, 13, 520, 130, 2, 64, True, "float32", "int8", "float8_e4m3fn", [3, 0, 6, 1, 1]),
    (3, 70, 1100, 300, 3, 128, True, "float32", "float", "bfloat16", [0, 70, 0]),
    (3, 70, 600, 140, 8, 600, False, "float32", "int8/256", "int8", [20, 0, 10]),
    (1, 4, 512, 128, 4, 128, False, "bfloat16", "float", "int8", [4]),
    (4, 300, 1100, 200, 4, 32, True, "bfloat16", "codes", "int8", [100, 150, 0, 50]),
    (4, 30, 300, 200, 4, 32, True, "bfloat16", "float", "int8", [0, 0, 0, 0]),
]
BUDGET = {"float": 5e-5, "codes": 1e-6, "int8": 1e-6, "int8/256": 1e-6}  # of the largest output


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_packed_matmul(case):
    *shape, unit, sizes = case
    bits, group, form = *case[4:6], case[8]
    x, arrays = made(*shape)
    sizes, static = jnp.array(sizes, jnp.int32), {"bits": bits, "group_size": group}
    assert KERNEL.serves(x, *arrays, sizes, **static, activations=form) == ""
    options = {"activations": form, "unit": unit, "interpret": True}
    run = jax.jit(lambda x, *a: KERNEL.call(x, *a, **static, **options))
    y = run(x, *arrays, sizes)
    exact = forms.rounded(x, form).astype(jnp.float32)
    expected = reference.OPS["grouped_packed_matmul"]
    want = jax.jit(lambda x, *a: expected(x, *a, **static))(exact, *arrays, sizes)
    assert y.shape == want.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, atol=BUDGET[form] * float(jnp.abs(want).max()))
    if int(sizes.sum()) == len(x):
        assert_rows_hold(lambda x: run(x, *arrays, sizes), x, y)


def test_what_is_not_served():
    x, arrays = made(2, 8, 400, 130, 4, 100, False, "float32", "float")
    sizes, static = jnp.array([4, 4], jnp.int32), {"bits": 4, "group_size": 100}
    assert "neither divide 128" in KERNEL.serves(x, *arrays, sizes, **static)
