"""Rounding of one matrix of a stack, of which nothing is copied before."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxquant.calibration.few_tokens import Pools
from jaxquant.calibration.statistics import Probe, Stats
from jaxquant.core.programs import program_memory
from jaxquant.core.sites import Site
from jaxquant.core.tensor import Arrays
from jaxquant.methods.method import Method
from jaxquant.ptq.round_matrix import Keys, Report, block_importance, round_matrix
from jaxquant.recipes.recipe import WeightEntry
from jaxquant.rounding import Moments


class Sums(NamedTuple):
    """Second moments of a leaf as calibration sums them up; None for those that are not needed.

    They are divided by the number of rows where a matrix is rounded, so that there are no copies.

    Attributes:
      input: sum of x x^T.
      output: sum of g g^T.
      rows: number of rows x; None if the sums are means.
      pools: what completes the sums of experts that few tokens reached; None without experts.
    """

    input: Float[Array, "*batch k k"] | None = None
    output: Float[Array, "*batch n n"] | None = None
    rows: Float[Array, "*batch"] | None = None
    pools: Pools | None = None

    @staticmethod
    def of(path: str, method: Method, stats: Stats | Mapping[str, Site] | None) -> "Sums":
        """Return the second moments that the method needs for one leaf, and no others.

        Args:
          path: path of the leaf.
          method: its method.
          stats: result of `calibrate`; with anything else there are no moments.
        """
        if not isinstance(stats, Stats) or not (method.needs_gram or method.needs_output):
            return Sums()
        return Sums.measured(path, stats, method.needs_gram, method.needs_output)

    @staticmethod
    def measured(path: str, stats: Stats, gram: bool = True, output: bool = False) -> "Sums":
        """Return the second moments of one leaf.

        Args:
          path: path of the leaf.
          stats: the statistics.
          gram, output: which of the moments are wanted.
        """
        found = stats.of(path)._replace(
            gram=stats.kept(path, "gram") if gram else None,
            output=stats.kept(path, "output") if output else None,
            extreme=None,
            typical=None,
        )
        pools = Pools.from_sums(found, stats.sites[path])
        return Sums(found.gram, found.output, found.rows, pools)

    def matrices(self, entry: WeightEntry) -> "Sums":
        """Return the sums with flattened batch axes; ValueError if their shapes do not fit."""
        *batch, k, n = entry.matrix
        for gram, size in ((self.input, k), (self.output, n)):
            if gram is not None and gram.shape != (*batch, size, size):
                raise ValueError(
                    f"{entry.path}: statistics of shape {list(gram.shape)}, expected "
                    f"{[*batch, size, size]}; calibrate the function that uses this tree"
                )
        flat = lambda a: None if a is None else a.reshape(-1, *a.shape[-2:])
        rows = None if self.rows is None else self.rows.reshape(-1)
        return Sums(flat(self.input), flat(self.output), rows, self.pools)

    def moments(self, i: int | Array) -> Moments:
        """Return the moments of matrix i of flattened sums, completed if few tokens reached it."""
        at = lambda a: None if a is None else a[i]
        none = jnp.zeros(())
        own = Probe(at(self.input), none if self.rows is None else self.rows[i], at(self.output),
                    none, none, none)  # fmt: skip
        if self.pools is not None:
            own = self.pools.completed(own, i)
        mean = lambda a: None if a is None else a / jnp.maximum(own.rows, 1)
        return Moments(mean(own.gram), mean(own.output))

    def own(self, i: int) -> "Sums":
        """Return the sums of matrix i, and of its pool, as NumPy arrays."""
        one = jax.tree.map(lambda a: np.asarray(a)[i], self._replace(pools=None))
        pool = None if self.pools is None else self.pools.only(i)
        return one._replace(pools=jax.tree.map(np.asarray, pool))


def planned(method: Method, importance: Float[np.ndarray, "blocks"]) -> Method:
    """Return a method whose format has planned its rates.

    Args:
      method: the method, whose format has `plans`.
      importance: loss per unit of relative distortion of each block of rows; `LeafJob.importance`.
    """
    return dataclasses.replace(method, format=method.format.planned(importance))


def rounding_memory(entry: WeightEntry) -> int:
    """Return the bytes that rounding one matrix of a leaf takes, besides weights and moments.

    They are those of the compiled program.

    Args:
      entry: the plan's entry for the leaf.
    """
    *_, k, n = entry.matrix
    method, zeros = entry.method, lambda *shape: jnp.zeros((1, *shape))
    sums = jax.eval_shape(
        lambda: Sums(
            zeros(k, k) if method.needs_gram else None,
            zeros(n, n) if method.needs_output else None,
            zeros(),
        )
    )
    if method.format.plans:
        method = planned(method, np.ones(method.stored(k, n)[0] // method.format.block))
    if method.input is not None and method.input.joint:  # fitted before, or folded
        method = dataclasses.replace(method, input=None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    w = jax.ShapeDtypeStruct((1, k, n), jnp.float32)
    i = jax.ShapeDtypeStruct((), jnp.int32)
    return program_memory(round_at, w, sums, i, Keys(key, key), method, None)


@partial(jax.jit, static_argnames="method")
def round_at(
    matrices: Array, sums: Sums, i: int, keys: Keys, method: Method, known: dict[str, Array] | None
) -> tuple[Arrays, Report, Bool[Array, ""]]:
    """Return `round_matrix` of matrix i.

    Args:
      matrices: the matrices [N, k, n].
      sums: their second moments, with flattened batch axes.
      i: index of the matrix.
      keys, method, known: as in `round_matrix`.
    """
    return round_matrix(matrices[i], sums.moments(i), keys, method, known)


@partial(jax.jit, static_argnames=("method", "block"))
def importance_at(
    matrices: Array, sums: Sums, i: int, keys: Keys, method: Method, block: int,
    known: dict[str, Array] | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Return `block_importance` of matrix i.

    Args:
      matrices, sums, i: as in `round_at`.
      keys, method, block, known: as in `block_importance`.
    """
    return block_importance(matrices[i], sums.moments(i), keys, method, block, known)
