"""The shardings of the packed arrays of a weight, from the sharding of the weight itself."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxquant.core import jax_private
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import QTensor
from pallas_kernels import shard_specs
from pallas_kernels.partition import Placement
from pallas_kernels.shard_specs import axes_of, size_of, spec_of, spread

Names = tuple[str, ...]


def packed_sharding(w: QTensor, mesh: Mesh | AbstractMesh, spec: P) -> QTensor:
    """Return the shardings of the arrays of a packed weight, as `jax.device_put` accepts them.

    Args:
      w: the weight; its arrays may be `jax.ShapeDtypeStruct`s.
      mesh: the mesh; it may be an `AbstractMesh`.
      spec: the mesh axes that split each axis of the floating-point weight. Where several axes of
        the weight are merged into rows or columns, only the first of them may be split.
    Returns:
      A `QTensor` with `NamedSharding`s in place of arrays.
    Raises:
      ValueError: `spec` has more parts than the weight has axes; it splits an axis whose length the
        devices do not divide; or a shard would not consist of whole words, groups or tiles of
        codes.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> w = jq.quantize_array(jnp.ones((64, 32)), jq.rtn(bits=4))
    >>> tuple(packed_sharding(w, mesh, P(None, "model")).data["codes"].spec)
    (None, 'model')
    """
    leading, rows, columns = _parts(w, mesh, spec)
    found = splits(w, mesh, rows, columns)
    _check_stack(w, mesh, leading)

    def one(name: str, a: Any) -> NamedSharding:
        parts = spread(found.get(name, ((), ())), a.ndim - len(leading))
        return NamedSharding(mesh, spec_of((*leading, *parts)))

    return w.with_named({name: one(name, a) for name, a in w.named.items()})


def with_placements(tree: PyTree, shardings: PyTree, data_axes: Sequence[str] | None) -> PyTree:
    """Return a tree whose weights record how they are split over a mesh with Auto axes.

    Args:
      tree: tree of stand-ins and arrays.
      shardings: the same tree with `NamedSharding`s in place of arrays. None reads the shardings of
        the arrays themselves; traced arrays are skipped, since they have none on Auto axes.
      data_axes: names of the mesh axes that split the rows (tokens) of the inputs. None selects the
        axes that split no weight.
    Returns:
      The tree; weights that are not split are unchanged.
    Raises:
      ValueError: `shardings` is not a tree like `tree` with a `NamedSharding` for every array; the
        mesh lacks one of `data_axes`; or `jax.vmap` maps over an axis that is split.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_standin)
    given = leaves
    if shardings is not None:
        given, other = jax.tree.flatten(shardings, is_leaf=is_standin)
        if bool(other != structure):  # type: ignore[operator]
            raise ValueError(
                "shardings: the tree must be that of the first argument, with a NamedSharding in "
                "place of every array, but its structure differs; pass what "
                "jq.distributed.sharding returns for that argument"
            )
    found = [_placement(w, of) for w, of in zip(leaves, given, strict=True)]
    known = [p for p in found if p is not None]
    used = {name for p in known for part in (p.rows, p.columns, *p.stack) for name in part}

    def one(w: QTensor, placement: Placement) -> QTensor:
        names = placement.mesh.axis_names
        tokens = [name for name in names if name not in used] if data_axes is None else data_axes
        if unknown := [name for name in tokens if name not in names]:
            raise ValueError(
                f"data_axes: the mesh has no axes {unknown}; use some of its axes, which are "
                f"{list(names)}"
            )
        return dataclasses.replace(
            w, placement=dataclasses.replace(placement, tokens=tuple(tokens))
        )

    if not known:
        return tree
    new = [w if p is None else one(w, p) for w, p in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(structure, new)


def without_placements(tree: PyTree) -> PyTree:
    """Return a tree whose weights record no placement; the inverse of `with_placements`.

    Args:
      tree: any tree.
    """
    placed = lambda w: isinstance(w, QTensor) and w.placement is not None
    one = lambda w: dataclasses.replace(w, placement=None) if placed(w) else w
    return jax.tree.map(one, tree, is_leaf=is_standin)


def _placement(w: Any, of: Any) -> Placement | None:
    """Return how a weight is split, according to the sharding of its codes; None if it is not."""
    if of is not w and jax_private.quax_value(w) is not w and isinstance(of, QTensor):
        raise ValueError(
            "shardings: where functions that `quantized` returned call each other, only the "
            "outermost may have shardings, but an inner one was given some; give them to the "
            "outermost"
        )
    if not (isinstance(w, QTensor) and isinstance(of, QTensor)):
        return None
    codes = of.data["codes"]
    if isinstance(codes, jax.core.Tracer):
        return None
    found: Any = codes if isinstance(codes, NamedSharding) else getattr(codes, "sharding", None)
    if of is not w and not isinstance(found, NamedSharding):
        raise ValueError(
            f"shardings: expected a NamedSharding in place of every array, got {found!r}; pass "
            "what jq.distributed.sharding returns"
        )
    mesh = getattr(found, "mesh", None)
    if not isinstance(mesh, Mesh | AbstractMesh) or mesh.size == 1:
        return None
    if of is w and {*mesh.axis_types} == {AxisType.Explicit}:
        return None  # the types state it
    ndim, leading = w.data["codes"].ndim, w.leading()
    mapped = max(0, len(found.spec) - ndim)  # axes over which jax.vmap maps
    if any(found.spec[:mapped]):
        raise ValueError(
            f"{w!r}: jax.vmap maps over an axis of the stack that is split over the mesh axes "
            f"{found.spec[:mapped]}; use shard_map, or multiply by the whole stack"
        )
    parts = axes_of(P(*found.spec[mapped:]), ndim)
    # In a program over Explicit axes, the mesh in force (`auto_axes`) takes the place of this one.
    return Placement(_with_auto_axes(mesh), parts[leading], parts[-1], (), parts[:leading])


def _with_auto_axes(mesh: Any) -> Any:
    """Return the mesh with Auto axes only."""
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names)
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_auto_axes(tree: PyTree) -> tuple[PyTree, Mesh | None]:
    """Move the arrays of a tree from meshes with Explicit axes to the same meshes with Auto axes.

    Nothing is copied. A program over Explicit axes has to state how each of its values is split;
    over Auto axes the compiler decides.

    Args:
      tree: any tree.
    Returns:
      The tree on Auto axes, and the first mesh with Explicit axes, or None if no array was on one.
    """
    found: list[Mesh] = []

    def one(a: Any) -> Any:
        place = getattr(a, "sharding", None)
        if not (isinstance(a, jax.Array) and isinstance(place, NamedSharding)):
            return a
        if not isinstance(place.mesh, Mesh) or not is_explicit(place.mesh):
            return a
        found.append(place.mesh)
        return jax.device_put(a, NamedSharding(_with_auto_axes(place.mesh), place.spec))

    return jax.tree.map(one, tree), found[0] if found else None


@contextlib.contextmanager
def auto_axes_in_force(mesh: Mesh | None) -> Iterator[None]:
    """Within the block, give the mesh in force (`jax.set_mesh`) Auto axes instead of Explicit ones.

    Args:
      mesh: the mesh that `on_auto_axes` returned; None changes nothing.
    """
    if mesh is None or not is_explicit(jax.sharding.get_mesh()):
        yield
        return
    with jax.set_mesh(_with_auto_axes(mesh)):
        yield


def is_explicit(mesh: Any) -> bool:
    """Return whether an object is a mesh with at least one Explicit axis.

    Args:
      mesh: any object.
    """
    return isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types


def _parts(w: QTensor, mesh: Mesh | AbstractMesh, spec: P) -> tuple[list[Names], Names, Names]:
    """Return the mesh axes of each leading axis, of the rows and of the columns of a weight."""
    if len(spec) > w.ndim:
        raise ValueError(
            f"{spec} has {len(spec)} parts, but the weight has {w.ndim} axes; give at most one "
            "part for each axis"
        )
    stored: list[Names] = [()] * w.ndim
    for axis, part in zip(w.axes(), axes_of(spec, w.ndim), strict=True):
        stored[axis] = part
    leading = w.leading()
    n = leading + len(w.view.k)
    inner = [*stored[leading + 1 : n], *stored[n + 1 :]]
    if any(inner):
        raise ValueError(
            f"{spec} splits an axis of a weight {list(w.shape)} that is merged with others into "
            "rows or columns and is not the first of them; split the first one, or none"
        )
    for length, names in ((w.view.k[0], stored[leading]), (w.view.n[0], stored[n])):
        if length % size_of(mesh, names):
            raise ValueError(
                f"an axis of length {length} cannot be split over the {size_of(mesh, names)} "
                f"devices of {list(names)}; change the mesh, or leave the axis whole"
            )
    return stored[:leading], stored[leading], stored[n]


def _check_stack(w: QTensor, mesh: Mesh | AbstractMesh, leading: list[Names]) -> None:
    for length, names in zip(w.data["codes"].shape, leading, strict=False):
        if length % size_of(mesh, names):
            raise ValueError(
                f"{w!r}: a stack of {length} matrices cannot be split over the "
                f"{size_of(mesh, names)} devices of {list(names)}; change the mesh, or leave the "
                "axis whole"
            )


def splits(
    w: QTensor, mesh: Mesh | AbstractMesh, rows: Names, columns: Names
) -> dict[str, tuple[Names, Names]]:
    """Return the mesh axes that split the first and the last axis of each array of a weight.

    `shard_specs` determines how the arrays of the kernel's op are split. Other arrays, such as
    those of a weight in training, are split along the axes whose lengths equal those of the matrix.
    Arrays of transforms and of activation formats are not split.

    Args:
      w: the weight.
      mesh: the mesh.
      rows, columns: names of the mesh axes that split the rows and the columns of each matrix.
    Returns:
      For each name of an array, the axes of its first and of its last axis; arrays that are missing
      from the dict are whole.
    Raises:
      ValueError: the format supports no split of a matrix, or a shard would not consist of whole
        words, groups or tiles of codes.
    """
    known = _of_op(w, mesh, rows, columns)
    if known is None and not w.format.latent and (rows or columns):
        raise ValueError(
            f"matrices of the format {w.format} cannot be split along rows or columns; split the "
            "leading axes of the stack, or leave the weight whole"
        )
    own = lambda a: a.shape[w.leading() :]
    found = dict(known or {})
    firsts = {w.stored_rows: rows}
    lasts = {math.prod(w.outputs): columns}
    for name, a in w.data.items():
        if name in found or not own(a):
            continue
        first, *_, last = own(a) if len(own(a)) > 1 else (*own(a), 0)
        found[name] = firsts.get(first, ()), lasts.get(last, ())
        _check_divides(w, mesh, name, own(a), found[name])
    return found


def _check_divides(
    w: QTensor,
    mesh: Mesh | AbstractMesh,
    name: str,
    shape: Sequence[int],
    parts: tuple[Names, Names],
) -> None:
    for length, names in zip((shape[0], shape[-1]), parts, strict=True):
        if length % size_of(mesh, names):
            raise ValueError(
                f"{name} {list(shape)} of {w!r} cannot be split over the {size_of(mesh, names)} "
                f"devices of {list(names)}, which do not divide {length}; change the mesh, or "
                "leave the axis whole"
            )


def _of_op(
    w: QTensor, mesh: Mesh | AbstractMesh, rows: Names, columns: Names
) -> dict[str, tuple[Names, Names]] | None:
    """Return the result of `splits` for the arrays of the kernel's op; None if there is no op."""
    format: Any = w.format
    while hasattr(format, "adapter"):  # a frozen matrix, which its own format's op multiplies
        if format.adapter.floating:
            return None
        format = format.format
    op = f"{format.storage}_matmul" if format.storage else ""
    if op not in shard_specs.ROWS:
        return None
    static: dict[str, Any] = {}
    named: list[str | None] = []
    k = w.stored_rows

    def arguments(data: dict[str, Array]) -> tuple:
        given, found = format.arguments(data, k)
        static.update(found)
        named.extend(next((n for n, of in data.items() if of is a), None) for a in given)
        return given

    own = lambda a: jax.ShapeDtypeStruct(a.shape[w.leading() :], a.dtype)
    given = jax.eval_shape(arguments, {name: own(a) for name, a in w.data.items()})
    parts = shard_specs.ends(op, mesh, rows, columns, *given, k=k, **static)
    found = {name: part for name, part in zip(named, parts, strict=True) if name is not None}
    # An array from which an argument is computed, such as scales stored as codes, is split like it.
    shapes = {a.shape: part for a, part in zip(given, parts, strict=True) if a is not None}
    for name, a in w.data.items():
        if name not in found and own(a).shape in shapes:
            found[name] = shapes[own(a).shape]
    return found
