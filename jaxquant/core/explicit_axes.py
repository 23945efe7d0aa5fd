"""Products of arrays whose types state how they are split, as on meshes with Explicit axes.

The types are read once, for the whole product. Within it the axes are Auto, so that its parts
(transforms, adapters, scales, reshapes) need not state how their results are split.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array, PyTree

from jaxquant.core.shardings import splits
from jaxquant.core.tensor import QTensor
from pallas_kernels import partition
from pallas_kernels.partition import Placement, typed_axes
from pallas_kernels.shard_specs import Axes, spec_of


def over_auto_axes(
    product: Callable[..., Array],
    x: Array,
    w: QTensor,
    free: Iterable[int],
    labels: Iterable[tuple[str, int]],
    out_sharding: NamedSharding | None,
    *others: Array,
) -> Array | None:
    """Return product(x, w, *others), computed over Auto axes; None if no axis is Explicit.

    Args:
      product: the product of arrays on Auto axes with a weight that knows how it is split.
      x: the input.
      w: the weight.
      free: the axes of x that the product keeps.
      labels: the axes of the result, in order: ("x", axis of x) or ("w", stored axis of w).
      out_sharding: how the result is split; None splits it as the kept axes of x and w are.
      *others: more arrays that the product takes.
    Raises:
      ValueError: the arrays of the weight are split in different ways, according to their types.
    """
    mesh = partition.explicit_mesh(x, *jax.tree.leaves(w.arrays), *others)
    if mesh is None:
        return None
    of_x, of_w = typed_axes(x), _placement(w, mesh)
    tokens = tuple(name for axis in free for name in of_x[axis])
    placed = dataclasses.replace(of_w, tokens=tuple(dict.fromkeys((*tokens, *of_w.tokens))))
    if out_sharding is None:
        parts = _of_result(of_x, _by_stored_axis(w, of_w), labels)
        explicit = _explicit(mesh)
        typed = [tuple(name for name in part if name in explicit) for part in parts]
        out_sharding = NamedSharding(mesh, spec_of(typed))
    run = lambda x, w, *others: product(x, dataclasses.replace(w, placement=placed), *others)
    return _run(run, mesh, out_sharding, x, w, *others)


def split_as(like: PyTree, fn: Callable[..., PyTree], *args: Any) -> PyTree:
    """Return fn(*args), computed over Auto axes, with every array split as one of `like` is.

    Args:
      like: tree of arrays, of the structure that the function returns.
      fn: the function.
      *args: trees of arrays.
    """
    mesh = partition.explicit_mesh(*jax.tree.leaves(args))
    if mesh is None:
        return fn(*args)
    out = jax.tree.map(lambda a: NamedSharding(mesh, jax.typeof(a).sharding.spec), like)
    return _run(fn, mesh, out, *args)


def _run(fn: Callable[..., PyTree], mesh: Any, out_sharding: PyTree, *args: Any) -> PyTree:
    """Return fn(*args), computed over Auto axes in place of the Explicit ones of the mesh."""
    run = jax.sharding.auto_axes(fn, axes=_explicit(mesh), out_sharding=out_sharding)
    return run(*args)


def _explicit(mesh: Any) -> Axes:
    """Return the names of the Explicit axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _placement(w: QTensor, mesh: Mesh | AbstractMesh) -> Placement:
    """Return how a weight is split: by the type of its codes, and over Auto axes as was given."""
    leading, parts = w.leading(), typed_axes(w.data["codes"])
    stack, rows, columns = parts[:leading], parts[leading], parts[-1]
    _check_alike(w, splits(w, mesh, rows, columns))
    known = w.placement or Placement(mesh)
    both = lambda typed, other: (*typed, *(name for name in other if name not in typed))
    of_stack = ((),) * (leading - len(known.stack)) + known.stack
    return Placement(
        mesh,
        both(rows, known.rows),
        both(columns, known.columns),
        known.tokens,
        tuple(map(both, stack, of_stack)),
    )


def _check_alike(w: QTensor, expected: dict[str, tuple[Axes, Axes]]) -> None:
    """Raise ValueError if an array is split in another way than the codes.

    Arrays that are whole are accepted, and split where the product needs it.
    """
    for name, a in w.data.items():
        own = typed_axes(a)[w.leading() :]
        ends = (own[0], own[-1] if len(own) > 1 else ()) if own else ((), ())
        first, last = expected.get(name, ((), ()))
        if ends[0] not in ((), first) or ends[1] not in ((), last):
            raise ValueError(
                f"{w!r}: its arrays are split in different ways: {name} over {ends}, but its codes "
                f"so that {name} must be split over {(first, last)}; use the shardings that "
                "jaxquant.distributed.sharding returns"
            )


def _by_stored_axis(w: QTensor, placement: Placement) -> dict[int, Axes]:
    """Return the mesh axes that split each stored axis of a weight; axes left out are whole."""
    leading = w.leading()
    inner = {leading: placement.rows, leading + len(w.view.k): placement.columns}
    return dict(enumerate(placement.stack)) | inner


def _of_result(
    of_x: tuple[Axes, ...], of_w: dict[int, Axes], labels: Iterable[tuple[str, int]]
) -> list[Axes]:
    """Return how the result is split; of axes that split x and w, those of x stay."""
    labels = list(labels)
    used = {name for side, axis in labels if side == "x" for name in of_x[axis]}
    left = lambda axes: tuple(name for name in axes if name not in used)
    return [of_x[a] if side == "x" else left(of_w.get(a, ())) for side, a in labels]
