"""The GPU kernel of grouped products, interpreted on the CPU, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import activations as forms
from pallas_kernels import reference
from pallas_kernels.gpu import KERNELS, triton
from tests.support.experts import made
from tests.support.operands import assert_rows_hold

KERNEL = KERNELS["grouped_packed_matmul"]
# experts, m, k, n, bits, group, zero points, x, activations, rows of each expert.
CASES = [
    (5, 13, 512, 130, 4, 128, False, "bfloat16", "float", [3, 0, 6, 1, 1]),
    (5, 13, 576, 130, 2, 64, True, "float32", "int8", [3, 0, 6, 1, 1]),
    (3, 70, 640, 300, 3, 128, True, "float32", "float", [0, 70, 0]),
    (3, 70, 608, 140, 8, 608, False, "float32", "int8/256", [20, 0, 10]),
    (1, 4, 512, 128, 4, 128, False, "float16", "float", [4]),
    (4, 300, 1056, 200, 4, 32, True, "bfloat16", "codes", [100, 150, 0, 50]),
    (4, 30, 96, 200, 4, 32, True, "bfloat16", "float", [0, 0, 0, 0]),
]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_packed_matmul(case):
    *shape, sizes = case
    bits, group, form = *case[4:6], case[8]
    x, arrays = made(*shape)
    sizes, static = jnp.array(sizes, jnp.int32), {"bits": bits, "group_size": group}
    assert KERNEL.serves(x, *arrays, sizes, **static, activations=form) == ""
    with triton.interpreted():
        call = lambda x, *a: KERNEL.call(x, *a, **static, activations=form)
        run = jax.jit(call, compiler_options=QUICK)
        y = run(x, *arrays, sizes)
        if int(sizes.sum()) == len(x):
            assert_rows_hold(lambda x: run(x, *arrays, sizes), x, y)
    exact = forms.rounded(x, form).astype(jnp.float32)
    expected = reference.OPS["grouped_packed_matmul"]
    want = jax.jit(lambda x, *a: expected(x, *a, **static))(exact, *arrays, sizes)
    assert y.shape == want.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, atol=2e-6 * float(jnp.abs(want).max()))


def test_what_is_not_served():
    """Bands of the stack that are not whole steps; groups that a tile would not lie within."""
    sizes = jnp.array([4, 4], jnp.int32)
    for k, group, said in ((200, 200, "multiples of 16"), (120, 24, "must divide group_size = 24")):
        x, arrays = made(2, 8, k, 130, 4, group, False, "float32", "float")
        assert said in KERNEL.serves(x, *arrays, sizes, bits=4, group_size=group)
