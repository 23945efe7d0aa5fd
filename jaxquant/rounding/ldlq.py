"""LDLQ: round rows in order, feeding each row's error to the rows still to come (GPTQ).

With H = U D U^T, U unit upper triangular, and E = W - Q, the proxy loss tr(E^T H E) is
sum_j D_j |(U^T E)_j|^2, and (U^T E)_j = E_j + sum_{i<j} U_ij E_i knows only rows before j. So
row j is best rounded from the target T_j = W_j + sum_{i<j} U_ij E_i. This is GPTQ (Frantar et
al. 2022, arXiv:2210.17323) without the inverse of H, and LDLQ (Chee et al. 2023,
arXiv:2307.13304) in reversed order. A format that codes d rows together is fed in blocks of d,
with U block-unit (Tseng et al. 2024, arXiv:2402.04396).
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
from jaxquant.rounding.moments import living, row_by_row, unit_upper


@dataclasses.dataclass(frozen=True)
class LDLQ(Rounder):
    """Error feedback against a second moment H = mean of x x^T.

    Attributes:
      damping: fraction of mean(diag H) added to the diagonal; raised tenfold, up to 8 times,
        until the factorization is finite.
      act_order: visit rows by falling diag H, with the group grids fixed beforehand from the
        unrounded weights ("static groups"), so that groups stay contiguous in storage.
        Otherwise rows go in order, and each group's grid is fitted to its updated weights. Only
        for formats that code one row at a time.
      block_size: rows between two dense updates; changes speed, not the result.
      passes: sweeps of coordinate descent afterwards: each block of rows again, given all
        others, kept where the loss falls.
      scales: multiples of the format's own scale to try on a sample of columns; the one with
        the least loss serves all. The targets that feedback makes spread wider than W.
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
        """Packed data of w, and a report: the damping used, how many channels were dead."""
        return self.within(None, w, format, moments, key)

    def within(
        self,
        ranges: Float[Array, "k n"] | None,
        w: Float[Array, "k n"],
        format: Format,
        moments: Moments,
        key: Array | None = None,
    ) -> tuple[Data, Data]:
        """As a call; `ranges`: what the grids are fixed by, in place of w."""
        del key
        format = row_by_row(format)
        k, d = w.shape[0], format.tile[0]
        if self.act_order and d > 1:
            raise ValueError(f"act_order needs a format that codes one row at a time, not {format}")
        g = format.rows_per_group(k)
        gram, dead = living(moments.input)
        order = jnp.argsort(-jnp.where(dead, 0.0, jnp.diagonal(gram)), stable=True)
        order = order if self.act_order else jnp.arange(k)
        gram = gram[order][:, order]
        u, damping = unit_upper(gram, self.damping, d)
        fixed = self.act_order or g >= k or d > 1 or not format.fits
        fixed = fixed or ranges is not None
        grid = format.grids(w if ranges is None else ranges) if fixed else None
        size = block_rows(self.block_size, 1 if fixed else g, d)
        w = w[order]
        fed = partial(feedback, u=u, format=format, order=order, g=g, size=size)
        if self.scales and grid is None:
            raise ValueError(
                "scales need grids fixed beforehand: act_order, or one group per output"
            )
        if self.scales:
            grid = _best_scale(w, gram, format, grid, self.scales, fed)
        codes, grid, errors = fed(w, grid=grid)
        if self.passes:
            damped = gram + damping * jnp.mean(jnp.diagonal(gram)) * jnp.eye(k)
            codes = descend(w, damped, format, order, g, self.passes, grid, codes, errors)
        if d == 1:
            codes = jnp.zeros_like(codes).at[order].set(codes)
        report = {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}
        return format.pack(codes, grid), report


def block_rows(block_size: int, group: int, d: int) -> int:
    """Rows of one lazy block: as many whole groups (or format blocks) as fit, at least one."""
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
    """Codes [k / d, ...] of w's rows in visiting order, the grid of stored order, and W - Q.

    `grid` given: row i uses group order[i] // g. None: rows are in stored order, and a group's
    grid is fitted when its first row is reached, to the rows as updated by then.
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
        """Round d rows of the block at row i; e holds the block's errors so far."""
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
        t = start + columns.T @ errors  # rows not yet rounded have no error
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
    """The grid with the group whose first row is i fitted to its rows as GPTQ updates them.

    With errors E_P so far, the group's rows, unrounded, would move to W_G - e_G where
    U_GG^T e_G = -U_PG^T E_P: the least-squares response of the rows still free.
    """
    columns = jax.lax.dynamic_slice_in_dim(ub, i, g, 1)
    original = jax.lax.dynamic_slice_in_dim(start, i, g, 0)
    feed = jax.lax.dynamic_slice_in_dim(t, i, g, 0) - original + columns.T @ e
    u_gg = jax.lax.dynamic_slice_in_dim(columns, i, g, 0)
    response = jax.scipy.linalg.solve_triangular(u_gg.T, feed, lower=True)
    fitted = format.fit(original + response)
    return jax.tree.map(lambda a, b: a.at[index].set(b), grid, fitted)


SAMPLE = 64  # columns on which scales are compared


def _best_scale(
    w: Array, gram: Array, format: GridFormat, grid: Grid, scales: tuple[float, ...], fed: Callable
) -> Grid:
    """The grid times the scale whose feedback ends with the least loss on a sample of columns."""
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
    """Codes after `passes` sweeps: each block of rows rounded again given all other errors.

    Given them, the loss of a block is (q - t)^T H_bb (q - t) + const with t = q + H_bb^-1 (H E)_b;
    the code nearest to t is kept, column by column, where that falls.
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
