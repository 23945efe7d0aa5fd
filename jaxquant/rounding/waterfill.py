"""Waterfill: spend bits where they reduce the loss most, by step sizes per row and per column.

The loss is tr(E^T H E G), where H is the second moment of the inputs and G that of the loss
gradients at the outputs. With H = U D U^T, G = V F V^T and error feedback (as in `TwoSided`), it
equals sum_ij D_i F_j (U^T E V)_ij^2. Rows should therefore have steps proportional to D_i^-1/2, and
columns should have widths proportional to F_j^-1/2. A bit is then worth the same everywhere,
`SLOPE` squared steps, and each chain of weights is coded with the least loss plus price times bits.
Within a chain, errors of different columns are treated as uncorrelated: V is block-unit, with a
block per chain.

A code also affects the bits of later rows, since it moves their targets. For Gaussian rows of
variance s_i^2, the bits of Q are sum_i q_i^2 / (2 ln 2 s_i^2) + const. Hence, for columns that are
all alike,

    tr(E^T H E) + price bits = tr((Q - T)^T (H + R) (Q - T)) + const,   T = (H + R)^-1 H W,

with R = diag(price / (2 ln 2 s_i^2)). So feedback runs on T and H + R, and the part of the cost of
row i that R already contains, R_i q_i^2, is subtracted from its price. Rows with small H_ii come
first: they have few bits, and the other rows compensate for their errors.
"""

import dataclasses
import math
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Format, Moments, Rounder
from jaxquant.formats.entropy_coded import (
    FAINT,
    SLOPE,
    EntropyCoded,
    Row,
    coarse_enough,
    finest,
    levels,
    octaves,
    profile,
    quarters,
)
from jaxquant.rounding.moments import (
    believed,
    block_energies,
    feedback_energies,
    living,
    upper,
)
from pallas_kernels.codecs.entropy_stream import FINE, Coded, chains, laid


@dataclasses.dataclass(frozen=True)
class Waterfill(Rounder):
    """Step sizes by water-filling against H, and against G if used, as fine as the bytes allow.

    Attributes:
      damping: fraction of mean(diag H) added to the diagonal; raised as in `LDLQ`.
      correlation: factor on the off-diagonal entries of G, 0 to 1. G describes what outputs have in
        common on average over tokens, which does not hold for each token: on SmolLM2, 1/2 works
        best. None ignores G, so that all outputs count equally.
      output_damping: fraction of mean(diag G) added to its diagonal.
      block_size: number of rows between two dense updates; it changes the speed, not the result.
      trials: maximum number of step sizes to try.

    Source: Lifar et al. 2026, arXiv:2603.04956 (WaterSIC) for the steps of rows; feedback on both
    sides is YAQA's (Tseng et al. 2025, arXiv:2505.22988). Widths, R, the order of rows and the
    search on bytes are ours.
    """

    damping: float = 1e-4
    correlation: float | None = None
    output_damping: float = 0.05
    block_size: int = 128
    trials: int = 6

    needs_gram: ClassVar[bool] = True

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        """Whether the second moment of the gradients at the outputs is used."""
        return self.correlation is not None

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "damping", "output_damping", "block_size", "trials")
        if self.correlation is not None and not 0 <= self.correlation <= 1:
            raise ValueError(f"correlation must be from 0 to 1, or None, got {self.correlation}")

    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the packed arrays of w and a report.

        Args:
          w: float32 matrix [k, n].
          format: an `EntropyCoded` format.
          moments: second moments; that of the inputs is required, and with `correlation` also that
            of the gradients at the outputs.
          key: ignored.
        Returns:
          Packed arrays, and a report with the damping used and the number of dead channels.
        Raises:
          ValueError: the format is another one, the matrix cannot be stored in it, or a moment is
            missing.
        """
        del key
        if not isinstance(format, EntropyCoded):
            raise ValueError(f"Waterfill needs the format EntropyCoded, got {format}")
        k, n = w.shape
        format.check_shape(k, n)
        gram, dead = living(moments.input)
        order = jnp.argsort(jnp.diagonal(gram), stable=True)
        w, gram = w[order], gram[order][:, order] / jnp.mean(jnp.diagonal(gram))
        weight, damping = feedback_energies(gram, self.damping)
        gram = gram + damping * jnp.eye(k)
        outputs = _Outputs(jnp.zeros(n, jnp.int32), None)
        if self.correlation is not None:
            g = believed(living(moments.output)[0], self.correlation)
            outputs = _Outputs.of(g, self.output_damping, format)
        w = w / octaves(outputs.widths)
        columns, shape = profile(w)
        heard = columns > -FAINT
        w, share = jnp.where(heard, w, 0 * w), jnp.mean(heard)
        outputs = outputs.among(heard, format.chain)
        energy = jnp.mean(w**2, axis=1) / share
        energy = jnp.maximum(energy, 1e-6 * jnp.mean(energy) + 1e-30)
        place = jnp.argsort(order)

        def trial(x: Array) -> Coded:
            coded = _trial(w, gram, energy, x, outputs, columns, shape, format, self.block_size)
            return coded._replace(
                steps=coded.steps[place], levels=coded.levels[place], values=coded.values[place]
            )

        start = format.first_step(energy, weight, share, n)
        data = format.fill(trial, start, finest(w), share, k, n, self.trials)
        return data, {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}


class _Outputs(NamedTuple):
    """Step widths of the columns and the feedback between them.

    Attributes:
      widths: widths of the columns, in quarter octaves.
      v: factor V of G = V F V^T, for columns divided by their widths; None without G. Entry [c, i,
        j] leads from column i of all m, ordered chain by chain, to column j of chain c. It is zero
        unless column i is in an earlier chain.
    """

    widths: Int[Array, " n"]
    v: Float[Array, "chains m p"] | None

    @staticmethod
    def of(g: Float[Array, "n n"], damping: float, format: EntropyCoded) -> "_Outputs":
        """Return widths and V for this G.

        If chains differ in length, they are padded with columns that are uncorrelated with all
        others.
        """
        n = len(g)
        count, length = chains(n, format.chain)
        own = jnp.diagonal(g)
        more = jnp.where(jnp.arange(count * length) < n, 0.0, jnp.mean(own))
        g = jnp.pad(g, (0, count * length - n)) + jnp.diag(more)
        order = jnp.arange(len(g)).reshape(length, count).T.reshape(-1)  # chain by chain
        v, energies = block_energies(g[order][:, order], damping, length)
        log = jnp.log2(energies[jnp.argsort(order)][:n]) / -2
        widths = jnp.round(4 * (log - jnp.mean(log))).astype(jnp.int32)
        size = jnp.pad(octaves(widths), (0, len(g) - n), constant_values=1.0)[order]
        v = (v * size[:, None] / size).reshape(len(g), count, length).swapaxes(0, 1)
        earlier = jnp.arange(len(g)) // length < jnp.arange(count)[:, None]
        return _Outputs(widths, jnp.where(earlier[..., None], v, 0.0))

    def among(self, heard: Bool[Array, " n"], chain: int) -> "_Outputs":
        """Return the same, with columns not worth coding so narrow that they do not count."""
        widths = jnp.where(heard, self.widths, -FAINT)
        if self.v is None:
            return _Outputs(widths, None)
        own = laid(heard, chain).T
        felt = own.reshape(-1)[:, None] & own[:, None, :]
        return _Outputs(widths, jnp.where(felt, self.v, 0.0))


@partial(jax.jit, static_argnames=("format", "size"))
def _trial(
    w: Float[Array, "k n"], gram: Float[Array, "k k"], energy: Float[Array, " k"], x: Array,
    outputs: _Outputs, columns: Int[Array, " n"], shape: Array, format: EntropyCoded, size: int,
) -> Coded:  # fmt: skip
    """Round with a step unit of 2**x, rows in visiting order, and return what is to be coded."""
    base = jnp.round(x * FINE).astype(jnp.int32)
    r = SLOPE * jnp.exp2(2 * base / FINE) / (2 * math.log(2) * energy)
    c = upper(gram + jnp.diag(r))
    u, d = c / jnp.diagonal(c), jnp.diagonal(c) ** 2
    inner = solve_triangular(u, r[:, None] * w, unit_diagonal=True) / d[:, None]
    target = w - solve_triangular(u, inner, trans=1, unit_diagonal=True)
    steps = coarse_enough(quarters(d**-0.5), target, base)
    step = jnp.exp2(base / FINE) * octaves(steps)
    row = Row(
        step=step,
        level=levels(target / step[:, None], columns, shape),
        price=SLOPE / (d * octaves(2 * steps)),
        prior=r / d,
    )
    values = _wavefront(target, u, outputs.v, columns, shape, row, format, size)
    return format.finished(Coded(base, shape, steps, row.level, outputs.widths, columns, values))


def _wavefront(
    target: Float[Array, "k n"], u: Float[Array, "k k"], v: Array | None,
    columns: Int[Array, " n"], shape: Array, row: Row, format: EntropyCoded, size: int,
) -> Int[Array, "k n"]:  # fmt: skip
    """Return the values, rounded by blocks of rows, each along diagonals of rows and chains."""
    k, n = target.shape
    size = min(size, k)
    blocks = -(-k // size)
    more = blocks * size - k  # number of rows of zeros appended, which affect no other row
    target = laid(jnp.pad(target, ((0, more), (0, 0))), format.chain).swapaxes(1, 2)
    columns = laid(columns, format.chain)
    u = jnp.pad(u, (0, more))
    row = jax.tree.map(lambda a: jnp.pad(a, (0, more), mode="edge"), row)

    def block(fed: Array, b: Array) -> tuple[Array, Array]:
        mine = lambda a: jax.lax.dynamic_slice_in_dim(a, b * size, size)
        ahead = mine(u)
        inside = jax.lax.dynamic_slice_in_dim(ahead, b * size, size, axis=1)
        values, error = _diagonals(
            mine(target), mine(fed), inside, v, columns, shape, jax.tree.map(mine, row), format
        )
        return fed + jnp.einsum("bl,bcp->lcp", ahead, error), values

    _, values = jax.lax.scan(block, jnp.zeros_like(target), jnp.arange(blocks))
    return values.reshape(target.shape).swapaxes(1, 2).reshape(len(target), -1)[:k, :n]


def _diagonals(
    target: Float[Array, "b c p"], fed: Float[Array, "b c p"], u: Float[Array, "b b"],
    v: Float[Array, "c m p"] | None, columns: Int[Array, "p c"], shape: Array, row: Row,
    format: EntropyCoded,
) -> tuple[Array, Array]:  # fmt: skip
    """Return the values and errors of a block of rows; `fed` is U^T E from the rows above it."""
    rows, count, _ = target.shape
    chain, heard = jnp.arange(count), (columns > -FAINT).T
    u = jnp.where(jnp.arange(rows)[:, None] < jnp.arange(rows), u, 0.0)

    def step(a: Array, state: tuple) -> tuple:
        fed, error, values = state
        i = jnp.clip(a - chain, 0, rows - 1)
        there = (a - chain >= 0) & (a - chain < rows)
        wanted = target[i, chain] + fed[i, chain]
        if v is not None:
            known = (fed + error)[i].reshape(count, -1)
            wanted += jnp.einsum("cm,cmp->cp", known, v)
        value, w = format.searched(wanted.T, columns, shape, jax.tree.map(lambda x: x[i], row))
        e = jnp.where(there[:, None] & heard, target[i, chain] - w.T, 0.0)
        # Outside the block, a diagonal adds zeros and keeps the old values.
        error = error.at[i, chain].add(e)
        fed = fed + u[i].T[:, :, None] * e
        kept = jnp.where(there[:, None], value.T, values[i, chain])
        return fed, error, values.at[i, chain].set(kept)

    none = jnp.zeros(target.shape, jnp.int16)
    start = fed, jnp.zeros_like(target), none
    _, error, values = jax.lax.fori_loop(0, rows + count - 1, step, start)
    return values, error
