"""Two-sided feedback: errors are fed to the rows and to the columns still to come.

To second order and with Kronecker curvature, the loss of the whole model is tr(H E G E^T), where H
is the second moment of the inputs and G that of the loss gradients at the outputs. With
H = U D U^T and G = V F V^T, both unit upper triangular, it equals sum_ij D_i F_j (U^T E V)_ij^2,
and (U^T E V)_ij depends only on errors of rows up to i and columns up to j. So a tile is best
rounded from

    T = W + (U^T E V - E)_tile,

in any order in which the tiles above and to the left come first. Here tiles are rounded along
anti-diagonals, many at a time. YAQA (Tseng et al. 2025, arXiv:2505.22988) goes in the opposite
direction.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Format, Grid, GridFormat, Moments, Rounder
from jaxquant.rounding.moments import living, row_by_row, unit_upper


@dataclasses.dataclass(frozen=True)
class TwoSided(Rounder):
    """Error feedback against H and G, for formats with one scale per matrix.

    Attributes:
      damping, output_damping: fractions of the mean diagonal added to the diagonals of H and G.
      scale: multiple of the format's own scale, since the targets spread wider than W.

    Source: Tseng et al. 2025, arXiv:2505.22988 (YAQA).
    """

    damping: float = 0.01
    output_damping: float = 0.02
    scale: float = 1.0

    needs_gram: ClassVar[bool] = True
    needs_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "damping", "output_damping", "scale")

    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the packed arrays of w and a report.

        Args:
          w: float32 matrix [k, n].
          format: a format that chooses codes row by row (`GridFormat`), with one scale per matrix.
          moments: second moments; both are required.
          key: ignored.
        Returns:
          Packed arrays, and a report with the damping used for H and the number of dead input
          channels.
        Raises:
          ValueError: the format does not qualify, or a second moment is missing.
        """
        del key
        format = row_by_row(format)
        k, n = w.shape
        d, c = format.tile
        if format.rows_per_group(k) < k:
            raise ValueError(
                f"two-sided feedback needs a format with one scale per matrix, got {format}"
            )
        (h, dead), (g, _) = living(moments.input), living(moments.output)
        u, damping = unit_upper(h, self.damping, d)
        v, _ = unit_upper(g, self.output_damping, c)
        grid = format.rescaled(format.grids(w), jnp.float32(self.scale))
        row = jax.tree.map(lambda a: a[0], grid)
        tiles = w.reshape(k // d, d, n // c, c).swapaxes(1, 2)
        codes = _diagonals(tiles, u, v, format, row)
        return format.pack(codes, grid), {
            "damping": damping,
            "dead": jnp.sum(dead, dtype=jnp.int32),
        }


@partial(jax.jit, static_argnames="format")
def _diagonals(
    w: Float[Array, "I J d c"],
    u: Float[Array, "k k"],
    v: Float[Array, "n n"],
    format: GridFormat,
    row: Grid,
) -> Array:
    """Return the codes [I, ..., J] of the tiles, rounded anti-diagonal by anti-diagonal.

    The state holds, for all tiles, the errors E and S = U^T E, strictly from the rows above. The
    errors of a diagonal are added to S of the rows below at once, so that a target needs only S and
    E of its own row of tiles.
    """
    rows, columns, d, c = w.shape
    u = u.reshape(rows, d, rows, d).transpose(0, 2, 1, 3)  # [I, I, d, d]
    v = v.reshape(columns, c, columns, c).transpose(0, 2, 1, 3)
    above = jnp.arange(rows)[:, None] < jnp.arange(rows)
    left = jnp.arange(columns)[:, None] < jnp.arange(columns)
    u = jnp.where(above[..., None, None], u, 0)
    v = jnp.where(left[..., None, None], v, 0)
    i = jnp.arange(rows)
    one = jax.ShapeDtypeStruct((d, rows * c), w.dtype)
    code = jax.eval_shape(format.round, one, row)[0]

    def step(a: Array, state: tuple) -> tuple:
        error, fed, codes = state
        j = jnp.clip(a - i, 0, columns - 1)
        valid = (a - i >= 0) & (a - i < columns)
        mine = fed[i, j]
        # Feedback from the tiles to the left: S + E times V.
        target = w[i, j] + mine + jnp.einsum("ijdc,jice->ide", fed + error, v[:, j])
        flat = target.swapaxes(0, 1).reshape(d, rows * c)
        code, value = format.round_where(flat, row, valid)  # only tiles on the diagonal count
        value = value.reshape(d, rows, c).swapaxes(0, 1)
        e = jnp.where(valid[:, None, None], w[i, j] - value, 0)
        error = error.at[i, j].add(e)
        below = jnp.einsum("ilde,idc->ilec", u, e)  # from tile (i, j_i) to (l, j_i), l > i
        fed = fed.at[jnp.arange(rows)[None, :], j[:, None]].add(below)
        old = codes[i, ..., j]
        code = jnp.where(valid.reshape(-1, *[1] * (old.ndim - 1)), jnp.moveaxis(code, -1, 0), old)
        return error, fed, codes.at[i, ..., j].set(code)

    codes = jnp.zeros((rows, *code.shape[:-1], columns), code.dtype)
    zero = jnp.zeros_like(w)
    return jax.lax.fori_loop(0, rows + columns - 1, step, (zero, zero, codes))[2]
