"""Grouped products: rows sorted by expert, each times the packed matrix of its expert.

They serve mixtures of experts. The op "packed_matmul" has the grouped form "grouped_packed_matmul",
and so has every op; its arrays are those of the op with a leading axis of experts, followed by the
number of rows of each expert. Kernels read only the words of experts that have rows.

Where the experts are split over a mesh with Explicit axes, every device multiplies the rows of its
own experts, and the results are added.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, PyTree

from pallas_kernels import checks, explicit
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
    of_group = lambda x, sizes, a: product(f"grouped_{op}", x, *a, sizes, **static)
    return by_experts(of_group, x, group_sizes, arrays)


def by_experts(
    of_group: Callable[[Array, Array, Any], Array],
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, "e"],
    stacks: PyTree,
) -> Float[Array, "m n"]:
    """Return of_group(x, group_sizes, stacks), each device taking the experts that it holds.

    On a mesh with Explicit axes all rows go to every device, and stacks that are split along other
    axes are gathered. Elsewhere the function is called as it is.

    Args:
      of_group: a grouped product; rows past the sum of the sizes give zeros.
      x: rows sorted by expert [m, k].
      group_sizes: number of rows of each expert [e].
      stacks: tree of arrays with a leading axis of experts.
    """
    leaves = jax.tree.leaves(stacks)
    mesh = explicit.mesh_of(x, group_sizes, *leaves)
    if mesh is None:
        return of_group(x, group_sizes, stacks)
    split = (*jax.typeof(leaves[0]).sharding.spec, None)[0]

    def local(x: Array, sizes: Array, stacks: Any) -> Array:
        if split is None:
            return of_group(x, sizes, stacks)
        held = len(jax.tree.leaves(stacks)[0])
        first = jax.lax.axis_index(split) * held
        start = jnp.sum(jnp.where(jnp.arange(len(sizes)) < first, sizes, 0))
        mine = jax.lax.dynamic_slice_in_dim(sizes, first, held)
        y = of_group(jnp.roll(x, -start, axis=0), mine, stacks)
        return jax.lax.psum(jnp.roll(y, start, axis=0), split)

    specs = (P(), P(), P(split))
    put = lambda a, spec: jax.sharding.reshard(a, jax.sharding.NamedSharding(mesh, spec))
    given = put(x, P()), put(group_sizes, P()), jax.tree.map(lambda a: put(a, P(split)), stacks)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(*given)
