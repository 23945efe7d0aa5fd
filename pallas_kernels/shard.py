"""Products over a mesh of devices, with weights communicated only as packed words.

The compiler does not partition kernels, so each op runs inside `shard_map` on the local shard.

| | x | words | y | collective |
|---|---|---|---|---|
| `column_parallel` | replicated | columns | columns | none |
| `row_parallel` | channels | rows | replicated | psum of y |
| `fsdp` | rows (tokens) | rows | rows (tokens) | all-gather of the packed words |
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.codecs import layout, lookup, trellis
from pallas_kernels.dispatch import product

# What the first axis of each array of an op indexes: words of codes, groups, or nothing that rows
# of the weight are split by. The last axis indexes columns, except of arrays that are "whole".
_ROWS = {
    "packed_matmul": ("words", "groups", "groups"),
    "ternary_matmul": ("words", "groups"),
    "codebook_matmul": ("words", "groups"),
    "e8p_matmul": ("words", "words", "all"),
    "trellis_matmul": ("words", "groups"),
    "additive_matmul": ("words", "whole", "all"),
    "dual_scale_matmul": ("words", "all", "whole", "all", "whole"),
}


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
    >>> codes, scale = layout.pack(jnp.ones((16, 4), int), 2), jnp.ones((1, 4))
    >>> static = {"bits": 2, "group_size": 16}
    >>> column_parallel("packed_matmul", mesh, "model", jnp.ones((1, 16)), codes, scale, None,
    ...                 **static).tolist()
    [[16.0, 16.0, 16.0, 16.0]]
    """
    specs = column_specs(op, mesh.shape[axis], axis, *arrays)
    local = lambda x, *arrays: product(op, x, *arrays, **static)
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
    local = lambda x, *arrays: jax.lax.psum(product(op, x, *arrays, **here), axis)
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
    local = lambda x, *arrays: product(op, x, *gathered(arrays, specs, axis), **static)
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


def column_specs(op: str, size: int, axis: str, *arrays: Array | None) -> tuple[P, ...]:
    """Return how the arrays of an op are split along columns over a mesh axis of `size` devices.

    Args:
      op: name of the op.
      size: number of devices along the mesh axis.
      axis: name of the mesh axis.
      *arrays: the arrays of the op after x.
    Returns:
      The partition specification of each array.
    Raises:
      ValueError: size does not divide the columns of an array.
    """
    specs = []
    for a, kind in zip(arrays, _ROWS[op], strict=True):
        whole = a is None or a.shape[-1] == 1 or kind == "whole"
        if not whole and a.shape[-1] % size:
            raise ValueError(
                f"{op}: the {a.shape[-1]} columns of an array {list(a.shape)} do not divide over "
                f"{size} devices; split fewer ways, or another weight"
            )
        specs.append(P() if whole else P(None, axis))
    return tuple(specs)


def row_specs(
    op: str, size: int, axis: str, *arrays: Array | None, k: int, **static: Any
) -> tuple[P, ...]:
    """Return how the arrays of an op are split along rows over a mesh axis of `size` devices.

    Args:
      op: name of the op.
      size: number of devices along the mesh axis.
      axis: name of the mesh axis.
      *arrays: the arrays of the op after x.
      k: number of rows of the weight.
      **static: the static arguments of the op.
    Returns:
      The partition specification of each array.
    Raises:
      ValueError: a shard would not consist of whole words, whole groups or whole tiles.
    """
    unit = _unit(op, static, k)
    if k % (unit * size):
        raise ValueError(
            f"{op}: k = {k} rows in {size} shards must be whole words and groups, multiples of "
            f"{unit} rows each; split fewer ways, or along columns"
        )
    splits = lambda a, kind: (
        a is not None and (kind == "words" or (kind == "groups" and a.shape[0] > 1))
    )
    return tuple(P(axis) if splits(*pair) else P() for pair in zip(arrays, _ROWS[op], strict=True))


def local_static(static: dict[str, Any], k: int, size: int) -> dict[str, Any]:
    """Return the static arguments for one of `size` shards of k rows in total.

    Args:
      static: the static arguments of the whole product.
      k: number of rows of the whole weight.
      size: number of shards.
    """
    if static.get("group_size") == k:  # a single group of all rows
        return static | {"group_size": k // size}
    if len(static.get("rates", ())) > 1:
        return static | {"rates": static["rates"][: len(static["rates"]) // size]}
    return static


def _unit(op: str, static: dict[str, Any], k: int) -> int:
    """Return the number of rows of the smallest possible shard."""
    if op == "trellis_matmul":
        if len(set(static["rates"])) > 1:
            raise ValueError(
                f"trellis_matmul: rates that differ by block cannot be split along rows, got "
                f"{static['rates']}; split along columns"
            )
        return k // len(static["rates"]) if len(static["rates"]) > 1 else trellis.SIDE
    if op == "dual_scale_matmul":
        raise ValueError(
            "dual_scale_matmul: escapes hold the numbers of rows, so the weight cannot be split "
            "along rows; split along columns"
        )
    if op == "e8p_matmul":
        return 8 * layout.unit(8)[0]  # a word of 8-bit residual codes covers this many octets
    if op == "additive_matmul":
        return static["group"] * layout.unit(lookup.digit(static["bits"]))[0]
    group = static["group_size"]
    return math.lcm(layout.unit(static.get("bits", 2))[0], 1 if group == k else group)


def _mapped(fn: Any, mesh: Mesh, in_specs: tuple, out_specs: P) -> Any:
    # The check is off because kernels do not declare which mesh axes their results vary over.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
