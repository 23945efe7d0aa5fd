"""How the packed arrays of a weight are split over a mesh, where the weight itself is split so."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxquant.core.tensor import QTensor
from pallas_kernels import shard_specs

Names = tuple[str, ...]


def packed_sharding(w: QTensor, mesh: Mesh, spec: P) -> QTensor:
    """Return the shardings of the arrays of a packed weight, as `jax.device_put` takes them.

    Args:
      w: the weight; its arrays may be `jax.ShapeDtypeStruct`s.
      mesh: the mesh.
      spec: the mesh axes over which the axes of the weight are split, as for the floating-point
        weight. Axes that are merged with others into rows or columns are split at the first of
        them only.
    Returns:
      A `QTensor` with `NamedSharding`s in place of arrays.
    Raises:
      ValueError: `spec` has more parts than the weight has axes, or splits it where no shard would
        consist of whole words, groups or tiles of codes.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> w = jq.quantize_array(jnp.ones((64, 32)), jq.rtn(bits=4))
    >>> packed_sharding(w, mesh, P(None, "model")).data["codes"].spec
    PartitionSpec(None, 'model')
    """
    leading, rows, columns = _parts(w, spec)
    kinds = _kinds(w, mesh, rows, columns)

    def one(name: str, a: Any) -> NamedSharding:
        kind, own = kinds.get(name, "whole"), a.shape[len(leading) :]
        parts: list[Names | None] = [None] * len(own)
        if kind == "words" or (kind == "groups" and own[0] > 1):
            parts[0] = rows
        if kind != "whole" and len(own) > 1 and own[-1] > 1:
            parts[-1] = columns
        return NamedSharding(mesh, P(*(part or None for part in (*leading, *parts))))

    return w.with_named({name: one(name, a) for name, a in w.named.items()})


def on_auto_axes(tree: PyTree) -> tuple[PyTree, Mesh | None]:
    """Return a tree whose arrays lie on meshes with Auto axes, and the mesh that had Explicit ones.

    Nothing is copied. Programs over Explicit axes have to say how everything in them is split;
    over Auto axes the compiler finds out.

    Args:
      tree: any tree.
    Returns:
      The tree, and the mesh, or None if no array lies on a mesh with Explicit axes.
    """
    found: list[Mesh] = []

    def one(a: Any) -> Any:
        mesh = getattr(getattr(a, "sharding", None), "mesh", None)
        if not isinstance(a, jax.Array) or not is_explicit(mesh):
            return a
        found.append(mesh)
        auto = Mesh(mesh.devices, mesh.axis_names)
        return jax.device_put(a, NamedSharding(auto, a.sharding.spec))

    return jax.tree.map(one, tree), found[0] if found else None


def is_explicit(mesh: Any) -> bool:
    """Return whether a mesh has Explicit axes; anything else has not.

    Args:
      mesh: the mesh.
    """
    return isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types


def _parts(w: QTensor, spec: P) -> tuple[list[Names], Names, Names]:
    """Return the mesh axes of each leading axis, of the rows and of the columns of a weight."""
    if len(spec) > w.ndim:
        raise ValueError(f"{spec} has {len(spec)} parts, but the weight has {w.ndim} axes")
    stored: list[Names] = [()] * w.ndim
    for axis, part in zip(w.axes(), spec, strict=False):
        stored[axis] = () if part is None else (part,) if isinstance(part, str) else tuple(part)
    leading = w.leading()
    n = leading + len(w.view.k)
    inner = [*stored[leading + 1 : n], *stored[n + 1 :]]
    if any(inner):
        raise ValueError(
            f"{spec} splits an axis of {list(w.shape)} that is not the first of those merged into "
            f"rows or columns; split the first one, or none"
        )
    return stored[:leading], stored[leading], stored[n]


def _kinds(w: QTensor, mesh: Mesh, rows: Names, columns: Names) -> dict[str, str]:
    """Return what the first axis of each of the format's arrays indexes; see `shard_specs.ROWS`."""
    op = f"{w.format.storage}_matmul" if w.format.storage else ""
    if op not in shard_specs.ROWS:
        if rows or columns:
            raise ValueError(f"weights of the format {w.format} cannot be split; split the stack")
        return {}
    kinds: dict[str, str] = {}
    static: dict[str, Any] = {}
    k = w.stored_rows

    def arguments(data: dict[str, Array]) -> tuple:
        given, named = w.format.arguments(data, k)
        static.update(named)
        for a, kind in zip(given, shard_specs.ROWS[op], strict=True):
            kinds.update({name: kind for name, of in data.items() if of is a})
        return given

    own = lambda a: jax.ShapeDtypeStruct(a.shape[w.leading() :], a.dtype)
    given = jax.eval_shape(arguments, {name: own(a) for name, a in w.data.items()})
    size = lambda names: math.prod(mesh.shape[name] for name in names)
    if rows:
        shard_specs.row_specs(op, size(rows), "rows", *given, k=k, **static)
    if columns:
        shard_specs.column_specs(op, size(columns), "columns", *given)
    return kinds
