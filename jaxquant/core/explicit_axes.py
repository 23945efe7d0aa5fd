"""Products of arrays whose types state how they are split, as on meshes with Explicit axes.

The types are read once, for the whole product. Within it the axes are Auto, so that its parts
(transforms, adapters, scales, reshapes) need not state how their results are split.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jaxtyping import Array, PyTree

from jaxquant.core.shardings import splits
from jaxquant.core.tensor import QTensor
from pallas_kernels import partition
from pallas_kernels.partition import Placement, typed_axes
from pallas_kernels.shard_specs import Axes as Names
from pallas_kernels.shard_specs import spec_of


class Axes(NamedTuple):
    """What a product does with the axes of its operands.

    Attributes:
      free: the axes of x that are neither summed over nor paired.
      paired: leading stored axis of w -> the axis of x that it is paired with (batch axes).
      labels: the axes of the result, in order: ("x", axis of x) or ("w", stored axis of w).
    """

    free: tuple[int, ...]
    paired: Mapping[int, int]
    labels: tuple[tuple[str, int], ...]


def product_over_auto_axes(
    product: Callable[..., Array],
    x: Array,
    w: QTensor,
    axes: Axes,
    out_sharding: NamedSharding | None,
    *others: Array,
) -> Array | None:
    """Return product(x, w, *others), computed over Auto axes; None if no axis is Explicit.

    Args:
      product: the product of arrays on Auto axes with a weight that knows how it is split.
      x: the input.
      w: the weight.
      axes: what the product does with the axes of x and w.
      out_sharding: how the result is split; None splits it as the kept axes of x and w are.
      *others: more arrays that the product takes.
    Raises:
      ValueError: the arrays of the weight are split in different ways, according to their types; or
        it was given shardings over another mesh.
    """
    mesh = partition.explicit_mesh(x, *jax.tree.leaves(w.arrays), *others)
    if mesh is None:
        return None
    of_x = typed_axes(x)
    placement = _with_batch(_placement(w, mesh), axes.paired, of_x)
    typed = [name for axis in axes.free for name in of_x[axis]]
    tokens = tuple(dict.fromkeys((*typed, *placement.tokens)))
    placement = dataclasses.replace(placement, tokens=tokens)
    if out_sharding is None:
        parts = _of_result(of_x, _by_stored_axis(w, placement), axes.labels)
        explicit = _explicit(mesh)
        kept = [tuple(name for name in part if name in explicit) for part in parts]
        out_sharding = NamedSharding(mesh, spec_of(kept))
    run = lambda x, w, *others: product(x, dataclasses.replace(w, placement=placement), *others)
    return over_auto_axes(run, mesh, out_sharding, x, w, *others)


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
    return over_auto_axes(fn, mesh, out, *args)


def over_auto_axes(
    fn: Callable[..., PyTree], mesh: Any, out_sharding: PyTree, *args: Any
) -> PyTree:
    """Return fn(*args), computed over Auto axes in place of the Explicit ones of a mesh.

    Args:
      fn: the function.
      mesh: the mesh.
      out_sharding: sharding of each array of the result, in a tree that may be a prefix.
      *args: trees of arrays on the mesh.
    """
    run = jax.sharding.auto_axes(fn, axes=_explicit(mesh), out_sharding=out_sharding)
    return run(*args)


def _explicit(mesh: Any) -> Names:
    """Return the names of the Explicit axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _placement(w: QTensor, mesh: Mesh | AbstractMesh) -> Placement:
    """Return how a weight is split: by the type of its codes, and over Auto axes as was given."""
    leading, parts = w.leading(), typed_axes(w.data["codes"])
    stack, rows, columns = parts[:leading], parts[leading], parts[-1]
    _check_alike(w, splits(w, mesh, rows, columns))
    known = w.placement or Placement(mesh)
    if known.mesh.shape != mesh.shape:
        raise ValueError(
            f"{w!r}: its shardings are given over a mesh with the axes {dict(known.mesh.shape)}, "
            f"but its arrays are on a mesh with the axes {dict(mesh.shape)}; use one mesh for both"
        )
    return Placement(
        mesh,
        _both(rows, known.rows),
        _both(columns, known.columns),
        known.tokens,
        tuple(map(_both, stack, partition.last_axes(known.stack, leading))),
    )


def _both(typed: Names, known: Names) -> Names:
    """Return the mesh axes that split an axis by its type or as was given, in the given order."""
    return known if {*typed} <= {*known} else (*typed, *(n for n in known if n not in typed))


def _with_batch(
    placement: Placement, paired: Mapping[int, int], of_x: tuple[Names, ...]
) -> Placement:
    """Return the placement with leading axes that are whole split as those of x that they meet."""
    stack = list(placement.stack)
    for axis, of in paired.items():
        used = {n for part in (placement.rows, placement.columns, *stack) for n in part}
        if axis < len(stack) and not stack[axis] and not used & {*of_x[of]}:
            stack[axis] = of_x[of]
    return dataclasses.replace(placement, stack=tuple(stack))


def _check_alike(w: QTensor, expected: dict[str, tuple[Names, Names]]) -> None:
    """Raise ValueError if an array is split in another way than the codes.

    Arrays that are whole are accepted, and split where the product needs it.
    """
    for name, a in w.data.items():
        own = typed_axes(a)[w.leading() :]
        ends = (own[0], own[-1] if len(own) > 1 else ()) if own else ((), ())
        first, last = expected.get(name, ((), ()))
        if ends[0] not in ((), first) or ends[1] not in ((), last):
            raise ValueError(
                f"{w!r}: its arrays are split in different ways: {name} is split over {ends}, but "
                f"the split of its codes requires {(first, last)}; use the shardings that "
                "jaxquant.distributed.sharding returns"
            )


def _by_stored_axis(w: QTensor, placement: Placement) -> dict[int, Names]:
    """Return the mesh axes that split each stored axis of a weight; axes left out are whole."""
    leading = w.leading()
    inner = {leading: placement.rows, leading + len(w.view.k): placement.columns}
    return dict(enumerate(placement.stack)) | inner


def _of_result(
    of_x: tuple[Names, ...], of_w: dict[int, Names], labels: Iterable[tuple[str, int]]
) -> list[Names]:
    """Return how the result is split; of axes that split x and w, those of x stay."""
    labels = list(labels)
    used = {name for side, axis in labels if side == "x" for name in of_x[axis]}
    left = lambda axes: tuple(name for name in axes if name not in used)
    return [of_x[a] if side == "x" else left(of_w.get(a, ())) for side, a in labels]
