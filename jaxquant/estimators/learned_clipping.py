"""Learned clipping: how much of the range of a group of weights its codes reach, as a sigmoid."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.protocols import Format, Grid, LevelFormat
from jaxquant.core.straight_through import through
from jaxquant.estimators.weight_estimators import LSQ, Learned, of_groups, rounded_zero

LEAST, MOST = 0.01, 1 / (1 + math.exp(-5))  # parts to begin with


@dataclasses.dataclass(frozen=True)
class LearnedClipping(LSQ):
    """Learned parts of the range of the weights of the moment: OmniQuant's, and ZeroQAT's.

    A group reaches from sigmoid(low) min(w, 0) to sigmoid(high) max(w, 0), in symmetric codes to
    sigmoid(high) max |w|; from that come scale and zero point, whose derivatives are those of
    `LSQ`. None goes through the extremes into the weights. Training begins at the ranges found, at
    most 0.9933 of the whole, where a sigmoid still has a slope.

    Source: Shao et al. 2023, arXiv:2308.13137; ZeroQAT, arXiv:2509.00031.
    """

    scale_gradient: Literal["step", "matrix", "none"] = "none"

    def check(self, format: Format) -> None:
        """Raise ValueError unless the format is of integers with scales of their own."""
        super().check(format)
        if not (isinstance(format, LevelFormat) and format.integral):
            raise ValueError(f"learned clipping is of integers, got {format}")

    def start(self, w: Float[Array, "k n"], format: LevelFormat, data: dict[str, Array]) -> Learned:
        """The parts that reach as far as the grid does."""
        grid, (bottom, top) = format.stored_grid(data), format.ends
        ends = {"high": grid.scale * (top - grid.zero), "low": grid.scale * (bottom - grid.zero)}
        whole = self._extremes(w, format)
        if not format.symmetric:  # as the zero point was before it was rounded
            shift = jnp.clip(0, *(whole[n] - ends[n] for n in ("low", "high")))
            ends = {name: end + shift for name, end in ends.items()}
        part = lambda name, end: ends[name] / jnp.where(end == 0, 1.0, end)
        kept = {n: jnp.clip(part(n, end), LEAST, MOST) for n, end in whole.items()}
        return {name: jnp.log(p / (1 - p)) for name, p in kept.items()}

    def grid(self, w: Float[Array, "k n"], learned: Learned, format: LevelFormat) -> Grid:
        """The grid of the parts, as storage gives it back."""
        whole = self._extremes(jax.lax.stop_gradient(w), format)
        ends = {name: jax.nn.sigmoid(learned[name]) * end for name, end in whole.items()}
        bottom, top = format.ends
        span = ends["high"] / top if format.symmetric else ends["high"] - ends["low"]
        scale = span if format.symmetric else span / (top - bottom)
        scale = jnp.where(scale == 0, 1.0, scale)  # of zeros alone
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
