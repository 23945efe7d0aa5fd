"""Products over a mesh of devices, with weights communicated only as packed words.

The compiler does not partition kernels, so each op runs inside `shard_map` on the local shard.

| | x | words | y | collective |
|---|---|---|---|---|
| `column_parallel` | replicated | columns | columns | none |
| `row_parallel` | channels | rows | replicated | psum of y |
| `fsdp` | rows (tokens) | rows | rows (tokens) | all-gather of the packed words |
"""

from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.shard_specs import column_specs, local_static, row_specs


def column_parallel(
    op: str, mesh: Mesh, axis: str, x: Float[Array, "m k"], *arrays: Array | None, **static: Any
) -> Float[Array, "m n"]:
    """Return the product with the columns of weight and result split over a mesh axis.

    Args:
      op: name of the op, such as "packed_matmul".
      mesh: the device mesh.
      axis: name of the mesh axis.
      x: activations [m, k], replicated.
      *arrays: the arrays of the op after x.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n], split along columns.
    Raises:
      ValueError: the size of the mesh axis does not divide the columns of an array.

    >>> import jax.numpy as jnp
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> from pallas_kernels.codecs import layout
    >>> codes, scale = layout.pack(jnp.ones((16, 4), int), 2), jnp.ones((1, 4))
    >>> static = {"bits": 2, "group_size": 16}
    >>> column_parallel("packed_matmul", mesh, "model", jnp.ones((1, 16)), codes, scale, None,
    ...                 **static).tolist()
    [[16.0, 16.0, 16.0, 16.0]]
    """
    specs = column_specs(op, mesh.shape[axis], axis, *arrays)
    local = lambda x, *arrays: dispatch.product(op, x, *arrays, **static)
    return _mapped(local, mesh, (P(), *specs), P(None, axis))(x, *arrays)


def row_parallel(
    op: str, mesh: Mesh, axis: str, x: Float[Array, "m k"], *arrays: Array | None, **static: Any
) -> Float[Array, "m n"]:
    """Return the product with the rows of the weight and the channels of x split.

    The partial sums are added by a psum.

    Args:
      op, mesh, axis: as in `column_parallel`.
      x: activations [m, k], split along the channels.
      *arrays: the arrays of the op after x.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n], replicated.
    Raises:
      ValueError: a shard would not consist of whole words, whole groups or whole tiles.
    """
    size = mesh.shape[axis]
    specs = row_specs(op, size, axis, *arrays, k=x.shape[1], **static)
    here = local_static(static, x.shape[1], size)
    local = lambda x, *arrays: jax.lax.psum(dispatch.product(op, x, *arrays, **here), axis)
    return _mapped(local, mesh, (P(None, axis), *specs), P())(x, *arrays)


def fsdp(
    op: str, mesh: Mesh, axis: str, x: Float[Array, "m k"], *arrays: Array | None, **static: Any
) -> Float[Array, "m n"]:
    """Return the product with tokens split, all-gathering the sharded weight in packed form.

    The weight is stored split by rows, and gathered only for the product.

    Args:
      op, mesh, axis: as in `column_parallel`.
      x: activations [m, k], split along the rows (tokens).
      *arrays: the arrays of the op after x.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n], split along the rows (tokens).
    Raises:
      ValueError: a shard would not consist of whole words, whole groups or whole tiles.
    """
    specs = row_specs(op, mesh.shape[axis], axis, *arrays, k=x.shape[1], **static)
    local = lambda x, *arrays: dispatch.product(op, x, *gathered(arrays, specs, axis), **static)
    return _mapped(local, mesh, (P(axis), *specs), P(axis))(x, *arrays)


def gathered(arrays: tuple, specs: tuple, axis: str) -> tuple:
    """Return, inside `shard_map`, the arrays all-gathered along the axis that `specs` split.

    Args:
      arrays: local shards, or None for absent arrays.
      specs: partition specification of each array.
      axis: name of the mesh axis.
    """

    def whole(a: Array | None, spec: P) -> Array | None:
        if a is None or axis not in spec:
            return a
        return jax.lax.all_gather(a, axis, axis=tuple(spec).index(axis), tiled=True)

    return tuple(whole(a, spec) for a, spec in zip(arrays, specs, strict=True))


def _mapped(fn: Any, mesh: Mesh, in_specs: tuple, out_specs: P) -> Any:
    # The check is off because kernels do not declare which mesh axes their results vary over.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
