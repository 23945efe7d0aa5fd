"""Learned clipping: the fraction of a weight group's range that its codes cover, as a sigmoid."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import Format, Grid, LevelFormat
from jaxquant.core.straight_through import through
from jaxquant.estimators.weight_estimators import LSQ, Learned, of_groups, rounded_zero

LEAST, MOST = 0.01, 1 / (1 + math.exp(-5))  # bounds of the initial fractions


@dataclasses.dataclass(frozen=True)
class LearnedClipping(LSQ):
    """Learned fractions of the current range of the weights, as in OmniQuant and ZeroQAT.

    The range of a group is [sigmoid(low) min(w, 0), sigmoid(high) max(w, 0)], or for symmetric
    codes up to sigmoid(high) max |w|. Scale and zero point follow from it, with the gradients of
    `LSQ`. No gradient reaches the weights through their extremes. Training starts at the ranges
    found before, or at 0.9933 of the full range if that is less, because a sigmoid close to 1 has
    no slope.

    Attributes:
      scale_gradient: as in `LSQ`, "none" by default.

    Source:
      Shao et al. 2023, arXiv:2308.13137; ZeroQAT, arXiv:2509.00031.
    """

    scale_gradient: Literal["step", "matrix", "none"] = "none"

    def check(self, format: Format) -> None:
        """Raise ValueError unless the format is of integers with scales that are not quantized."""
        super().check(format)
        if not (isinstance(format, LevelFormat) and format.integral):
            raise ValueError(f"learned clipping needs an integer format, got {format}")

    def start(self, w: Float[Array, "k n"], format: LevelFormat, data: dict[str, Array]) -> Learned:
        """Return the logits of the fractions that reproduce the stored grid.

        Args:
          w: the matrix.
          format: its format.
          data: its packed arrays.
        Returns:
          "high" and, for asymmetric codes, "low", one logit per group.
        """
        grid, (bottom, top) = format.stored_grid(data), format.ends
        ends = {"high": grid.scale * (top - grid.zero), "low": grid.scale * (bottom - grid.zero)}
        whole = self._extremes(w, format)
        if not format.symmetric:  # undoes the rounding of the zero point
            shift = jnp.clip(0, *(whole[n] - ends[n] for n in ("low", "high")))
            ends = {name: end + shift for name, end in ends.items()}
        part = lambda name, end: ends[name] / jnp.where(end == 0, 1.0, end)
        kept = {n: jnp.clip(part(n, end), LEAST, MOST) for n, end in whole.items()}
        return {name: jnp.log(p / (1 - p)) for name, p in kept.items()}

    def grid(self, w: Float[Array, "k n"], learned: Learned, format: LevelFormat) -> Grid:
        """Return the grid of the learned ranges, with scales as they are stored.

        Args:
          w: the matrix.
          learned: logits "high" and "low".
          format: its format.
        Returns:
          The grid, differentiable in `learned`.
        """
        whole = self._extremes(jax.lax.stop_gradient(w), format)
        ends = {name: jax.nn.sigmoid(learned[name]) * end for name, end in whole.items()}
        bottom, top = format.ends
        span = ends["high"] / top if format.symmetric else ends["high"] - ends["low"]
        scale = span if format.symmetric else span / (top - bottom)
        scale = jnp.where(scale == 0, 1.0, scale)  # groups of zeros
        stored = through(scale, format.stored(jax.lax.stop_gradient(scale)).scale)
        zero = None if format.symmetric else rounded_zero(bottom - ends["low"] / stored, format)
        return format.make_grid(stored, zero)

    def _extremes(self, w: Float[Array, "k n"], format: LevelFormat) -> Learned:
        if format.symmetric:
            return {"high": of_groups(jnp.max, jnp.abs(w), format)}
        return {
            "high": of_groups(jnp.max, jnp.maximum(w, 0), format),
            "low": of_groups(jnp.min, jnp.minimum(w, 0), format),
        }
