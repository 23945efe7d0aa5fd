"""Beam: codes and learned codebooks in turn, each lowering the proxy loss given the other (AQLM).

The loss of an error E = W - Q is tr(E^T H E). For a format whose values are linear in its tables
(`Additive`, `Vector`):

1. tables by k-means, row i weighted by D_i of H = U D U^T: its error once feedback has done all
   it can (AQLM and VPTQ take no weight, or H_ii);
2. codes by error feedback (`ldlq`), a beam search in the metric D_b finding each block's;
3. tables by least squares on the loss itself, with conjugate gradients (AQLM: Adam);
4. codes by coordinate descent: a beam search in the metric H_bb, given all other blocks.

Steps 2, 4, 3 are repeated, then 4, 3. The last codes are chosen with the tables as stored.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.fields import check_fields
from jaxquant.rounding.ldlq import _block_rows as block_rows
from jaxquant.rounding.ldlq import _descend as descend
from jaxquant.rounding.ldlq import _feedback as feedback
from jaxquant.rounding.moments import Moments, living, unit_upper


@dataclasses.dataclass(frozen=True)
class Beam:
    """Codes by beam search, codebooks by least squares, against H = mean of x x^T.

    Attributes:
      beam: partial sums kept while the vectors of one code are sought, codebook by codebook.
      starts: times that all codes are chosen anew, by error feedback with the tables so far.
      sweeps: of coordinate descent after the last start.
      steps: of conjugate gradients at each fit of the tables.
      damping: fraction of mean(diag H) added to the diagonal for error feedback; raised as in
        `LDLQ`.
      block_size: rows between two dense updates; changes speed, not the result.

    Source: Egiazarian et al. 2024, arXiv:2401.06118 (AQLM), whose beam search and training of
    codebooks these are, with another start and closed-form fits.
    """

    beam: int = 8
    starts: int = 2
    sweeps: int = 4
    steps: int = 30
    damping: float = 0.001
    block_size: int = 128

    needs_gram: ClassVar[bool] = True
    needs_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("beam", "starts", "steps", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.sweeps < 0:
            raise ValueError(f"sweeps must not be negative, got {self.sweeps}")
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}")

    def __call__(
        self, w: Float[Array, "k n"], format: Any, moments: Moments, key: Array
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Packed data of w, and a report: the damping used, how many channels were dead."""
        gram, dead = living(moments.input)
        codes, grid, damping = self._solve(w, format, gram, key)
        report = {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}
        return format.pack(codes, grid), report

    @partial(jax.jit, static_argnames=("self", "format"))
    def _solve(self, w: Array, format: Any, gram: Array, key: Array) -> tuple[Array, Any, Array]:
        k, d = w.shape[0], format.tile[0]
        gram = gram / jnp.mean(jnp.diagonal(gram))
        u, damping = unit_upper(gram, self.damping, d)
        gram = gram + 1e-6 * jnp.eye(k)
        middle = _blocks(_upper(gram + damping * jnp.eye(k)), d)
        weights = jnp.sum(middle**2, -1).reshape(-1)  # diag D
        size = block_rows(self.block_size, 1, d)
        search, order = _Searched(format, self.beam), jnp.arange(k)
        own = jax.vmap(jnp.linalg.cholesky)(_blocks(gram, d))

        def swept(codes: Array, errors: Array, grid: Any) -> tuple[Array, Any]:
            codes = descend(w, gram, search, order, d, 1, (grid, own), codes, errors)
            return codes, fitted(w, gram, format, codes, grid, self.steps)

        def start(_: Any, state: tuple) -> tuple:
            grid = state[1]
            codes, _, errors = feedback(w, u, search, order, d, size, (grid, middle))
            return swept(codes, errors, grid)

        def sweep(_: Any, state: tuple) -> tuple:
            codes, grid = state
            return swept(codes, w - format.values(codes, grid), grid)

        grid = format.learn(w, weights, key)
        codes = jax.eval_shape(lambda: start(0, (None, grid)))[0]
        state = jnp.zeros(codes.shape, codes.dtype), grid
        state = jax.lax.fori_loop(0, self.starts, start, state)
        codes, grid = jax.lax.fori_loop(0, self.sweeps, sweep, state)
        errors = w - format.values(codes, grid)
        codes = descend(w, gram, search, order, d, 1, (grid, own), codes, errors)
        return codes, grid, damping


@dataclasses.dataclass(frozen=True)
class _Searched:
    """The format as `feedback` and `descend` see it; a grid is (the format's, roots [k / d, d, d])."""

    format: Any
    beam: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.format.tile

    def round(self, target: Array, row: tuple[Any, Array]) -> tuple[Array, Array]:
        grid, root = row
        return self.format.search(target, grid, root, self.beam)


def fitted(
    w: Float[Array, "k n"], gram: Float[Array, "k k"], format: Any, codes: Array, grid: Any,
    steps: int,
) -> Any:  # fmt: skip
    """The grid with the tables of least loss for these codes, as stored; the old if no better.

    The loss is quadratic in the tables, and its curvature is V^T H V for the linear map V from
    tables to values: conjugate gradients from the old tables, preconditioned by its diagonal.
    """
    with_tables = lambda t: grid._replace(tables=t)
    spread = lambda t: format.values(codes, with_tables(t))
    zero = jax.tree.map(jnp.zeros_like, grid.tables)
    pull = lambda e: jax.linear_transpose(spread, zero)(e)[0]
    # V has one entry per table, weight and code, the output's scale s; V 1 is s times tables.
    ones = spread(jax.tree.map(jnp.ones_like, zero))
    diagonal = pull(jnp.diagonal(gram)[:, None] * ones / len(zero))
    least = 1e-6 * jnp.mean(jnp.stack([jnp.mean(a) for a in diagonal]))
    curvature = lambda t: jax.tree.map(lambda a, b: a + least * b, pull(gram @ spread(t)), t)
    error = lambda grid: w - format.values(codes, grid)
    loss = lambda e: jnp.sum(e * (gram @ e))
    step, _ = jax.scipy.sparse.linalg.cg(
        curvature,
        pull(gram @ error(grid)),
        M=lambda t: jax.tree.map(lambda a, b: a / (b + least), t, diagonal),
        tol=0.0,
        maxiter=steps,
    )
    new = format.stored(with_tables(jax.tree.map(jnp.add, grid.tables, step)))
    better = loss(error(new)) < loss(error(grid))
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, grid)


def _upper(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """C upper triangular with C C^T = gram."""
    return jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]


def _blocks(a: Float[Array, "k k"], d: int) -> Float[Array, "b d d"]:
    """The blocks of d rows on the diagonal."""
    b = len(a) // d
    return jnp.einsum("aiaj->aij", a.reshape(b, d, b, d))
