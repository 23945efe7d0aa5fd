"""Waterfill: bits where they count, for a format whose rows have steps of their own.

With H = U D U^T and error feedback (`ldlq`) the loss is sum_j D_j |e_j|^2, so rows deserve steps
in proportion to D_j^-1/2. What a bit is worth then is the same everywhere, `SLOPE` squared steps,
and a row is coded so that its loss plus price times bits is least.

A code costs later rows too: their targets move. For Gaussian rows of variance s_j^2 the bits of Q
are sum_j q_j^2 / (2 ln 2 s_j^2) + const, hence

    tr(E^T H E) + price bits = tr((Q - V)^T (H + R) (Q - V)) + const,   V = (H + R)^-1 H W,

with R = diag(price / (2 ln 2 s_j^2)). So feedback runs on V and H + R, and what is in R already,
R_j q_j^2, is taken off row j's own price. Rows of small H_jj come first: they have few bits, and
the others make up for them.
"""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxquant.codebooks.entropy_coded import (
    SLOPE,
    EntropyCoded,
    Row,
    octaves,
    profile,
    quarters,
)
from jaxquant.fields import check_fields, check_positive
from jaxquant.rounding.ldlq import feedback
from jaxquant.rounding.moments import Moments, feedback_energies, living, upper
from pallas_kernels.coded import FINE, Coded


@dataclasses.dataclass(frozen=True)
class Waterfill:
    """Steps by water-filling against H = mean of x x^T, as fine as the format's bytes allow.

    Attributes:
      damping: fraction of mean(diag H) added to the diagonal; raised as in `LDLQ`.
      block_size: rows between two dense updates; changes speed, not the result.
      trials: sizes of the steps to try, at most.

    Source: Lifar et al. 2026, arXiv:2603.04956 (WaterSIC) for the steps; R, the order of rows and
    the search on bytes are ours.
    """

    damping: float = 1e-4
    block_size: int = 128
    trials: int = 6

    needs_gram: ClassVar[bool] = True
    needs_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "damping", "block_size", "trials")

    def __call__(
        self, w: Float[Array, "k n"], format: Any, moments: Moments, key: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Packed data of w, and a report: the damping used, how many channels were dead."""
        del key
        if not isinstance(format, EntropyCoded):
            raise ValueError(f"Waterfill rounds to EntropyCoded, got {format}")
        k, n = w.shape
        format.check_shape(k, n)
        gram, dead = living(moments.input)
        order = jnp.argsort(jnp.diagonal(gram), stable=True)
        w, gram = w[order], gram[order][:, order] / jnp.mean(jnp.diagonal(gram))
        weight, damping = feedback_energies(gram, self.damping)
        gram = gram + damping * jnp.eye(k)
        energy = jnp.mean(w**2, axis=1)
        energy = jnp.maximum(energy, 1e-6 * jnp.mean(energy) + 1e-30)
        place = jnp.argsort(order)

        def trial(x: Array) -> Coded:
            coded = _trial(w, gram, energy, x, format, self.block_size)
            return coded._replace(
                steps=coded.steps[place], levels=coded.levels[place], values=coded.values[place]
            )

        data = format.fill(trial, format.first_step(energy, weight, n), k, n, self.trials)
        return data, {"damping": damping, "dead": jnp.sum(dead, dtype=jnp.int32)}


@partial(jax.jit, static_argnames=("format", "size"))
def _trial(
    w: Float[Array, "k n"], gram: Float[Array, "k k"], energy: Float[Array, " k"], x: Array,
    format: EntropyCoded, size: int,
) -> Coded:  # fmt: skip
    """What is coded when the unit of steps is 2**x, rows in visiting order."""
    k = len(w)
    base = jnp.round(x * FINE).astype(jnp.int32)
    r = SLOPE * jnp.exp2(2 * base / FINE) / (2 * math.log(2) * energy)
    c = upper(gram + jnp.diag(r))
    u, d = c / jnp.diagonal(c), jnp.diagonal(c) ** 2
    inner = solve_triangular(u, r[:, None] * w, unit_diagonal=True) / d[:, None]
    target = w - solve_triangular(u, inner, trans=1, unit_diagonal=True)
    steps = quarters(d**-0.5)
    columns, shape = profile(w)
    row = Row(
        step=jnp.exp2(base / FINE) * octaves(steps),
        price=SLOPE / (d * octaves(2 * steps)),
        prior=r / d,
        columns=jnp.tile(columns, (k, 1)),
        shape=jnp.full(k, shape),
    )
    codes, _, _ = feedback(target, u, format, jnp.arange(k), 1, size, row)
    return format.finished(codes, base, steps, row)
