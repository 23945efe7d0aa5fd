"""Interface of formats with learnable scales, in which each code is a level of one weight."""

import abc
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.protocols.formats import Codes, Data
from jaxquant.core.protocols.grid_formats import Grid, GridFormat


class LevelFormat(GridFormat):
    """A format in which each code is a level of one weight: w = scale * level.

    This allows the scales, and the zero points if there are any, to be learned. A grid has a field
    `scale`, and a field `zero` if there are zero points. Levels are measured in steps, that is in
    units of w / scale.

    Capabilities:
      group_size, scale_dtype: as in `formats.Integer`.
      symmetric: whether the format has no zero points.
      learnable: whether training may move the scales; False if the scales are codes themselves.
      integral: whether levels are integers, so that rounding can be stochastic and clipped.
      countable: whether levels have positions on a line, given by `place` and `value_at`.
      stretch: end of the range of the stretched elastic estimator, in steps; 0 if it does not
        apply.
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
        """The lowest and highest level; with zero points, the lowest and highest code."""

    @property
    def reach(self) -> float:
        """The largest level, in steps; with zero points, the number of codes less one."""
        return max(map(abs, self.ends))

    @abc.abstractmethod
    def stored_grid(self, data: Data) -> Grid:
        """Return the grid of packed arrays."""

    @abc.abstractmethod
    def make_grid(self, scale: Array, zero: Array | None = None) -> Grid:
        """Build a grid.

        Args:
          scale: the scales, of any shape.
          zero: the zero points, same shape; None if there are none.
        """

    @abc.abstractmethod
    def stored(self, scale: Float[Array, "g n"]) -> Grid:
        """Build a grid with the precision of its storage.

        Args:
          scale: the scales, [g, n].
        """

    def zero_of(self, grid: Grid) -> Float[Array, "..."]:
        """Return the zero points of a grid as floats; a scalar 0 if it has none."""
        return jnp.zeros(())

    @abc.abstractmethod
    def level(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Float[Array, "..."]:
        """Round to the nearest levels.

        Args:
          v: the values, in steps.
          zero: the zero points, as from `zero_of`.

        Returns:
          The levels in steps, that is codes minus zero points.
        """

    def inside(self, v: Float[Array, "..."], zero: Float[Array, "..."]) -> Bool[Array, "..."]:
        """Return whether values lie within the range of the levels, ends included.

        Args:
          v: the values, in steps.
          zero: the zero points, as from `zero_of`.
        """
        low, high = self.ends
        return (v >= low) & (v <= high)

    @abc.abstractmethod
    def place(self, codes: Codes) -> Int[Array, "..."]:
        """Return the positions of codes on the line, counted in levels."""

    @abc.abstractmethod
    def value_at(self, place: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
        """Return the weights that the codes at these positions decode to.

        Args:
          place: the positions, as from `place`.
          grid: the grid.
        """
