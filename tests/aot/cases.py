"""What is compiled: every kernel at the shapes of a decoder layer."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.tpu import blocks as choice
from pallas_kernels.tpu import packed


def packed_matmul(m, k, n, bits, group, activations="float", unit="int8", dtype="bfloat16", zero=False, scale="float32", blocks=None):
    a = jax.ShapeDtypeStruct
    g = -(-k // group)
    args = [a((m, k), jnp.dtype(dtype)), a((layout.words(k, bits), n), jnp.int32), a((g, n), jnp.dtype(scale)),
            a((g, layout.words(n, bits)), jnp.int32) if zero else None]
    f = partial(packed.packed_matmul, bits=bits, group_size=group, activations=activations, unit=unit, blocks=blocks and choice.Blocks(*blocks))
    return f, args
