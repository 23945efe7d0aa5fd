"""Clipping before rounding: each group of weights is clamped to a bound found by a search."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.protocols import Format, GridFormat, Moments, Rounder, lacking


@dataclasses.dataclass(frozen=True)
class Clipped(Rounder):
    """AWQ's clipping before another rounder, which rounds the clipped matrix.

    Rounders with error feedback round the original matrix instead, with grids fitted to the clipped
    one, so that feedback compensates for the clipping error too.

    For each group of rows and each output channel, the bounds 1, 0.95, 0.9, ... times the largest
    magnitude are tried with nearest rounding. The bound kept has the least error in the group's
    contribution to the output, by the second moment of the group's inputs alone.

    Attributes:
      rounder: rounder to apply after clipping.
      steps: number of bounds tried, at most 19, in steps of 0.05.

    Source: Lin et al. 2023, arXiv:2306.00978, and its released code.
    """

    rounder: Rounder
    steps: int = 10

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "steps")
        if wrong := lacking(Rounder, self.rounder):
            raise ValueError(f"rounder must be a Rounder (LDLQ(), ...): {wrong}")
        if self.steps > 19:
            raise ValueError(f"steps must be at most 19, since each is 0.05, got {self.steps}")

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        """Whether the inner rounder reads the second moment of the gradients at the outputs."""
        return self.rounder.needs_output

    @property
    def damping(self) -> float:  # type: ignore[override]
        """The damping of the inner rounder."""
        return self.rounder.damping

    def __call__(
        self, w: Float[Array, "k n"], format: Format, moments: Moments, key: Array | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the packed arrays of w and the report of the inner rounder.

        Args:
          w: float32 matrix [k, n].
          format: a format with groups of rows (`GridFormat`).
          moments: second moments; that of the inputs is required.
          key: random key, passed on to the inner rounder.
        Raises:
          ValueError: the format has no groups of rows, or the second moment of the inputs is
            missing.
        """
        if not isinstance(format, GridFormat):
            raise ValueError(
                f"Clipped needs a format with groups of rows (a GridFormat), got {format}"
            )
        if moments.input is None:
            raise ValueError(
                "Clipped needs the second moment of the inputs: pass the result of calibrate"
            )
        clipped = self._clipped(w, format, moments.input)
        if self.rounder.takes_ranges:
            return self.rounder.within(clipped, w, format, moments, key)
        return self.rounder(clipped, format, moments, key)

    def _clipped(
        self, w: Array, format: GridFormat, gram: Float[Array, "k k"]
    ) -> Float[Array, "k n"]:
        k, n = w.shape
        rows = format.rows_per_group(k)
        pad = -k % rows
        by_group = lambda a: jnp.pad(a, ((0, pad), (0, 0))).reshape(-1, rows, n)
        h = jnp.pad(gram, ((0, pad), (0, pad))).reshape(-1, rows, (k + pad) // rows, rows)
        h = jnp.einsum("aiaj->aij", h)
        largest = jnp.max(jnp.abs(by_group(w)), axis=1)  # [groups, n]

        def clipped(bound: Float[Array, "g n"]) -> Float[Array, "k n"]:
            limit = jnp.repeat(bound, rows, axis=0)[:k]
            return jnp.clip(w, -limit, limit)

        def attempt(best: tuple, i: Array) -> tuple[tuple, None]:
            bound = largest * (1 - i / 20)
            rounded = format.dequantize(format.encode(clipped(bound)), k)
            error = by_group(rounded - w)
            cost = jnp.sum(error * jnp.einsum("gij,gjn->gin", h, error), axis=1)
            better = cost < best[1]
            return (jnp.where(better, bound, best[0]), jnp.where(better, cost, best[1])), None

        start = largest, jnp.full(largest.shape, jnp.inf)
        (bound, _), _ = jax.lax.scan(attempt, start, jnp.arange(self.steps, dtype=jnp.float32))
        return clipped(bound)
