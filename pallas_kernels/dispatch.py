"""The table of operations: which implementation serves an op, its derivative rule.

Today every op is served by its reference. Kernels for CPU, GPU and TPU enter `packed_matmul`
here, chosen at lowering (`lax.platform_dependent`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import reference


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def packed_matmul(
    x: Float[Array, "m k"],
    codes: Array,
    scale: Array,
    zero: Array | None,
    bits: int,
    group_size: int,
) -> Float[Array, "m n"]:
    """x @ w for w in packed uniform codes. See `reference.packed_matmul` for the arguments.

    The backward rule multiplies by the packed words again, so no float copy of w is kept as a
    residual. Scales get their true cotangent; codes and zero points, being integers, none.

    >>> from pallas_kernels import layout
    >>> codes = layout.pack(jnp.array([[1], [-2]]), 4)
    >>> packed_matmul(jnp.ones((1, 2)), codes, jnp.array([[0.5]]), None, 4, 2).tolist()
    [[-0.5]]
    """
    return reference.packed_matmul(x, codes, scale, zero, bits=bits, group_size=group_size)


def _forward(x: Array, codes: Array, scale: Array, zero: Array | None, bits: int, group_size: int):
    y = packed_matmul(x, codes, scale, zero, bits, group_size)
    return y, (x, codes, scale, zero)


def _backward(bits: int, group_size: int, residuals: tuple, g: Array):
    x, codes, scale, zero = residuals
    k = x.shape[-1]
    dx = reference.packed_matmul_transposed(
        g, codes, scale, zero, bits=bits, group_size=group_size, k=k
    )
    # Linear in the scale: its cotangent is that of the unscaled product, traced only if used.
    weights = partial(
        reference.dequantize, codes, zero=zero, bits=bits, group_size=group_size, k=k,
        dtype=jnp.float32,
    )  # fmt: skip
    _, pull = jax.vjp(lambda s: weights(s), scale)
    (dscale,) = pull(jnp.dot(x.T.astype(jnp.float32), g.astype(jnp.float32)))
    return dx.astype(x.dtype), _float0(codes), dscale, None if zero is None else _float0(zero)


def _float0(a: Array) -> np.ndarray:
    return np.zeros(a.shape, jax.dtypes.float0)


packed_matmul.defvjp(_forward, _backward)
