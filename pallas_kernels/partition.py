"""Products whose arrays are split over the devices of a mesh.

The compiler does not partition kernels, so a product runs inside a `shard_map`. The caller has to
state how its arrays are split (`placed`), because on a mesh with Auto axes their types do not. If a
mesh axis splits both the weight and the tokens, the words of the weight are all-gathered in packed
form, as in `shard.fsdp`.
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
    """How a weight, or a stack of weights, and the inputs of its products are split over a mesh.

    Attributes:
      mesh: the mesh.
      rows: mesh axes that split the rows of the weight, over which the product sums.
      columns: mesh axes that split the columns of the weight.
      tokens: mesh axes that split the rows of the input.
      stack: for each leading axis of the stack, in order, the mesh axes that split it.
    """

    mesh: Mesh | AbstractMesh
    rows: Axes = ()
    columns: Axes = ()
    tokens: Axes = ()
    stack: tuple[Axes, ...] = ()


_placed = Setting[Placement | None]("placed", None)


@contextlib.contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """State how the arrays of those products are split that are traced inside the `with` block.

    Args:
      placement: how the arrays are split; None states nothing.
    """
    with _placed.set(placement):
        yield


def in_force() -> Placement | None:
    """Return the placement that `placed` states here.

    Returns:
      The placement; None if there is none, if its mesh is a single device, or inside a `shard_map`
      over all axes of its mesh.
    """
    placement = _placed.get()
    if placement is None or placement.mesh.size == 1:
        return None
    by_hand = set(jax.sharding.get_abstract_mesh().manual_axes)
    return None if by_hand >= set(placement.mesh.axis_names) else placement


def of_product(x: Array) -> Placement | None:
    """Return how the arrays of a product are split; None if they are not, or if it is not known.

    Args:
      x: the input [m, k].
    Raises:
      ValueError: the weight is split over another mesh than the one in force.
    """
    placement = in_force()
    if placement is None:
        return None
    mesh = _in_context(placement.mesh)
    # `stack` has split the leading axes already.
    of = placement.rows, placement.columns, placement.tokens
    rows, columns, tokens = map(_free(), of)
    return Placement(mesh, rows, columns, _dividing(mesh, tokens, len(x)))


def of_experts(x: Array) -> Placement | None:
    """Return how rows sorted by expert and the matrices of the experts are split over a mesh.

    Args:
      x: the rows [m, k].
    Returns:
      A placement whose `tokens` divide the rows of x evenly, and whose `stack` holds the axes that
      split the experts. Its `rows` and `columns` hold those that split each matrix, without those
      that split the rows of x. None if nothing is split, or if it is not known how.
    Raises:
      ValueError: the weight is split over another mesh than the one in force.
    """
    placement = in_force()
    if placement is None:
        return None
    mesh, free = _in_context(placement.mesh), _free()
    experts, tokens = free((placement.stack or ((),))[-1]), free(placement.tokens)
    rows, columns = free(placement.rows), free(placement.columns)
    tokens = _dividing(mesh, tuple(a for a in tokens if a not in experts), len(x))
    left = lambda axes: tuple(a for a in axes if a not in _shared(axes, tokens))
    return Placement(mesh, left(rows), left(columns), tokens, (experts,))


def explicit_mesh(*arrays: Array | None) -> AbstractMesh | None:
    """Return the mesh with Explicit axes, and more than one device, that arrays are on.

    Args:
      *arrays: traced arrays, or None for absent ones.
    Returns:
      The mesh in force or, if that has no Explicit axes, the first such mesh of an array; None if
      there is none.
    """
    meshes = [jax.typeof(a).sharding.mesh for a in arrays if a is not None]
    for mesh in (jax.sharding.get_abstract_mesh(), *meshes):
        if not mesh.empty and AxisType.Explicit in mesh.axis_types and mesh.size > 1:
            return mesh
    return None


def sharding(a: Array, spec: Callable[[list[Any]], list[Any]]) -> NamedSharding | None:
    """Return the sharding of a value that is computed from an array and split like it.

    Args:
      a: the array, or a `jax.ShapeDtypeStruct`.
      spec: function from the list of the mesh axes of each axis of the array (None or a tuple of
        names) to the list of those of the value.
    Returns:
      The sharding; None if no axis of the mesh is Explicit.
    """
    mesh = explicit_mesh(a) if isinstance(a, jax.Array) else None
    if mesh is None:
        return None
    return NamedSharding(mesh, P(*spec([part or None for part in typed_axes(a)])))


def can_split(op: str, *arrays: Array | None) -> bool:
    """Return whether a product can run on shards of its arrays; else the compiler splits it.

    Args:
      op: name of the op.
      *arrays: its arrays.
    Raises:
      ValueError: it cannot, and the mesh has Explicit axes, which the compiler does not split.
    """
    if op.removesuffix("_transposed") in shard.ROWS:
        return True
    if explicit_mesh(*arrays) is not None:
        raise ValueError(
            f"{op}: its arrays cannot be split over Explicit axes; use Auto axes, or keep the "
            "weight on every device (jax.sharding.PartitionSpec())"
        )
    return False


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
      local: function that computes the op on the shards of one device, given the op's name, its
        arrays and its static arguments.
      op: name of the op.
      placement: how the arrays are split.
      x: the input [m, k], of a dtype that the op supports.
      *weight: the arrays of the weight, as in `dispatch.product`.
      **static: the static arguments of the op.
    Returns:
      float32 [m, n], split like x along m and like the weight along n, except over the mesh axes
      along which the weight is gathered.
    Raises:
      ValueError: a shard would not consist of whole words, whole groups or whole tiles.
    """
    mesh, rows, columns, tokens = (
        placement.mesh, placement.rows, placement.columns, placement.tokens
    )  # fmt: skip
    transposed = op.endswith("_transposed")
    shared = (*_shared(rows, tokens), *_shared(columns, tokens))
    if rows and not transposed and static.get("activations", "float") != "float":
        shared = tuple(dict.fromkeys((*shared, *rows)))  # the scale of a token needs its whole row
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
        with placed(None):  # a mapped axis of `jax.vmap` is not among the axes split by hand
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
    """Return mapped(x, weights), where each device multiplies by the matrices that it holds.

    Args:
      mapped: function of x and a tree of stacks that maps a product over their leading axes.
      x: the input; its leading axes are the axes `paired` of the stacks.
      weights: tree of stacks.
      leading: number of leading axes of the stacks.
      paired: those of the leading axes of the stacks that x has too.
    """
    placement = in_force() if leading else None
    if placement is None:
        return mapped(x, weights)
    by_stack = [*map(_free(), last_axes(placement.stack, leading))]
    if not any(by_stack):
        return mapped(x, weights)
    spec = lambda kept: spec_of([by_stack[a] for a in kept])
    split = jax.shard_map(
        mapped, mesh=_in_context(placement.mesh), in_specs=(spec(paired), spec(range(leading))),
        out_specs=spec(range(leading)), axis_names={n for part in by_stack for n in part},
        check_vma=False,
    )  # fmt: skip
    return split(x, weights)


def varied(*arrays: Any) -> tuple:
    """Return arrays that all vary over those axes of a checked `shard_map` over which any varies.

    JAX requires of a derivative rule that the cotangent of an array has the type of the array. With
    this cast it does, and JAX sums the cotangent over the axes that the cast added.

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
    """Return those of the axes that split an array along which it has to be gathered.

    They are the first axis that also splits the tokens, and all axes after it: a later axis of the
    tuple subdivides the shards of the earlier ones, so an array cannot stay split along it alone.
    """
    first = next((i for i, a in enumerate(axes) if a in tokens), len(axes))
    return axes[first:]


def last_axes(stack: tuple[Axes, ...], leading: int) -> tuple[Axes, ...]:
    """Return the mesh axes that split each of the leading axes that a stack has here.

    A scan or a look-up takes leading axes away, from the first on.

    Args:
      stack: the mesh axes of every leading axis of the whole stack; axes left out are whole.
      leading: number of leading axes.
    """
    known = stack[max(0, len(stack) - leading) :]
    return (*((),) * (leading - len(known)), *known)


def _in_context(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """Return the mesh in force, the types of whose axes may differ, as within `auto_axes`."""
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.shape != mesh.shape:
        raise ValueError(
            f"the weights are split over a mesh with the axes {dict(mesh.shape)}, but the mesh in "
            f"force (jax.set_mesh) has the axes {dict(context.shape)}; use one mesh for both"
        )
    return mesh if context.empty else context


def _free() -> Callable[[Axes], Axes]:
    """Return a function that drops the mesh axes over which a `shard_map` has split arrays."""
    by_hand = set(jax.sharding.get_abstract_mesh().manual_axes)
    return lambda axes: tuple(a for a in axes if a not in by_hand)


def _weight_specs(
    op: str, placement: Placement, weight: Sequence[Array | None], k: int, static: dict[str, Any]
) -> list[P]:
    """Return how each array is split; raise ValueError if that breaks words, groups or tiles."""
    op, mesh = op.removesuffix("_transposed"), placement.mesh
    static = {name: value for name, value in static.items() if name != "k"}
    parts = shard.ends(op, mesh, placement.rows, placement.columns, *weight, k=k, **static)
    ndims = (0 if a is None else a.ndim for a in weight)
    return [spec_of(spread(part, ndim)) for part, ndim in zip(parts, ndims, strict=True)]


def _dividing(mesh: Mesh | AbstractMesh, axes: Axes, length: int) -> Axes:
    """Return the longest prefix of mesh axes whose number of devices divides a length."""
    while axes and length % size_of(mesh, axes):
        axes = axes[:-1]
    return axes


def typed_axes(a: Array) -> tuple[Axes, ...]:
    """Return the mesh axes that split each axis of an array, according to its type.

    Args:
      a: the array; on a mesh with Auto axes, its type does not tell.
    """
    return axes_of(jax.typeof(a).sharding.spec, a.ndim)


def _gathered(a: Array, spec: P, axes: Axes) -> Array:
    """Return a shard all-gathered along those of its mesh axes that are among `axes`."""
    for i, names in enumerate(axes_of(spec, a.ndim)):
        for name in reversed(names):
            if name in axes:
                a = jax.lax.all_gather(a, name, axis=i, tiled=True)
    return a
