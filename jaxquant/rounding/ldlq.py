"""LDLQ: round rows in order, feeding each row's error to the rows still to come (GPTQ).

With H = U D U^T, U unit upper triangular, and E = W - Q, the proxy loss tr(E^T H E) is
sum_j D_j |(U^T E)_j|^2, and (U^T E)_j = E_j + sum_{i<j} U_ij E_i knows only rows before j. So
row j is best rounded from the target T_j = W_j + sum_{i<j} U_ij E_i. This is GPTQ (Frantar et
al. 2022, arXiv:2210.17323) without the inverse of H, and LDLQ (Chee et al. 2023,
arXiv:2307.13304) in reversed order. With blocks of d rows U is block-unit.
"""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.codebooks.integer import Grid
from jaxquant.fields import check_fields


@dataclasses.dataclass(frozen=True)
class LDLQ:
    """Error feedback against a second moment H = mean of x x^T.

    Attributes:
      damping: fraction of mean(diag H) added to the diagonal; raised tenfold, up to 8 times,
        until the factorization is finite.
      act_order: visit rows by falling diag H, with the group grids fixed beforehand from the
        unrounded weights ("static groups"), so that groups stay contiguous in storage.
        Otherwise rows go in order, and each group's grid is fitted to its updated weights.
      block_size: rows between two dense updates; changes speed, not the result.
    """

    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, got {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    def __call__(
        self, w: Float[Array, "k n"], format: Any, gram: Float[Array, "k k"]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Packed data of w, and a report: the damping used, how many channels were dead."""
        k = w.shape[0]
        g = format.rows_per_group(k)
        diagonal = jnp.diagonal(gram)
        dead = ~(diagonal > 0)
        # A dead channel multiplies nothing: alone in H, it is rounded to nearest.
        gram = jnp.where(dead[:, None] | dead[None, :], 0.0, gram)
        alive = jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
        gram = gram + jnp.diag(jnp.where(dead, jnp.where(alive > 0, alive, 1.0), 0.0))
        order = jnp.argsort(-diagonal, stable=True) if self.act_order else jnp.arange(k)
        u, damping = unit_upper(gram[order][:, order], self.damping, format.block)
        fixed = self.act_order or g >= k
        grid = format.grids(w) if fixed else None
        size = _block_rows(self.block_size, 1 if fixed else g, format.block)
        codes, grid = _feedback(w[order], u, format, order, g, size, grid)
        codes = jnp.zeros_like(codes).at[order].set(codes)
        report = {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}
        return format.pack(codes, grid), report


def unit_upper(
    gram: Float[Array, "k k"], damping: float, d: int = 1
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """U of H + damping mean(diag H) I = U D U^T (block-unit for d > 1), and the damping used.

    >>> u, _ = unit_upper(jnp.array([[2.0, 1.0], [1.0, 1.0]]), 1e-9)
    >>> u.round(3).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    k = gram.shape[0]
    gram = gram / jnp.mean(jnp.diagonal(gram))

    def factor(damp: Array) -> Array:
        flipped = (gram + damp * jnp.eye(k, dtype=gram.dtype))[::-1, ::-1]
        return jnp.linalg.cholesky(flipped)[::-1, ::-1]

    def failed(state: tuple[Array, Array, Array]) -> Array:
        _, c, tries = state
        return ~jnp.all(jnp.isfinite(c)) & (tries < 8)

    def raised(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        damp, _, tries = state
        return 10 * damp, factor(10 * damp), tries + 1

    start = jnp.asarray(damping, gram.dtype)
    damp, c, _ = jax.lax.while_loop(failed, raised, (start, factor(start), jnp.int32(0)))
    if d == 1:
        return c / jnp.diagonal(c), damp
    blocks = jnp.stack([c[i : i + d, i : i + d] for i in range(0, k, d)])
    inverse = jax.vmap(jnp.linalg.inv)(blocks)
    columns = c.reshape(k, k // d, d)
    return jnp.einsum("kbi,bij->kbj", columns, inverse).reshape(k, k), damp


def _block_rows(block_size: int, group: int, d: int) -> int:
    """Rows of one lazy block: as many whole groups (or format blocks) as fit, at least one."""
    return max(1, block_size // math.lcm(group, d)) * math.lcm(group, d)


@partial(jax.jit, static_argnames=("format", "g", "size"))
def _feedback(
    w: Float[Array, "k n"],
    u: Float[Array, "k k"],
    format: Any,
    order: Array,
    g: int,
    size: int,
    grid: Grid | None,
) -> tuple[Array, Grid]:
    """Codes of w's rows in their (visiting) order, and the grid [groups, n] of stored order.

    `grid` given: row i uses group order[i] // g. None: rows are in stored order, and a group's
    grid is fitted when its first row is reached, to the rows as updated by then.
    """
    k, n = w.shape
    d = format.block
    full = -(-k // size) * size
    w = jnp.pad(w, ((0, full - k), (0, 0)))
    u = jnp.pad(u, ((0, full - k), (0, full - k))) + jnp.diag(
        (jnp.arange(full) >= k).astype(w.dtype)
    )
    fixed = grid is not None
    if grid is None:
        grid = Grid(jnp.ones((full // g, n)), jnp.zeros((full // g, n), jnp.int32))
    group_of = jnp.pad(order, (0, full - k)) // g

    def one(state: tuple, start: Array, t: Array, ub: Array, block: Array, i: Array) -> tuple:
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
        codes = jax.lax.dynamic_update_slice_in_dim(codes, code.astype(jnp.int8), block + i, 0)
        return e, codes, grid

    def lazy(b: Array, state: tuple) -> tuple:
        errors, codes, grid = state
        block = b * size
        start = jax.lax.dynamic_slice_in_dim(w, block, size, 0)
        columns = jax.lax.dynamic_slice_in_dim(u, block, size, 1)
        t = start + columns.T @ errors  # rows not yet rounded have no error
        ub = jax.lax.dynamic_slice_in_dim(columns, block, size, 0)

        def step(j: Array, inner: tuple) -> tuple:
            return one(inner, start, t, ub, block, j * d)

        e0 = jnp.zeros((size, n), w.dtype)
        e, codes, grid = jax.lax.fori_loop(0, size // d, step, (e0, codes, grid))
        return jax.lax.dynamic_update_slice_in_dim(errors, e, block, 0), codes, grid

    start = (jnp.zeros((full, n), w.dtype), jnp.zeros((full, n), jnp.int8), grid)
    _, codes, grid = jax.lax.fori_loop(0, full // size, lazy, start)
    groups = -(-k // g)
    return codes[:k].astype(jnp.int32), jax.tree.map(lambda a: a[:groups], grid)


def _fitted(
    format: Any, grid: Grid, start: Array, t: Array, ub: Array, e: Array, i: Array, index: Array,
    g: int,
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
