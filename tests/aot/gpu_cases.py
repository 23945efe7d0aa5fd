"""Kernels to compile ahead of time for GPUs: a function, its arguments, weights of a pass."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.gpu import contraction, packed

K, N = 16384, 4096  # the loop must be a loop


class Case(NamedTuple):
    """A kernel of given shapes.

    Attributes:
      function: calls the op.
      args: shapes and dtypes of its arrays.
      kernel: its name in PTX.
      weights: that a program decodes in one pass of its loop.
      ceiling: instructions per weight allowed.
    """

    function: Callable
    args: tuple
    kernel: str
    weights: int
    ceiling: float


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    """Shape and dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


def integer(m, bits, ceiling, *, group=128, zero=False, activations="float", dtype=jnp.bfloat16):
    """A case of `packed_matmul`."""
    groups = K // group
    codes, scale = array(layout.words(K, bits), N), array(groups, N, dtype=jnp.float16)
    static = {"bits": bits, "group_size": group, "activations": activations}
    args = (array(m, K, dtype=dtype), codes, scale if groups > 1 else array(1, 1, dtype=jnp.float32))
    args += (array(groups, layout.words(N, bits)) if zero else None,)
    shape = contraction.shape(args[0], activations)
    size = shape.columns * packed.depth(layout.unit(bits)[0], group, K, activations, shape.depth)
    return Case(partial(packed.packed_matmul, **static), args, f"packed_matmul_{bits}", size, ceiling)


CASES = {
    "packed 2 bits, M 8": integer(8, 2, 2.2),
    "packed 2 bits, M 16": integer(16, 2, 2.2),
    "packed 2 bits, M 32": integer(32, 2, 9),
    "packed 2 bits, one scale": integer(8, 2, 2.2, group=K),
    "packed 2 bits, zero points": integer(8, 2, 2.2, zero=True),
    "packed 2 bits, float32": integer(8, 2, 2.2, dtype=jnp.float32),
    "packed 2 bits, int8": integer(8, 2, 2.2, activations="int8"),
    "packed 2 bits, int8/256": integer(8, 2, 2.2, activations="int8/256"),
    "packed 2 bits, M 64": integer(64, 2, 9),
    "packed 2 bits, M 512": integer(512, 2, 9),
    "packed 3 bits, M 8": integer(8, 3, 9),
    "packed 4 bits, M 8": integer(8, 4, 4.4),
    "packed 4 bits, int8": integer(8, 4, 4.4, activations="int8"),
    "packed 8 bits, M 8": integer(8, 8, 8.8),
}
