"""How the arrays of an op are split over mesh axes, so that every shard is itself a weight."""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from pallas_kernels.codecs import layout, lookup, trellis

Axes = tuple[str, ...]  # names of mesh axes

# What the first axis of each array of an op indexes: words of codes, groups, or, for "all" and
# "whole", nothing that a split of the weight's rows divides. The last axis indexes columns, except
# in arrays that are "whole".
ROWS = {
    "packed_matmul": ("words", "groups", "groups"),
    "ternary_matmul": ("words", "groups"),
    "codebook_matmul": ("words", "groups"),
    "e8p_matmul": ("words", "words", "all"),
    "trellis_matmul": ("words", "groups"),
    "additive_matmul": ("words", "whole", "all"),
    "dual_scale_matmul": ("words", "all", "whole", "all", "whole"),
}


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
    for a, kind in zip(arrays, ROWS[op], strict=True):
        whole = a is None or a.shape[-1] == 1 or kind == "whole"
        if not whole and a.shape[-1] % size:
            raise ValueError(
                f"{op}: the {a.shape[-1]} columns of an array {list(a.shape)} cannot be divided "
                f"evenly over {size} devices; split the weight over fewer devices, or along rows"
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
            f"{unit} rows each; split the weight over fewer devices, or along columns"
        )
    splits = lambda a, kind: (
        a is not None and (kind == "words" or (kind == "groups" and a.shape[0] > 1))
    )
    return tuple(P(axis) if splits(*pair) else P() for pair in zip(arrays, ROWS[op], strict=True))


def local_static(static: dict[str, Any], k: int, size: int) -> dict[str, Any]:
    """Return the static arguments for one of `size` shards of k rows in total.

    Args:
      static: the static arguments of the whole product.
      k: number of rows of the whole weight.
      size: number of shards.
    Returns:
      The static arguments of the product of one shard.
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
            "dual_scale_matmul: the weight cannot be split along rows, because its escapes hold "
            "row numbers; split along columns"
        )
    if op == "e8p_matmul":
        return 8 * layout.unit(8)[0]  # a word of 8-bit residual codes covers this many octets
    if op == "additive_matmul":
        return static["group"] * layout.unit(lookup.digit(static["bits"]))[0]
    group = static["group_size"]
    return math.lcm(layout.unit(static.get("bits", 2))[0], 1 if group == k else group)


def ends(
    op: str,
    mesh: Mesh | AbstractMesh,
    rows: Axes,
    columns: Axes,
    *arrays: Array | None,
    k: int,
    **static: Any,
) -> list[tuple[Axes, Axes]]:
    """Return the mesh axes that split the first and the last axis of each array of a weight.

    Args:
      op: name of the op, a key of `ROWS`.
      mesh: the mesh.
      rows, columns: names of the mesh axes that split the rows and the columns of the weight.
      *arrays: the arrays of the op after x, or their shapes; None for absent ones.
      k: number of rows of the weight.
      **static: the static arguments of the op.
    Returns:
      For each array, the axes that split its first axis and those that split its last axis.
    Raises:
      ValueError: a shard would not consist of whole words, whole groups or whole tiles.
    """
    by_row = by_column = (P(),) * len(arrays)
    if rows:
        by_row = row_specs(op, size_of(mesh, rows), "rows", *arrays, k=k, **static)
    if columns:
        by_column = column_specs(op, size_of(mesh, columns), "columns", *arrays)
    return [
        (rows if tuple(r) else (), columns if tuple(c) else ())
        for r, c in zip(by_row, by_column, strict=True)
    ]


def spread(parts: tuple[Axes, Axes], ndim: int) -> list[Axes]:
    """Return the mesh axes that split each axis of an array, given those of its first and its last.

    Args:
      parts: names of the mesh axes that split the first axis, and of those that split the last.
      ndim: number of axes of the array.

    >>> spread((("data",), ("model",)), 3)
    [('data',), (), ('model',)]
    """
    found: list[Axes] = [()] * ndim
    if ndim:
        found[0] = parts[0]
        found[-1] = found[-1] or parts[1]
    return found


def size_of(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    """Return the number of devices along mesh axes: the product of their sizes.

    Args:
      mesh: the mesh.
      axes: names of the axes; for no axes, the number is 1.

    >>> size_of(AbstractMesh((2, 4), ("data", "model")), ("data", "model"))
    8
    """
    return math.prod(mesh.shape[a] for a in axes)


def axes_of(spec: P, ndim: int) -> tuple[Axes, ...]:
    """Return, for each axis of an array, the tuple of the names of the mesh axes that split it.

    Args:
      spec: the partition specification; it may have fewer parts than the array has axes.
      ndim: number of axes of the array.

    >>> axes_of(P(None, "model"), 3)
    ((), ('model',), ())
    """
    parts = (*spec, *(None,) * (ndim - len(spec)))
    return tuple(() if p is None else (p,) if isinstance(p, str) else tuple(p) for p in parts)


def spec_of(parts: Sequence[Axes]) -> P:
    """Return the partition specification for tuples of mesh axes; the inverse of `axes_of`.

    Args:
      parts: for each axis of an array, the names of the mesh axes that split it.

    >>> tuple(spec_of(((), ("model",), ("data", "model"), ())))
    (None, 'model', ('data', 'model'), None)
    """
    return P(*((part if len(part) > 1 else part[0]) if part else None for part in parts))
