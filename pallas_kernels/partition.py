"""Products whose arrays are split over the devices of a mesh.

The compiler does not partition kernels, so a product runs inside a `shard_map`. How its arrays are
split has to be told (`placed`), because on a mesh with Auto axes their types do not say it. Words
of a weight that is split along an axis which splits the tokens too are all-gathered in packed form,
as `shard.fsdp` does.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels import shard_specs as shard
from pallas_kernels.context import Setting
from pallas_kernels.shard_specs import Axes, axes_of, size_of, spec_of, spread


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a weight, or a stack of weights, and the inputs that it meets are split over a mesh.

    Attributes:
      mesh: the mesh.
      rows: mesh axes that split the rows of the weight, which are contracted with the input.
      columns: mesh axes that split its columns.
      tokens: mesh axes that split the rows of the input.
      stack: mesh axes that split each leading axis of the stack, the last leading axis last.
    """

    mesh: Mesh | AbstractMesh
    rows: Axes = ()
    columns: Axes = ()
    tokens: Axes = ()
    stack: tuple[Axes, ...] = ()


_placed = Setting[Placement | None]("placed", None)


@contextlib.contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """Say how the arrays of the products are split that are traced inside the `with` block.

    Args:
      placement: how they are split; None says nothing.
    """
    with _placed.set(placement):
        yield


def said() -> Placement | None:
    """Return what `placed` says here; None if nothing, or in a `shard_map` over all of the mesh."""
    placement = _placed.get()
    if placement is None or placement.mesh.size == 1:
        return None
    by_hand = set(jax.sharding.get_abstract_mesh().manual_axes)
    return None if by_hand >= set(placement.mesh.axis_names) else placement


def of_product(x: Array) -> Placement | None:
    """Return how the arrays of a product are split; None if this is not known, or if they are not.

    Args:
      x: the input [m, k].
    """
    placement = said()
    if placement is None:
        return None
    mesh = _in_context(placement.mesh)
    # A stack that is split has been split by `stack`.
    of = placement.rows, placement.columns, placement.tokens
    rows, columns, tokens = map(_free(), of)
    return Placement(mesh, rows, columns, _dividing(mesh, tokens, len(x)))


def of_experts(x: Array) -> Placement | None:
    """Return how rows sorted by expert and stacks of experts are split; None if not known, or not.

    Args:
      x: the rows [m, k].
    Returns:
      The mesh, the axes that split the rows of x, evenly, in `stack` those that split the experts,
      and those that split the rows and columns of each expert's matrix, except the axes that split
      the rows of x.
    """
    placement = said()
    if placement is None:
        return None
    mesh, free = _in_context(placement.mesh), _free()
    experts, tokens = free((placement.stack or ((),))[-1]), free(placement.tokens)
    rows, columns = free(placement.rows), free(placement.columns)
    tokens = _dividing(mesh, tuple(a for a in tokens if a not in experts), len(x))
    left = lambda axes: tuple(a for a in axes if a not in _shared(axes, tokens))
    return Placement(mesh, left(rows), left(columns), tokens, (experts,))


def explicit_mesh(*arrays: Array | None) -> AbstractMesh | None:
    """Return the mesh with Explicit axes over which arrays are split; None if there is none.

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
    mesh = explicit_mesh(a) if isinstance(a, jax.Array) else None
    if mesh is None:
        return None
    return NamedSharding(mesh, P(*spec([part or None for part in _axes(a)])))


def product(
    local: Callable[..., Array],
    op: str,
    placement: Placement,
    x: Float[Array, "m k"],
    *weight: Array | None,
    **static: Any,
) -> Float[Array, "m n"]:
    """Return the product `op` of arrays that are split over the axes of a mesh.

    Args:
      local: function of the op's name, its arrays and its static arguments, which runs it on the
        shards of one device.
      op: name of the op.
      placement: how the arrays are split.
      x: the input.
      *weight: the arrays of the weight, as in `dispatch.product`.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n], split as x along m and as the weight along n.
    Raises:
      ValueError: a shard would not consist of whole words, whole groups or whole tiles.
    """
    mesh, rows, columns, tokens = (
        placement.mesh, placement.rows, placement.columns, placement.tokens
    )  # fmt: skip
    transposed = op.endswith("_transposed")
    shared = (*_shared(rows, tokens), *_shared(columns, tokens))
    if rows and not transposed and static.get("activations", "float") != "float":
        shared = tuple(dict.fromkeys((*shared, *rows)))  # scales of a token belong to whole rows
    own_rows, own_columns = (tuple(a for a in axes if a not in shared) for axes in (rows, columns))
    left, kept = (own_columns, own_rows) if transposed else (own_rows, own_columns)
    k = static["k"] if transposed else x.shape[1]
    specs = _weight_specs(op, placement, weight, k, static)
    here = shard.local_static(static, k, size_of(mesh, own_rows))
    if transposed:
        here = here | {"k": k // size_of(mesh, own_rows)}

    def run(x: Array, *parts: Array | None) -> Array:
        whole = [
            a if a is None else _gathered(a, s, shared) for a, s in zip(parts, specs, strict=True)
        ]
        y = local(op, x, *whole, **here)
        return jax.lax.psum(y, left) if left else y

    into = (spec_of((tokens, left)), *specs)
    out = spec_of((tokens, kept))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=into, out_specs=out, check_vma=False)
    return mapped(x, *weight)


def stack(
    mapped: Callable[[Array, Any], Array],
    x: Array,
    weights: Any,
    leading: int,
    paired: Sequence[int],
) -> Array:
    """Return mapped(x, weights), each device taking its own matrices of stacks that are split.

    Args:
      mapped: function of x and a tree of stacks, that maps a product over their leading axes.
      x: the input; its leading axes are those of the stacks that are mapped over together with it.
      weights: tree of stacks.
      leading: number of leading axes of the stacks.
      paired: the leading axes that x has.
    """
    placement = said() if leading else None
    if placement is None or not any(by_stack := _of_stack(placement, leading)):
        return mapped(x, weights)
    spec = lambda kept: spec_of([by_stack[a] for a in kept])
    split = jax.shard_map(
        mapped, mesh=_in_context(placement.mesh), in_specs=(spec(paired), spec(range(leading))),
        out_specs=spec(range(leading)), axis_names={n for part in by_stack for n in part},
        check_vma=False,
    )  # fmt: skip
    return split(x, weights)


def varied(*arrays: Any) -> tuple:
    """Return arrays that all vary over the axes of a checked `shard_map` that any of them does.

    The cotangent of each then has its type, which JAX requires of derivative rules, and is summed
    over the axes that the array did not vary over.

    Args:
      *arrays: arrays, or trees of them.
    """
    over = lambda a: getattr(
        getattr(jax.typeof(a), "manual_axis_type", None), "varying", frozenset()
    )
    every = frozenset().union(*map(over, jax.tree.leaves(arrays)))
    one = lambda a: jax.lax.pcast(a, tuple(every - over(a)), to="varying") if every - over(a) else a
    return jax.tree.map(one, arrays) if every else arrays


def _shared(axes: Axes, tokens: Axes) -> Axes:
    """Return which of the axes that split an array are gathered, as axes that split tokens too are.

    Shards along a later axis of a tuple are parts of those along the earlier ones, so that nothing
    can stay split along it alone.
    """
    first = next((i for i, a in enumerate(axes) if a in tokens), len(axes))
    return axes[first:]


def _of_stack(placement: Placement, leading: int) -> tuple[Axes, ...]:
    """Return the mesh axes that split each of the `leading` leading axes of a stack."""
    missing = leading - len(placement.stack)
    return (*((),) * missing, *map(_free(), placement.stack[-leading:]))


def _in_context(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """Return the mesh in force, whose axes may have other types, such as within `auto_axes`."""
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.axis_names != mesh.axis_names:
        raise ValueError(
            f"the weights are split over a mesh with the axes {list(mesh.axis_names)}, but the "
            f"mesh in force (jax.set_mesh) has {list(context.axis_names)}; use one mesh"
        )
    return mesh if context.empty else context


def _free() -> Callable[[Axes], Axes]:
    """Return a function that drops mesh axes over which a `shard_map` has split arrays already."""
    by_hand = set(jax.sharding.get_abstract_mesh().manual_axes)
    return lambda axes: tuple(a for a in axes if a not in by_hand)


def _weight_specs(
    op: str, placement: Placement, weight: Sequence[Array | None], k: int, static: dict[str, Any]
) -> list[P]:
    """Return how each array of a weight is split; ValueError if some shards would be broken."""
    op, mesh = op.removesuffix("_transposed"), placement.mesh
    static = {name: value for name, value in static.items() if name != "k"}
    parts = shard.ends(op, mesh, placement.rows, placement.columns, *weight, k=k, **static)
    ndims = (0 if a is None else a.ndim for a in weight)
    return [spec_of(spread(part, ndim)) for part, ndim in zip(parts, ndims, strict=True)]


def _dividing(mesh: Mesh | AbstractMesh, axes: Axes, length: int) -> Axes:
    """Return the first of these mesh axes that together divide a length."""
    while axes and length % size_of(mesh, axes):
        axes = axes[:-1]
    return axes


def _axes(a: Array) -> tuple[Axes, ...]:
    """Return the mesh axes over which the type of an array says that each of its axes is split."""
    return axes_of(_spec(a), a.ndim)


def _spec(a: Array) -> P:
    return jax.typeof(a).sharding.spec


def _gathered(a: Array, spec: P, axes: Axes) -> Array:
    """Return a shard all-gathered along those of its mesh axes that are among `axes`."""
    for i, names in enumerate(axes_of(spec, a.ndim)):
        for name in reversed(names):
            if name in axes:
                a = jax.lax.all_gather(a, name, axis=i, tiled=True)
    return a
