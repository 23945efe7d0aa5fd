"""Products on a mesh with Explicit axes, where every array's type says how it is split.

The compiler does not partition kernels, so a product runs inside a `shard_map` that is inferred
from the types of its arrays. Words of a weight that is split along an axis which splits the tokens
too are all-gathered in packed form, as `shard.fsdp` does.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels import shard_specs as shard

Axes = tuple[str, ...]


def mesh_of(*arrays: Array | None) -> AbstractMesh | None:
    """Return the mesh over which arrays are split by their types; None if none of them is.

    Args:
      *arrays: traced arrays, or None for absent ones.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in arrays if a is not None]
    for mesh in (jax.sharding.get_abstract_mesh(), *meshes):
        if not mesh.empty and AxisType.Explicit in mesh.axis_types and mesh.size > 1:
            return mesh
    return None


def sharding(a: Array, spec: Callable[[list[Any]], list[Any]]) -> NamedSharding | None:
    """Return the sharding of a value whose axes are split as those of an array are.

    Args:
      a: the array, which may also be a `jax.ShapeDtypeStruct`.
      spec: function of the mesh axes of each axis of the array (None, a name or names), that
        returns those of the value.
    Returns:
      The sharding; None where no axis of the mesh is Explicit.
    """
    mesh = mesh_of(a) if isinstance(a, jax.Array) else None
    if mesh is None:
        return None
    return NamedSharding(mesh, P(*spec([part or None for part in _axes(a)])))


def product(
    local: Callable[..., Array], op: str, mesh: AbstractMesh, *arrays: Array | None, **static: Any
) -> Float[Array, "m n"]:
    """Return the product `op` of arrays that are split over the axes of a mesh.

    Args:
      local: function of the op's name, its arrays and its static arguments, which runs it on the
        shards of one device.
      op: name of the op.
      mesh: the mesh, with Explicit axes.
      *arrays: x and the arrays of the weight, as in `dispatch.product`.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n], split as x along m and as the weight along n.
    Raises:
      ValueError: the arrays of the weight are split in different ways, or a shard would not consist
        of whole words, whole groups or whole tiles.
    """
    x, *weight = arrays
    tokens, _ = _axes(x)
    rows, columns = _of_weight(op, weight)
    shared = tuple(a for a in (*rows, *columns) if a in tokens)
    if rows and static.get("activations", "float") != "float":
        shared = tuple(dict.fromkeys((*shared, *rows)))  # scales of a token belong to whole rows
    left, kept = (tuple(a for a in axes if a not in shared) for axes in (rows, columns))
    size = lambda axes: math.prod(mesh.shape[a] for a in axes)
    if rows:
        _check_rows(op, size(rows), weight, x.shape[1], static)
    here = shard.local_static(static, x.shape[1], size(left))

    def run(x: Array, *parts: Array | None) -> Array:
        whole = [None if a is None else _gathered(a, s, shared) for a, s in zip(parts, specs[1:], strict=True)]
        y = local(op, x, *whole, **here)
        return jax.lax.psum(y, left) if left else y

    specs = (P(tokens or None, left or None), *(_spec(a) for a in weight))
    on = lambda a, spec: None if a is None else jax.sharding.reshard(a, NamedSharding(mesh, spec))
    out = P(tokens or None, kept or None)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return mapped(*map(on, arrays, specs))


def stack(
    mapped: Callable[[Array, Any], Array], x: Array, weights: Any, leading: int, paired: list[int]
) -> Array:
    """Return mapped(x, weights), each device taking its own matrices of stacks that are split.

    Args:
      mapped: function of x and a tree of stacks, that maps a product over their leading axes.
      x: the input; its leading axes are those of the stacks that are mapped over together with it.
      weights: tree of stacks.
      leading: number of leading axes of the stacks.
      paired: the leading axes that x has.
    """
    arrays = jax.tree.leaves(weights)
    mesh = mesh_of(x, *arrays) if leading else None
    if mesh is None or not any(by_stack := _axes(arrays[0])[:leading]):
        return mapped(x, weights)
    spec = lambda kept: P(*(by_stack[a] or None for a in kept))
    names = {name for part in by_stack for name in part}
    rest = _axes(x)[len(paired) :]
    rest = [tuple(name for name in part if name not in names) or None for part in rest]
    x = jax.sharding.reshard(x, NamedSharding(mesh, P(*spec(paired), *rest)))
    split = jax.shard_map(
        mapped, mesh=mesh, in_specs=(spec(paired), spec(range(leading))),
        out_specs=spec(range(leading)), axis_names=names, check_vma=False,
    )  # fmt: skip
    return split(x, weights)


def _of_weight(op: str, weight: list[Array | None]) -> tuple[Axes, Axes]:
    """Return the axes over which the rows and the columns of a weight are split."""
    rows, columns = set(), set()
    for a, kind in zip(weight, shard.ROWS[op], strict=True):
        if a is None:
            continue
        first, *_, last = _axes(a) if a.ndim > 1 else (_axes(a)[0], ())
        if kind == "words" or (kind == "groups" and a.shape[0] > 1):
            rows.add(first)
        if kind != "whole" and a.ndim > 1 and a.shape[-1] > 1:
            columns.add(last)
    if len(rows) > 1 or len(columns) > 1:
        raise ValueError(
            f"{op}: the arrays of one weight are split in different ways, "
            f"{[str(_spec(a)) for a in weight if a is not None]}; split all of them alike"
        )
    return next(iter(rows), ()), next(iter(columns), ())


def _check_rows(op: str, size: int, weight: list, k: int, static: dict[str, Any]) -> None:
    """Raise ValueError if a shard would not consist of whole words, groups or tiles."""
    shard.row_specs(op, size, "rows", *weight, k=k, **static)


def _axes(a: Array) -> tuple[Axes, ...]:
    """Return the mesh axes over which each axis of an array is split."""
    parts = tuple(_spec(a))
    parts = (*parts, *(None,) * (a.ndim - len(parts)))
    return tuple(() if p is None else (p,) if isinstance(p, str) else tuple(p) for p in parts)


def _spec(a: Array | None) -> P:
    return P() if a is None else jax.typeof(a).sharding.spec


def _gathered(a: Array, spec: P, axes: Axes) -> Array:
    """Return a shard all-gathered along those of its mesh axes that are among `axes`."""
    for i, part in enumerate(spec):
        names = () if part is None else (part,) if isinstance(part, str) else tuple(part)
        for name in reversed(names):
            if name in axes:
                a = jax.lax.all_gather(a, name, axis=i, tiled=True)
    return a
