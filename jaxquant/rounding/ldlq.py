"""LDLQ: round rows in order and feed each row's error to the rows still to come (GPTQ).

With H = U D U^T, U unit upper triangular, and E = W - Q, the proxy loss tr(E^T H E) equals
sum_j D_j |(U^T E)_j|^2, where (U^T E)_j = E_j + sum_{i<j} U_ij E_i depends only on row j and rows
before it. So row j is best rounded from the target T_j = W_j + sum_{i<j} U_ij E_i. This is GPTQ
(Frantar et al. 2022, arXiv:2210.17323) without the inverse of H, and LDLQ (Chee et al. 2023,
arXiv:2307.13304) in reverse order. For a format that codes d rows together, feedback goes from
block to block of d rows, with U block-unit (Tseng et al. 2024, arXiv:2402.04396).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Data, Format, Grid, GridFormat, Moments, Rounder
from jaxquant.rounding.moments import living, living_diagonal, measured, row_by_row, unit_upper


@dataclasses.dataclass(frozen=True)
class LDLQ(Rounder):
    """Error feedback against the second moment of the inputs, H = mean of x x^T.

    Attributes:
      damping: fraction of mean(diag H) added to the diagonal; raised tenfold, up to 8 times, until
        the factorization is finite.
      act_order: visit rows in order of decreasing diag H, with the grids of groups fixed beforehand
        from the unrounded weights ("static groups"), so that groups stay contiguous in storage;
        only for formats that code one row at a time. If False, rows are visited in order, and if
        the format can fit grids group by group, the grid of each group is fitted to its updated
        weights.
      block_size: number of rows between two dense updates; it changes the speed, not the result.
      passes: number of sweeps of coordinate descent afterwards. A sweep rounds each block of rows
        again, given all others, and keeps the new codes where the loss falls.
      scales: multiples of the format's own scale to try, since the targets that feedback makes
        spread wider than W. The one with the least loss on a sample of columns is used for all.

    Source: Frantar et al. 2022, arXiv:2210.17323; Chee et al. 2023, arXiv:2307.13304.
    """

    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128
    passes: int = 0
    scales: tuple[float, ...] = ()

    needs_gram: ClassVar[bool] = True
    takes_ranges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "damping", "block_size")
        if self.passes < 0:
            raise ValueError(f"passes must not be negative, got {self.passes}")
        if not all(s > 0 for s in self.scales):
            raise ValueError(f"scales must be positive, got {self.scales}")

    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[Data, Data]:
        """Return the packed arrays of w and a report.

        Args:
          w: float32 matrix [k, n].
          format: a format that chooses codes row by row (`GridFormat`).
          moments: second moments; that of the inputs is required.
          key: ignored.
        Returns:
          Packed arrays, and a report with the damping used and the number of dead channels.
        Raises:
          ValueError: the format does not take error feedback or `act_order`, `scales` are given
            while grids are fitted group by group, or the second moment is missing.
        """
        return self.within(None, w, format, moments, key)

    def within(
        self,
        ranges: Float[Array, "k n"] | None,
        w: Float[Array, "k n"],
        format: Format,
        moments: Moments,
        key: Array | None = None,
    ) -> tuple[Data, Data]:
        """Round as a call does, but fix the grids by `ranges` instead of w unless it is None."""
        del key
        format = row_by_row(format)
        k, d = w.shape[0], format.tile[0]
        if self.act_order and d > 1:
            raise ValueError(f"act_order needs a format that codes one row at a time, got {format}")
        g = format.rows_per_group(k)
        gram = measured(moments.input)
        dead, energies = living_diagonal(gram)
        order = None
        if self.act_order:
            order = jnp.argsort(-jnp.where(dead, 0.0, energies), stable=True)
            energies = energies[order]
        visited = lambda: (living(gram, order)[0], jnp.mean(energies))
        u, damping = unit_upper(visited, self.damping, d)
        fixed = self.act_order or g >= k or d > 1 or not format.fits
        fixed = fixed or ranges is not None
        grid = format.grids(w if ranges is None else ranges) if fixed else None
        size = block_rows(self.block_size, 1 if fixed else g, d)
        places = jnp.arange(k) if order is None else order
        w = w if order is None else w[order]
        fed = partial(feedback, u=u, format=format, order=places, g=g, size=size)
        if self.scales and grid is None:
            raise ValueError(
                "scales needs grids that are fixed beforehand: use act_order=True, or "
                "one group per output"
            )
        if self.scales:
            grid = _best_scale(w, visited()[0], format, grid, self.scales, fed)
        codes, grid, errors = fed(w, grid=grid)
        if self.passes:
            own, mean = visited()
            damped = own + damping * mean * jnp.eye(k)
            codes = descend(w, damped, format, places, g, self.passes, grid, codes, errors)
        if order is not None:
            codes = jnp.zeros_like(codes).at[order].set(codes)
        report = {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}
        return format.pack(codes, grid), report


def block_rows(block_size: int, group: int, d: int) -> int:
    """Return the number of rows between two dense updates.

    It is the largest multiple of whole groups and format blocks within `block_size`, or one such
    unit.

    Args:
      block_size: desired number of rows.
      group: number of rows per group.
      d: number of rows that a code covers.
    """
    return max(1, block_size // math.lcm(group, d)) * math.lcm(group, d)


@partial(jax.jit, static_argnames=("format", "g", "size"))
def feedback(
    w: Float[Array, "k n"],
    u: Float[Array, "k k"],
    format: GridFormat,
    order: Array,
    g: int,
    size: int,
    grid: Grid,
) -> tuple[Array, Grid, Float[Array, "k n"]]:
    """Round w with error feedback.

    Args:
      w: matrix [k, n], rows in visiting order.
      u: unit or block-unit upper triangular factor [k, k] of the second moment.
      format: format that chooses the codes.
      order: stored index of each visited row.
      g: number of rows per group.
      size: number of rows between two dense updates.
      grid: grid in stored order; row i uses group order[i] // g. If it is None, rows must be in
        stored order, and the grid of a group is fitted when its first row is reached, to the rows
        as updated by then.
    Returns:
      Codes [k / d, ...] in visiting order, the grid in stored order, and the errors W - Q.
    """
    k, n = w.shape
    d = format.tile[0]
    full = -(-k // size) * size
    w = jnp.pad(w, ((0, full - k), (0, 0)))
    u = jnp.pad(u, ((0, full - k), (0, full - k))) + jnp.diag(
        (jnp.arange(full) >= k).astype(w.dtype)
    )
    fixed = grid is not None
    if grid is None:
        one = jax.eval_shape(format.fit, jax.ShapeDtypeStruct((g, n), w.dtype))
        grid = jax.tree.map(lambda a: jnp.ones((full // g, *a.shape), a.dtype), one)
    group_of = jnp.pad(order, (0, full - k)) // g
    code = jax.eval_shape(
        format.round, jax.ShapeDtypeStruct((d, n), w.dtype), jax.tree.map(lambda a: a[0], grid)
    )[0]

    def step(state: tuple, start: Array, t: Array, ub: Array, block: Array, i: Array) -> tuple:
        """Round the d rows of the block at row i; e holds the errors of the block so far."""
        e, codes, grid = state
        if not fixed:
            grid = jax.lax.cond(
                (block + i) % g == 0,
                lambda: _fitted(format, grid, start, t, ub, e, i, (block + i) // g, g),
                lambda: grid,
            )
        feed = jax.lax.dynamic_slice_in_dim(ub, i, d, 1)
        target = jax.lax.dynamic_slice_in_dim(t, i, d, 0) + feed.T @ e
        row = jax.tree.map(lambda a: a[group_of[block + i]], grid)
        code, value = format.round(target, row)
        original = jax.lax.dynamic_slice_in_dim(start, i, d, 0)
        e = jax.lax.dynamic_update_slice_in_dim(e, original - value, i, 0)
        return e, codes.at[(block + i) // d].set(code), grid

    def lazy(b: Array, state: tuple) -> tuple:
        errors, codes, grid = state
        block = b * size
        start = jax.lax.dynamic_slice_in_dim(w, block, size, 0)
        columns = jax.lax.dynamic_slice_in_dim(u, block, size, 1)
        t = start + columns.T @ errors  # rows not yet rounded have zero error
        ub = jax.lax.dynamic_slice_in_dim(columns, block, size, 0)
        e, codes, grid = jax.lax.fori_loop(
            0,
            size // d,
            lambda j, inner: step(inner, start, t, ub, block, j * d),
            (jnp.zeros((size, n), w.dtype), codes, grid),
        )
        return jax.lax.dynamic_update_slice_in_dim(errors, e, block, 0), codes, grid

    codes = jnp.zeros((full // d, *code.shape), code.dtype)
    start = (jnp.zeros((full, n), w.dtype), codes, grid)
    errors, codes, grid = jax.lax.fori_loop(0, full // size, lazy, start)
    groups = -(-k // g)
    return codes[: k // d], jax.tree.map(lambda a: a[:groups], grid), errors[:k]


def _fitted(
    format: GridFormat, grid: Grid, start: Array, t: Array, ub: Array, e: Array, i: Array,
    index: Array, g: int,
) -> Grid:  # fmt: skip
    """Return the grid with the group that starts at row i fitted to its rows as GPTQ updates them.

    Given the errors E_P so far, the rows of the group would move, if left unrounded, to W_G - e_G
    with U_GG^T e_G = -U_PG^T E_P: the least-squares response of the rows that are still free.
    """
    columns = jax.lax.dynamic_slice_in_dim(ub, i, g, 1)
    original = jax.lax.dynamic_slice_in_dim(start, i, g, 0)
    feed = jax.lax.dynamic_slice_in_dim(t, i, g, 0) - original + columns.T @ e
    u_gg = jax.lax.dynamic_slice_in_dim(columns, i, g, 0)
    response = jax.scipy.linalg.solve_triangular(u_gg.T, feed, lower=True)
    fitted = format.fit(original + response)
    return jax.tree.map(lambda a, b: a.at[index].set(b), grid, fitted)


SAMPLE = 64  # number of columns on which scales are compared


def _best_scale(
    w: Array, gram: Array, format: GridFormat, grid: Grid, scales: tuple[float, ...], fed: Callable
) -> Grid:
    """Return the grid times the scale with the least loss after feedback on a sample of columns."""
    width, n = format.tile[1], w.shape[1]
    tiles = n // width
    chosen = np.arange(tiles)[:: max(1, tiles * width // SAMPLE)]
    columns = (chosen[:, None] * width + np.arange(width)).ravel()
    sampled = lambda a: a[..., columns] if a.shape[-1] == n else a

    def loss(scale: Array) -> Array:
        trial = jax.tree.map(sampled, format.rescaled(grid, scale))
        _, _, e = fed(w[:, columns], grid=trial)
        return jnp.sum(e * (gram @ e))

    losses = jax.lax.map(loss, jnp.asarray(scales, w.dtype))
    return format.rescaled(grid, jnp.asarray(scales, w.dtype)[jnp.argmin(losses)])


@partial(jax.jit, static_argnames=("format", "g", "passes"))
def descend(
    w: Array, gram: Array, format: GridFormat, order: Array, g: int, passes: int, grid: Grid,
    codes: Array, errors: Array,
) -> Array:  # fmt: skip
    """Return the codes after `passes` sweeps of coordinate descent.

    A sweep rounds each block of rows again, given all other errors. The loss of a block is then
    (q - t)^T H_bb (q - t) + const with t = q + H_bb^-1 (H E)_b. The code nearest to t replaces the
    old one, column by column, where the loss falls.

    Args:
      w: matrix [k, n], rows in visiting order.
      gram: second moment H [k, k] in the same order, positive definite.
      format: format that chooses the codes.
      order: stored index of each visited row.
      g: number of rows per group.
      passes: number of sweeps.
      grid: grid in stored order.
      codes: initial codes [k / d, ...] in visiting order.
      errors: their errors W - Q [k, n].
    """
    k = w.shape[0]
    d, width = format.tile
    group_of = order // g

    def step(b: Array, state: tuple) -> tuple:
        codes, errors = state
        i = b % (k // d) * d
        e = jax.lax.dynamic_slice_in_dim(errors, i, d, 0)
        rows = jax.lax.dynamic_slice_in_dim(gram, i, d, 0)
        h = jax.lax.dynamic_slice_in_dim(rows, i, d, 1)
        old = jax.lax.dynamic_slice_in_dim(w, i, d, 0) - e
        target = old + jax.scipy.linalg.solve(h, rows @ errors, assume_a="pos")
        code, new = format.round(target, jax.tree.map(lambda a: a[group_of[i]], grid))
        cost = lambda q: jnp.sum((q - target) * (h @ (q - target)), 0).reshape(-1, width).sum(1)
        better = cost(new) < cost(old)
        value = jnp.where(jnp.repeat(better, width), new, old)
        e = jax.lax.dynamic_slice_in_dim(w, i, d, 0) - value
        errors = jax.lax.dynamic_update_slice_in_dim(errors, e, i, 0)
        return codes.at[i // d].set(jnp.where(better, code, codes[i // d])), errors

    return jax.lax.fori_loop(0, passes * (k // d), step, (codes, errors))[0]
