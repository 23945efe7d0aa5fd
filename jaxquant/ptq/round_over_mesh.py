"""Rounding of a stack that is split over a mesh: each device rounds the matrices that it holds."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxquant.core.hosts import on_host
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
      axes: names of the mesh axes that split the leading axis `axis`.
      parts: number of equal parts into which they split it.
      batch: lengths of all leading axes of the stack.
      axis: index of the leading axis that is split.
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
        """Partition specification of an array that has the leading axes of the stack."""
        return P(*(None,) * self.axis, self.axes)

    @property
    def each(self) -> P:
        """Partition specification of an array whose leading axis runs over the parts."""
        return P(self.axes)

    def indices(self, i: int) -> list[int]:
        """Return the index, among all matrices of the stack, of matrix i of every part.

        Args:
          i: index of a matrix within each part.

        >>> mesh = jax.make_mesh((1,), ("x",))
        >>> Split(mesh, ("x",), 2, (3, 4), 1).indices(1)
        [1, 3]
        """
        place, length = np.unravel_index(i, self.own), self.own[self.axis]
        move = lambda part: (at + part * length * (a == self.axis) for a, at in enumerate(place))
        return [int(np.ravel_multi_index([*move(p)], self.batch)) for p in range(self.parts)]


def split_of(w: Any, entry: WeightEntry) -> Split | None:
    """Return how the matrices of a leaf are split over a mesh along one leading axis.

    Args:
      w: the leaf.
      entry: the plan's entry for the leaf.
    Returns:
      The split; None if the leaf is traced, is not on a mesh, or is not split along exactly one
      leading axis.
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
    """Stack one tree of whole arrays per part, and split the result as the matrices are split.

    Args:
      trees: the trees, one for each part, of equal structure and shapes.
      split: how the matrices are split.
    Returns:
      The tree of arrays with a leading axis over the parts.
    """
    place = NamedSharding(split.mesh, split.each)

    def put(*parts: Any) -> Array:
        a = np.stack([on_host(part) for part in parts])
        return jax.make_array_from_callback(a.shape, place, lambda index: a[index])

    def one(*parts: Array) -> Array:
        if not jnp.issubdtype(parts[0].dtype, jax.dtypes.prng_key):
            return put(*parts)
        data = put(*map(jax.random.key_data, parts))  # a key is no NumPy array
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(parts[0]))

    return jax.tree.map(one, *trees)


@partial(jax.jit, static_argnames=("method", "split"))
def round_each(
    matrices: Array, sums: Sums, i: Array, keys: Keys, method: Method, known: Any, split: Split
) -> tuple[Arrays, Report, Bool[Array, " parts"]]:
    """Round matrix i of every part, each on the devices that hold it.

    Args:
      matrices: the matrices [N, k, n].
      sums: their second moments, with flattened leading axes [N, ...].
      i: index of the matrix within each part, an integer.
      keys, known: as in `round_matrix`, with a leading axis over the parts.
      method: as in `round_matrix`.
      split: how the matrices are split.
    Returns:
      What `round_matrix` returns, with a leading axis over the parts.
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
    if pools is not None:  # the index of every matrix's pool is split like the matrices
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
    """Return the arrays of all matrices, given those of matrix 0, 1, ... of every part.

    Args:
      split: how the matrices are split.
      *groups: for each index within a part, the arrays with a leading axis over the parts.
    Returns:
      The arrays with the leading axes of the stack.
    """

    def one(*a: Array) -> Array:
        apart = jnp.stack(a, axis=1).reshape(split.parts, *split.own, *a[0].shape[1:])
        return jnp.moveaxis(apart, 0, split.axis).reshape(*split.batch, *a[0].shape[1:])

    return jax.tree.map(one, *groups)
