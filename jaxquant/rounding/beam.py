"""Beam: alternate between codes and learned codebooks, each given the other (AQLM).

In turn, codes and tables lower the proxy loss tr(E^T H E) of the error E = W - Q. For a format
whose values are linear in its tables (`Additive`, `Vector`), the steps are:

1. tables by k-means, with row i weighted by H_ii;
2. codes by error feedback (`ldlq`), with blocks of rows in order of decreasing energy. The codes of
   a block come from a beam search in the metric D_b of H = U D U^T, which measures the error that
   later blocks cannot compensate;
3. tables by least squares on the loss itself, with conjugate gradients, then rounded for storage;
4. codes by coordinate descent: a beam search in the metric H_bb, given all other blocks.

Steps 3 and 4 are repeated.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Format, Grid, Moments, Rounder
from jaxquant.formats.codebook_format import CodebookFormat
from jaxquant.rounding.ldlq import block_rows, descend, feedback
from jaxquant.rounding.moments import living, unit_upper, upper


@dataclasses.dataclass(frozen=True)
class Beam(Rounder):
    """Codes by beam search and codebooks by least squares, against H = mean of x x^T.

    Attributes:
      beam: beam width: number of partial sums kept while the vectors of a code are chosen, codebook
        by codebook.
      sweeps: number of sweeps of coordinate descent, each after a fit of the tables.
      steps: number of steps of conjugate gradients in each fit.
      damping: fraction of mean(diag H) added to the diagonal for error feedback; raised as in
        `LDLQ`.
      block_size: number of rows between two dense updates; it changes the speed, not the result.

    Source: Egiazarian et al. 2024, arXiv:2401.06118 (AQLM), which starts from k-means alone and
    trains the tables with Adam. Its beams grow from the old code; ours start afresh, and the old
    code stays where it is better. Liu et al. 2024, arXiv:2409.17066 (VPTQ), has only the k-means
    and the feedback, in order of H_ii.
    """

    beam: int = 8
    sweeps: int = 6
    steps: int = 20
    damping: float = 0.001
    block_size: int = 128

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "beam", "steps", "block_size", "damping")
        if self.sweeps < 0:
            raise ValueError(f"sweeps must not be negative, got {self.sweeps}")

    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the packed arrays of w and a report.

        Args:
          w: float32 matrix [k, n].
          format: a format with learned codebooks (`Additive`, `Vector`).
          moments: second moments; that of the inputs is required.
          key: random key for the initial codebooks.
        Returns:
          Packed arrays, and a report with the damping used and the number of dead channels.
        Raises:
          ValueError: the format has no learned codebooks, or the second moment or the key is
            missing.
        """
        if not isinstance(format, CodebookFormat):
            raise ValueError(
                f"Beam needs a format with learned codebooks (Additive, Vector), got {format}"
            )
        if key is None:
            raise ValueError(
                "Beam starts from random codebooks, so it needs a key, such as jax.random.key(0)"
            )
        gram, dead = living(moments.input)
        gram = gram / jnp.mean(jnp.diagonal(gram))
        grid = format.learn(w, jnp.diagonal(gram), key)
        codes, damping = first_codes(w, gram, format, grid, self)
        codes, grid = swept(w, gram, format, codes, grid, self)
        report = {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}
        return format.pack(codes, grid), report


@dataclasses.dataclass(frozen=True)
class _Searched:
    """The format for `feedback` and `descend`; its grid is (format's grid, roots [k / d, d, d])."""

    format: CodebookFormat
    beam: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.format.tile

    def round(self, target: Array, row: tuple[PyTree, Array]) -> tuple[Array, Array]:
        grid, root = row
        return self.format.search(target, grid, root, self.beam)


@partial(jax.jit, static_argnames=("format", "options"))
def first_codes(
    w: Float[Array, "k n"],
    gram: Float[Array, "k k"],
    format: CodebookFormat,
    grid: Grid,
    options: Beam,
) -> tuple[Array, Float[Array, ""]]:
    """Return codes [k / d, ...] by error feedback with these tables, and the damping used.

    Blocks with the most energy go first, so that later blocks can compensate for their errors.

    Args:
      w: matrix [k, n].
      gram: second moment H [k, k], without dead channels.
      format: format with learned codebooks.
      grid: tables of the format.
      options: the rounder.
    """
    k, d = w.shape[0], format.tile[0]
    blocks = jnp.argsort(-jnp.diagonal(gram).reshape(-1, d).sum(1), stable=True)
    order = (blocks[:, None] * d + jnp.arange(d)).reshape(-1)
    gram = gram[order][:, order]
    u, damping = unit_upper(gram, options.damping, d)
    roots = _blocks(upper(gram + damping * jnp.eye(k)), d)
    roots = jnp.zeros_like(roots).at[blocks].set(roots)  # in stored order
    search, size = _Searched(format, options.beam), block_rows(options.block_size, 1, d)
    codes, _, _ = feedback(w[order], u, search, order, d, size, (grid, roots))
    return jnp.zeros_like(codes).at[blocks].set(codes), damping


@partial(jax.jit, static_argnames=("format", "options"))
def swept(
    w: Float[Array, "k n"], gram: Float[Array, "k k"], format: CodebookFormat, codes: Array,
    grid: Grid, options: Beam,
) -> tuple[Array, PyTree]:  # fmt: skip
    """Return codes and grid after `sweeps` rounds of fitting tables and coordinate descent.

    No step raises the loss.

    Args:
      w: matrix [k, n].
      gram: second moment H [k, k], without dead channels.
      format: format with learned codebooks.
      codes: initial codes [k / d, ...].
      grid: initial tables.
      options: the rounder.
    """
    k, d = w.shape[0], format.tile[0]
    search, order = _Searched(format, options.beam), jnp.arange(k)
    gram = gram + 1e-6 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(k)
    roots = jax.vmap(jnp.linalg.cholesky)(_blocks(gram, d))

    def sweep(_: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        codes, grid = state
        grid = fitted(w, gram, format, codes, grid, options.steps)
        errors = w - format.values(codes, grid)
        return descend(w, gram, search, order, d, 1, (grid, roots), codes, errors), grid

    return jax.lax.fori_loop(0, options.sweeps, sweep, (codes, grid))


def fitted(
    w: Float[Array, "k n"], gram: Float[Array, "k k"], format: CodebookFormat, codes: Array,
    grid: Grid, steps: int,
) -> Grid:  # fmt: skip
    """Return the grid with the tables of least loss for these codes, rounded for storage.

    The old grid is returned if the new one is no better. The loss is quadratic in the tables, with
    curvature V^T H V for the linear map V from tables to values. It is minimized by conjugate
    gradients from the old tables, preconditioned by the diagonal of the curvature.

    Args:
      w: matrix [k, n].
      gram: second moment H [k, k].
      format: format with learned codebooks.
      codes: codes [k / d, ...].
      grid: old tables.
      steps: maximum number of steps of conjugate gradients.
    """
    replaced = lambda tables: grid._replace(tables=tables)
    values = lambda tables: format.values(codes, replaced(tables))
    zero = jax.tree.map(jnp.zeros_like, grid.tables)
    pull = lambda e: jax.linear_transpose(values, zero)(e)[0]
    # A column of V holds the output scale s wherever its entry is used; V 1 is s times the tables.
    spread = values(jax.tree.map(jnp.ones_like, zero)) / len(zero)
    diagonal = pull(jnp.diagonal(gram)[:, None] * spread)
    ridge = 1e-6 * jnp.mean(jnp.concatenate([a.reshape(-1) for a in diagonal]))  # unused entries
    step, _ = jax.scipy.sparse.linalg.cg(
        lambda t: jax.tree.map(lambda a, b: a + ridge * b, pull(gram @ values(t)), t),
        pull(gram @ (w - values(grid.tables))),
        M=lambda t: jax.tree.map(lambda a, b: a / (b + ridge), t, diagonal),
        tol=1e-5,  # below float32 precision, conjugate gradients divide zero by zero
        maxiter=steps,
    )

    def loss(grid: Grid) -> Array:
        e = w - format.values(codes, grid)
        return jnp.sum(e * (gram @ e))

    new = format.stored(replaced(jax.tree.map(jnp.add, grid.tables, step)))
    better = loss(new) < loss(grid)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, grid)


def _blocks(a: Float[Array, "k k"], d: int) -> Float[Array, "b d d"]:
    """Return the diagonal blocks of d rows."""
    b = len(a) // d
    return jnp.einsum("aiaj->aij", a.reshape(b, d, b, d))
