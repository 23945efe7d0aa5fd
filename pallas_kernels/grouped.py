"""Grouped products: rows sorted by expert, each multiplied by the packed matrix of its expert.

They serve mixtures of experts. Every op has a grouped form, such as "grouped_packed_matmul" for
"packed_matmul". Its arrays are those of the op, each with a leading axis of experts, followed by
the number of rows of each expert. Kernels read only the words of experts that have rows.

If the experts are split over a mesh, every device multiplies the rows of its own experts, and the
results are added.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, PyTree

from pallas_kernels import checks, partition
from pallas_kernels.dispatch import product
from pallas_kernels.partition import Placement
from pallas_kernels.shard_specs import spec_of, spread


def grouped_matmul(
    op: str,
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, "e"],
    *arrays: Array | None,
    **static: Any,
) -> Float[Array, "m n"]:
    """Return the product of every row of x with the matrix of its expert.

    The first group_sizes[0] rows are multiplied by matrix 0, the next group_sizes[1] rows by matrix
    1, and so on. Rows past sum(group_sizes) give zeros, as in `jax.lax.ragged_dot`. The product is
    differentiable in the same way as `dispatch.product`.

    Args:
      op: name of the product with one matrix, a function of this package such as "packed_matmul".
      x: activations [m, k] sorted by expert, float32, bfloat16 or float16.
      group_sizes: int32 [e], the number of rows of each expert, 0 or more.
      *arrays: the arrays of the op after x, each with a leading axis of e experts; None for absent
        ones.
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
    split: Callable[[Placement], PyTree] | None = None,
) -> Float[Array, "m n"]:
    """Return of_group(x, group_sizes, stacks), where each device serves the experts that it holds.

    If no array is split, or if it is not known how, this is a plain call of the function. Rows that
    the mesh splits stay split. Without `split`, stacks that are split along axes other than that of
    the experts are gathered, in packed form.

    Args:
      of_group: a grouped product that returns zeros for rows past the sum of the sizes.
      x: rows sorted by expert [m, k].
      group_sizes: int32 [e], the number of rows of each expert.
      stacks: tree of arrays with a leading axis of experts.
      split: function from a placement of one matrix to a tree like `stacks`, which holds, for every
        array, the mesh axes that split its first and its last axis after the axis of experts. With
        it, rows and columns of matrices that are split over Auto axes stay split, except along axes
        that split the rows of x. Default: None.
    Returns:
      The result of `of_group` for all rows [m, n].
    """
    placement = partition.of_experts(x)
    if placement is None:
        return of_group(x, group_sizes, stacks)
    if split is None:
        placement = dataclasses.replace(placement, rows=(), columns=())
    (experts,), tokens, added = placement.stack, placement.tokens, placement.rows

    def local(x: Array, sizes: Array, stacks: Any) -> Array:
        if tokens:
            sizes = _within(sizes, jax.lax.axis_index(tokens) * len(x), len(x))
        if experts:
            held = len(jax.tree.leaves(stacks)[0])
            first = jax.lax.axis_index(experts) * held
            start = jnp.sum(jnp.where(jnp.arange(len(sizes)) < first, sizes, 0))
            mine = jax.lax.dynamic_slice_in_dim(sizes, first, held)
            with partition.placed(None):
                y = of_group(jnp.roll(x, -start, axis=0), mine, stacks)
            y = jnp.roll(y, start, axis=0)
        else:
            with partition.placed(None):
                y = of_group(x, sizes, stacks)
        return jax.lax.psum(y, (*experts, *added)) if (*experts, *added) else y

    rows, columns = (spec_of((tokens, axes)) for axes in (added, placement.columns))
    whole = jax.tree.map(lambda _: ((), ()), stacks) if split is None else split(placement)
    specs = jax.tree.map(
        lambda a, parts: spec_of([experts, *spread(parts, a.ndim - 1)]), stacks, whole
    )
    mapped = jax.shard_map(
        local, mesh=placement.mesh, in_specs=(rows, P(), specs), out_specs=columns, check_vma=False
    )
    return mapped(x, group_sizes, stacks)


def _within(sizes: Int32[Array, "e"], start: Array, count: int) -> Int32[Array, "e"]:
    """Return how many of the rows start, ..., start + count - 1 belong to each expert."""
    end = jnp.clip(jnp.cumsum(sizes) - start, 0, count)
    return jnp.diff(end, prepend=0).astype(sizes.dtype)
