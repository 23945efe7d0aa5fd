"""What a format must offer whose scales can be learned: codes that are levels of one weight."""

import abc
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.protocols.formats import Codes, Data, Grid, GridFormat


class LevelFormat(GridFormat):
    """A format whose codes are levels of one weight each: w = scale * level.

    So its scales, and where it has them its zero points, can be learned. A grid has a field
    `scale`, and a field `zero` if there are zero points. Levels are measured in steps, w / scale.

    Capabilities:
      group_size, scale_dtype: as in `formats.Integer`.
      symmetric: there are no zero points.
      learnable: scales are numbers that training may move, and not codes themselves.
      integral: levels are whole numbers, so that rounding can be stochastic and clipped.
      countable: levels have places on a line, which `place` and `value_at` tell.
      stretch: in steps, where the range of the stretched elastic estimator ends; 0: it takes none.
    """

    group_size: int | str
    scale_dtype: str
    symmetric: bool = True
    learnable: bool = True
    integral: ClassVar[bool] = False
    countable: bool = True
    stretch: ClassVar[float] = 0.0

    @property
    @abc.abstractmethod
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest level; with zero points the first and the last code."""

    @property
    def reach(self) -> float:
        """The largest level, in steps; of codes with a zero point their number less one."""
        return max(map(abs, self.ends))

    @abc.abstractmethod
    def stored_grid(self, data: Data) -> Grid:
        """The grid of packed arrays."""

    @abc.abstractmethod
    def make_grid(self, scale: Array, zero: Array | None = None) -> Grid:
        """A grid of these scales and zero points (None: there are none), whatever their shape."""

    @abc.abstractmethod
    def stored(self, scale: Float[Array, "g n"]) -> Grid:
        """The grid of these scales, as storage will give it back."""

    def zero_of(self, grid: Grid) -> Float[Array, "..."]:
        """The zero points of a grid, as floats; a scalar 0 if it has none."""
        return jnp.zeros(())

    @abc.abstractmethod
    def level(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Float[Array, "..."]:
        """The nearest levels to v, in steps, less the zero point."""

    def inside(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Whether v, in steps, is within the range of the levels, ends included."""
        low, high = self.ends
        return (v >= low) & (v <= high)

    @abc.abstractmethod
    def place(self, codes: Codes) -> Int[Array, "..."]:
        """Where codes lie on the line, counted in levels."""

    @abc.abstractmethod
    def value_at(self, place: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
        """What the codes at these places mean."""
