"""Rounding of a stack that is split over a mesh: each device rounds its own layers or experts."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxquant.core.tensor import Arrays
from jaxquant.methods.method import Method
from jaxquant.ptq.round_matrix import Keys, Report, round_matrix
from jaxquant.ptq.round_stacked import Sums
from jaxquant.recipes.recipe import WeightEntry
from pallas_kernels.shard_specs import axes_of, size_of


class Split(NamedTuple):
    """How a stack [*batch, k, n] is split along one of its leading axes.

    Attributes:
      mesh: the mesh.
      axes: names of the mesh axes that split it.
      parts: number of parts.
      batch: lengths of the leading axes.
      axis: the leading axis that is split.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    parts: int
    batch: tuple[int, ...]
    axis: int

    @property
    def own(self) -> tuple[int, ...]:
        """Lengths of the leading axes of one part."""
        return tuple(n // self.parts if i == self.axis else n for i, n in enumerate(self.batch))

    @property
    def whole(self) -> P:
        """Partition specification of an array with the leading axes of the stack."""
        return P(*(None,) * self.axis, self.axes)

    @property
    def each(self) -> P:
        """Partition specification of an array with a leading axis over the parts."""
        return P(self.axes)

    def indices(self, i: int) -> list[int]:
        """Return the indices, among all matrices, of matrix i of every part."""
        place, length = np.unravel_index(i, self.own), self.own[self.axis]
        move = lambda part: (at + part * length * (a == self.axis) for a, at in enumerate(place))
        return [int(np.ravel_multi_index([*move(p)], self.batch)) for p in range(self.parts)]


def split_of(w: Any, entry: WeightEntry) -> Split | None:
    """Return how the matrices of a leaf are split over a mesh by one leading axis, or None.

    Args:
      w: the leaf.
      entry: the plan's entry for it.
    """
    place = None if isinstance(w, jax.core.Tracer) else getattr(w, "sharding", None)
    *batch, _, _ = entry.matrix
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return None
    by_axis = [axes_of(place.spec, w.ndim)[axis] for axis in entry.order[: len(batch)]]
    split = [axis for axis, names in enumerate(by_axis) if names]
    if len(split) != 1:
        return None
    names = by_axis[split[0]]
    parts = size_of(place.mesh, names)
    return Split(place.mesh, names, parts, tuple(batch), split[0]) if parts > 1 else None


def together(trees: Sequence[Any], split: Split) -> Any:
    """Return trees of whole arrays, one for each part, stacked and split as the matrices are.

    Args:
      trees: the trees.
      split: how the matrices are split.
    """
    place = NamedSharding(split.mesh, split.each)
    return jax.tree.map(lambda *a: jax.device_put(jnp.stack(a), place), *trees)


@partial(jax.jit, static_argnames=("method", "split"))
def round_each(
    matrices: Array, sums: Sums, i: Array, keys: Keys, method: Method, known: Any, split: Split
) -> tuple[Arrays, Report, Bool[Array, " parts"]]:
    """Return `round_matrix` of matrix i of every part, with a leading axis over the parts.

    Args:
      matrices: the matrices [N, k, n].
      sums: their second moments, with flattened batch axes.
      i: index of the matrix within each part.
      keys, known: as in `round_matrix`, with a leading axis over the parts.
      method: as in `round_matrix`.
      split: how the matrices are split.
    """

    def local(matrices: Array, sums: Sums, pools: Any, i: Array, keys: Keys, known: Any) -> Any:
        flat = lambda a: a.reshape(-1, *a.shape[len(split.batch) :])
        own = lambda tree: jax.tree.map(lambda a: a[0], tree)
        matrices, sums = jax.tree.map(flat, (matrices, sums))
        if pools is not None:
            sums = sums._replace(pools=pools._replace(of=pools.of.reshape(-1)))
        out = round_matrix(matrices[i], sums.moments(i), own(keys), method, own(known))
        return jax.tree.map(lambda a: jnp.asarray(a)[None], out)

    apart = lambda a: a.reshape(*split.batch, *a.shape[1:])
    pools, of_pools = sums.pools, None
    if pools is not None:  # that of every matrix is split as the matrices are; the pools are not
        pools = pools._replace(of=apart(pools.of))
        of_pools = jax.tree.map(lambda _: P(), pools)._replace(of=split.whole)
    mapped: Any = jax.shard_map(
        local, mesh=split.mesh, out_specs=split.each, check_vma=False,
        in_specs=(split.whole, split.whole, of_pools, P(), split.each, split.each),
    )  # fmt: skip
    stacks = jax.tree.map(apart, (matrices, sums._replace(pools=None)))
    return mapped(*stacks, pools, i, keys, known)


@partial(jax.jit, static_argnums=0)
def interleaved(split: Split, *groups: Arrays) -> Arrays:
    """Return the arrays of all matrices, from those of matrix 0, 1, ... of every part.

    Args:
      split: how the matrices are split.
      *groups: arrays with a leading axis over the parts.
    """

    def one(*a: Array) -> Array:
        apart = jnp.stack(a, axis=1).reshape(split.parts, *split.own, *a[0].shape[1:])
        return jnp.moveaxis(apart, 0, split.axis).reshape(*split.batch, *a[0].shape[1:])

    return jax.tree.map(one, *groups)
