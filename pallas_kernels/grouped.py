"""Grouped products: rows sorted by expert, each times the packed matrix of its expert.

They serve mixtures of experts. The op "packed_matmul" has the grouped form "grouped_packed_matmul",
and so has every op; its arrays are those of the op with a leading axis of experts, followed by the
number of rows of each expert. Kernels read only the words of experts that have rows.
"""

from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import product


def grouped_matmul(
    op: str,
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, "e"],
    *arrays: Array | None,
    **static: Any,
) -> Float[Array, "m n"]:
    """Return the product of every row of x with the matrix of its expert.

    The first group_sizes[0] rows meet matrix 0, the next group_sizes[1] rows matrix 1, and so on.
    Rows past sum(group_sizes) give zeros, as in `jax.lax.ragged_dot`. It is differentiable as
    `dispatch.product` is.

    Args:
      op: name of the product with one matrix, a function of this package such as "packed_matmul".
      x: activations [m, k], float32, bfloat16 or float16.
      group_sizes: int32 [e], the number of rows of each expert.
      *arrays: the arrays of the op after x, each with a leading axis of e experts.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n].
    Raises:
      ValueError: an argument is not what the op requires; the message names it.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import layout
    >>> codes = jnp.stack([layout.pack(jnp.full((8, 1), c), 4) for c in (1, -2)])
    >>> x, sizes, scale = jnp.ones((3, 8)), jnp.array([1, 2]), jnp.ones((2, 1, 1))
    >>> y = grouped_matmul("packed_matmul", x, sizes, codes, scale, None, bits=4, group_size=8)
    >>> y.ravel().tolist()
    [8.0, -16.0, -16.0]
    """
    checks.single(op)
    return product(f"grouped_{op}", x, *arrays, group_sizes, **static)
