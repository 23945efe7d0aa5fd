"""A description of a traced `dot_general` by the weight's contracted, batch and free axes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def group_axis(numbers: Any, x_ndim: int, w_ndim: int) -> int | None:
    """Return the axis of w along which the groups of a `jax.lax.ragged_dot` lie.

    Args:
      numbers: the `ragged_dot_dimension_numbers`.
      x_ndim, w_ndim: the ranks of x and w.
    Returns:
      The axis; None unless the product is that of rows [m, k], or [k, m], and a stack of matrices.

    >>> numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
    >>> group_axis(numbers, 2, 3)
    0
    """
    (contract, _), (batch, _) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(contract) != tuple(numbers.lhs_ragged_dimensions)
    plain = (x_ndim, w_ndim, len(contract), len(batch), len(groups)) == (2, 3, 1, 0, 1)
    return groups[0] if plain and rows else None


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The axes of x and of the weight w that a dot_general pairs.

    In the methods, axes[i] is the stored axis of axis i of w, and the first `leading` stored axes
    are the leading axes of the stack of matrices.

    Attributes:
      contract: pairs (axis of x, axis of w) that are summed over.
      batch: pairs (axis of x, axis of w) that are batch axes of the product, in order.
      x_ndim, w_ndim: the ranks of x and w.
      weight_left: whether w is the left operand, whose free axes come first in the output.
    """

    contract: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    x_ndim: int
    w_ndim: int
    weight_left: bool

    @staticmethod
    def of(dimension_numbers: Any, x_ndim: int, w_ndim: int, *, weight_left: bool) -> "Contraction":
        """Return the description of a `jax.lax.dot_general`.

        Args:
          dimension_numbers: its dimension numbers.
          x_ndim, w_ndim: the ranks of x and w.
          weight_left: whether w is the left operand.

        >>> Contraction.of((((1,), (0,)), ((), ())), 2, 2, weight_left=False).contract
        ((1, 0),)
        """
        contract, batch = (
            tuple(zip(r, l, strict=True) if weight_left else zip(l, r, strict=True))
            for l, r in dimension_numbers
        )
        return Contraction(contract, batch, x_ndim, w_ndim, weight_left)

    def contracted(self, axes: tuple[int, ...]) -> set[int]:
        """Return the stored axes of w that are summed over.

        Args:
          axes: the stored axis of every axis of w.
        """
        return {axes[w] for _, w in self.contract}

    def batched(self, axes: tuple[int, ...]) -> set[int]:
        """Return the stored axes of w that are batch axes of the product.

        Args:
          axes: the stored axis of every axis of w.
        """
        return {axes[w] for _, w in self.batch}

    def x_free(self) -> list[int]:
        """Return the free axes of x: neither contracted nor batch axes."""
        used = {x for x, _ in (*self.contract, *self.batch)}
        return [a for a in range(self.x_ndim) if a not in used]

    def rows(self, x: Array, axes: tuple[int, ...], leading: int, contracted: set[int]) -> Array:
        """Return x as [*leading axes of w paired with x, m, k], with its free axes merged into m.

        Args:
          x: the input of the dot_general.
          axes: the stored axis of every axis of w.
          leading: number of leading stored axes.
          contracted: the stored axes that make up k.
        """
        x_of = {axes[w]: x for x, w in (*self.contract, *self.batch)}
        lead = [x_of[a] for a in range(leading) if a in x_of]
        inner = [x_of[a] for a in sorted(contracted)]
        x = jnp.transpose(x, (*lead, *self.x_free(), *inner))
        k = math.prod(x.shape[x.ndim - len(inner) :])
        return x.reshape(*x.shape[: len(lead)], -1, k)

    def mapped(
        self, matmul: Callable[[Array, Any], Array], axes: tuple[int, ...], leading: int
    ) -> Callable[[Array, Any], Array]:
        """Map a product with one matrix over `rows` and the data of a stack of matrices.

        Leading axes of w that are paired with axes of x are mapped over together with x; along the
        others, x is broadcast.

        Args:
          matmul: the product with one matrix: (x [m, k], data of the matrix) -> [m, n].
          axes: the stored axis of every axis of w.
          leading: number of leading stored axes.
        Returns:
          The mapped function: ([*paired, m, k], data with leading axes) -> [*leading, m, n].
        """
        paired = self.paired(axes, leading)
        for a in reversed(range(leading)):
            matmul = jax.vmap(matmul, in_axes=(0 if a in paired else None, 0))
        return matmul

    def paired(self, axes: tuple[int, ...], leading: int) -> list[int]:
        """Return the leading stored axes of w that are paired with axes of x.

        Args:
          axes: the stored axis of every axis of w.
          leading: number of leading stored axes.
        """
        found = {axes[w] for _, w in (*self.contract, *self.batch)}
        return [a for a in range(leading) if a in found]

    def result(
        self,
        y: Array,
        x: Array,
        out_shape: tuple[int, ...],
        axes: tuple[int, ...],
        leading: int,
        contracted: set[int],
    ) -> Array:
        """Arrange the result of the mapped matmul as the dot_general returns it.

        Args:
          y: the result [*leading, m, n].
          x: the input of the dot_general.
          out_shape: sizes of the output axes of w.
          axes: the stored axis of every axis of w.
          leading: number of leading stored axes.
          contracted: the stored axes that the matmul sums over.
        """
        free = [x.shape[a] for a in self.x_free()]
        y = y.reshape(*y.shape[:leading], *free, *out_shape)
        return self._ordered(y, axes, leading, contracted)

    def output_labels(self, axes: tuple[int, ...]) -> list[tuple[str, int]]:
        """Return a label for each axis of the output: ("x", axis of x) or ("w", stored axis of w).

        Args:
          axes: the stored axis of every axis of w.
        """
        used = self.contracted(axes) | self.batched(axes)
        batch = [("w", axes[w]) for _, w in self.batch]
        w_free = [("w", a) for a in axes if a not in used]
        x_free = [("x", a) for a in self.x_free()]
        return batch + (w_free + x_free if self.weight_left else x_free + w_free)

    def output_rows(self, g: Array, axes: tuple[int, ...], leading: int) -> Array:
        """Return g as float32 rows [*leading axes of w, m, n], where m is that of `rows`.

        Leading axes that are not in the output have size 1.

        Args:
          g: the output of the dot_general, or its gradient.
          axes: the stored axis of every axis of w.
          leading: number of leading stored axes.
        """
        labels = self.output_labels(axes)
        lead = [("w", a) for a in range(leading)]
        rows = [("x", a) for a in self.x_free()]
        free = sorted(label for label in labels if label[0] == "w" and label[1] >= leading)
        kept = [label for label in lead if label in labels]
        g = jnp.transpose(g, [labels.index(label) for label in (*kept, *rows, *free)])
        sizes = iter(g.shape)
        shape = [next(sizes) if label in labels else 1 for label in lead]
        n = math.prod(g.shape[g.ndim - len(free) :])
        return g.astype(jnp.float32).reshape(*shape, -1, n)

    def _ordered(
        self, y: Array, axes: tuple[int, ...], leading: int, contracted: set[int]
    ) -> Array:
        """Sum over contracted leading axes; order the others as dot_general's output."""
        summed = [a for a in range(leading) if a in self.contracted(axes)]
        core = [a for a in sorted(axes) if a >= leading and a not in contracted]
        labels = [("w", a) for a in range(leading) if a not in summed]
        labels += [("x", a) for a in self.x_free()] + [("w", a) for a in core]
        y = jnp.sum(y, axis=tuple(summed)) if summed else y
        return jnp.transpose(y, [labels.index(label) for label in self.output_labels(axes)])
