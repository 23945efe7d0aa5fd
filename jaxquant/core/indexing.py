"""Rules for primitives that select parts of a stand-in: slices, look-ups, dropping axes of size 1.

Along leading axes they select matrices, which is done in every stored array, packed ones included.
Along other axes they select rows or columns, which a stand-in may support (`StandIn.narrowed`).
Otherwise the weight is made dense.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.lax import GatherDimensionNumbers, GatherScatterMode
from jaxtyping import ArrayLike, PyTree

from jaxquant.core.standin import Pick, StandIn


class Cut(NamedTuple):
    """A slice along one axis.

    Attributes:
      start: first index; may be traced.
      size: length of the slice.
      step: stride; must be 1 if `start` is traced.
    """

    start: Any
    size: int
    step: int = 1

    def __call__(self, array: jax.Array, axis: int) -> jax.Array:
        if not isinstance(self.start, int):
            return jax.lax.dynamic_slice_in_dim(array, self.start, self.size, axis)
        stop = self.start + (self.size - 1) * self.step + 1 if self.size else self.start
        return jax.lax.slice_in_dim(array, self.start, stop, self.step, axis)

    @property
    def name(self) -> str:
        """Text that tells slices apart; it omits a traced start."""
        start = self.start if isinstance(self.start, int) else ""
        return f"{start}:{self.size}:{self.step}"


def cut(w: StandIn, cuts: dict[int, Cut]) -> StandIn | None:
    """Cut a stand-in along some of its axes.

    Args:
      w: the stand-in.
      cuts: the cuts, by axis of w.

    Returns:
      The part, or None if there is no rule for it.
    """
    axes, leading, ndim = w.axes(), w.leading(), len(w.stored_shape())
    outer = {a: one for a, one in cuts.items() if axes[a] < leading}
    inner = {axes[a]: one for a, one in cuts.items() if axes[a] >= leading}

    def take(array: jax.Array) -> jax.Array:
        for axis, one in outer.items():
            array = one(array, axes[axis])
        return array

    narrowed = w.narrowed(inner) if inner else w
    if narrowed is None or not outer:
        return narrowed
    names = tuple((axis, one.name) for axis, one in outer.items())
    return narrowed.picked(Pick(take, axes, tuple(range(ndim)), names))


@quax.register(jax.lax.slice_p)
def _(w: StandIn, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    steps = strides or (1,) * w.ndim
    bounds = zip(start_indices, limit_indices, steps, strict=True)
    cuts = {
        axis: Cut(start, len(range(start, stop, step)), step)
        for axis, (start, stop, step) in enumerate(bounds)
        if (start, stop, step) != (0, w.shape[axis], 1)
    }
    found = cut(w, cuts)
    if found is not None:
        return found
    return jax.lax.slice(w.materialise(), start_indices, limit_indices, strides)


@quax.register(jax.lax.split_p)
def _(w: StandIn, *, sizes: tuple[int, ...], axis: int) -> Any:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [cut(w, {axis: Cut(*place)}) for place in zip(starts, sizes, strict=True)]
    return jax.lax.split(w.materialise(), sizes, axis) if None in parts else parts


@quax.register(jax.lax.dynamic_slice_p)
def _(w: StandIn, *starts: ArrayLike, slice_sizes: tuple[int, ...]) -> Any:
    cuts = {
        axis: Cut(jnp.asarray(start), size)
        for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True))
        if size != w.shape[axis]
    }
    found = cut(w, cuts)
    return (
        found
        if found is not None
        else jax.lax.dynamic_slice_p.bind(w.materialise(), *starts, slice_sizes=slice_sizes)
    )


@quax.register(jax.lax.squeeze_p)
def _(w: StandIn, *, dimensions: tuple[int, ...], **_: Any) -> Any:
    axes = w.axes()
    dropped = tuple(axes[d] for d in dimensions)
    kept = [a for a in range(w.ndim) if a not in dimensions]
    renumbered = tuple(axes[a] - sum(d < axes[a] for d in dropped) for a in kept)
    pick = Pick(lambda array: jax.lax.squeeze(array, dropped), renumbered, tuple(kept))
    found = w.picked(pick) if all(d < w.leading() for d in dropped) else None
    return found if found is not None else jax.lax.squeeze(w.materialise(), dimensions)


@quax.register(jax.lax.broadcast_in_dim_p)
def _(w: StandIn, *extents: Any, shape: Any, broadcast_dimensions: Any, **params: PyTree) -> Any:
    """Store new axes, along which all matrices are equal, first."""
    kept = tuple(broadcast_dimensions)
    if not extents and tuple(shape[a] for a in kept) == w.shape:
        new = [a for a in range(len(shape)) if a not in kept]
        if not new:
            return w
        sizes = tuple(shape[a] for a in new)
        axes = [
            new.index(a) if a in new else len(new) + w.axes()[kept.index(a)]
            for a in range(len(shape))
        ]
        source = tuple(None if a in new else kept.index(a) for a in range(len(shape)))
        take = lambda array: jnp.broadcast_to(array, (*sizes, *array.shape))
        found = w.picked(Pick(take, tuple(axes), source))
        if found is not None:
            return found
    return jax.lax.broadcast_in_dim_p.bind(
        w.materialise(), *extents, shape=shape, broadcast_dimensions=kept, **params
    )


@quax.register(jax.lax.gather_p)
def _(w: StandIn, ids: Any, **params: PyTree) -> Any:
    found = looked_up(w, ids, params)
    return found if found is not None else jax.lax.gather_p.bind(w.materialise(), ids, **params)


def looked_up(w: StandIn, ids: Any, params: dict[str, Any]) -> StandIn | None:
    """Return the matrices that a gather looks up along leading axes, or None for any other gather.

    The gather may also name axes of which it takes everything (`vmap` of w[i] does).

    Args:
      w: the stand-in.
      ids: the indices of the gather.
      params: the parameters of the gather primitive.
    """
    dn, sizes, axes = params["dimension_numbers"], params["slice_sizes"], w.axes()
    batching = dn.operand_batching_dims
    gone = (*dn.collapsed_slice_dims, *batching)
    chosen = {*gone, *(a for a in range(w.ndim) if sizes[a] != w.shape[a])}
    whole = [a for a in dn.start_index_map if a not in chosen]
    fills = params["mode"] == GatherScatterMode.FILL_OR_DROP
    if not chosen or any(axes[a] >= w.leading() for a in chosen):
        return None
    value = params["fill_value"]
    if fills and (whole or not (value is None or np.isnan(value))):
        return None
    names = [i for i, a in enumerate(dn.start_index_map) if a in chosen]
    ids = ids[..., jnp.array(names, int)]
    lead = max(axes[a] for a in chosen) + 1
    view_of = {axes[a]: a for a in range(w.ndim)}
    left = [s for s in range(lead) if view_of[s] not in gone]
    rank = ids.ndim - 1
    pairs = sorted(
        (axes[a], b) for a, b in zip(batching, dn.start_indices_batching_dims, strict=True)
    )

    def take(array: jax.Array) -> jax.Array:
        rest = array.ndim - lead
        numbers = GatherDimensionNumbers(
            offset_dims=tuple(range(rank, rank + len(left) + rest)),
            collapsed_slice_dims=tuple(sorted(axes[a] for a in dn.collapsed_slice_dims)),
            start_index_map=tuple(axes[dn.start_index_map[i]] for i in names),
            operand_batching_dims=tuple(a for a, _ in pairs),
            start_indices_batching_dims=tuple(b for _, b in pairs),
        )
        shape = (*(sizes[view_of[s]] for s in range(lead)), *array.shape[lead:])
        return jax.lax.gather(array, ids, numbers, shape, mode=params["mode"])

    pick = Pick(take, *_arranged(w, rank, dn.offset_dims, gone, min(chosen)))
    return w.picked(pick._replace(indices=ids, looked_up=tuple(sorted(chosen)), fills=fills))


def _arranged(
    w: StandIn, rank: int, offset_dims: tuple[int, ...], gone: tuple[int, ...], looked_up: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return `Pick.axes` and `Pick.source` of a look-up, whose index axes are stored first."""
    axes = w.axes()
    kept = [a for a in range(w.ndim) if a not in gone]
    stored = sorted(axes[a] for a in kept)
    index, offsets = iter(range(rank)), iter(kept)
    new, source = [], []
    for axis in range(rank + len(kept)):
        of = next(offsets) if axis in offset_dims else None
        new.append(next(index) if of is None else rank + stored.index(axes[of]))
        source.append(looked_up if of is None else of)
    return tuple(new), tuple(source)
