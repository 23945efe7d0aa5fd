"""A traced `dot_general`, seen from the weight: which of its axes are contracted, batch, free."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Axes of x and of the weight w that a dot_general pairs.

    Attributes:
      contract: pairs (axis of x, axis of w) summed over.
      batch: pairs (axis of x, axis of w) kept, in order.
      x_ndim, w_ndim: ranks.
      weight_left: whether w is the left operand (its free axes then come first).
    """

    contract: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    x_ndim: int
    w_ndim: int
    weight_left: bool

    @staticmethod
    def of(dimension_numbers: Any, x_ndim: int, w_ndim: int, *, weight_left: bool) -> "Contraction":
        """From the `dimension_numbers` of `jax.lax.dot_general`."""
        contract, batch = (
            tuple(zip(r, l, strict=True) if weight_left else zip(l, r, strict=True))
            for l, r in dimension_numbers
        )
        return Contraction(contract, batch, x_ndim, w_ndim, weight_left)

    def contracted(self, axes: tuple[int, ...]) -> set[int]:
        """Stored axes summed over, where axis i of w is stored axis axes[i]."""
        return {axes[w] for _, w in self.contract}

    def batched(self, axes: tuple[int, ...]) -> set[int]:
        """Stored axes that are batch axes of the product."""
        return {axes[w] for _, w in self.batch}

    def x_free(self) -> list[int]:
        """Axes of x that go to the output."""
        used = {x for x, _ in (*self.contract, *self.batch)}
        return [a for a in range(self.x_ndim) if a not in used]

    def rows(self, x: Array, axes: tuple[int, ...], leading: int, contracted: set[int]) -> Array:
        """x as [*leading axes of w that it is paired with, m, k]: free axes become m."""
        x_of = {axes[w]: x for x, w in (*self.contract, *self.batch)}
        lead = [x_of[a] for a in range(leading) if a in x_of]
        inner = [x_of[a] for a in sorted(contracted)]
        x = jnp.transpose(x, (*lead, *self.x_free(), *inner))
        k = math.prod(x.shape[x.ndim - len(inner) :])
        return x.reshape(*x.shape[: len(lead)], -1, k)

    def mapped(
        self, matmul: Callable[[Array, Any], Array], axes: tuple[int, ...], leading: int
    ) -> Callable[[Array, Any], Array]:
        """`matmul([m, k], data of one matrix) -> [m, n]` for `rows` and the data of a stack.

        Leading (batch) axes of w that the product keeps or sums over are mapped over with x; those
        x knows nothing of are mapped with x broadcast.
        """
        paired = {axes[w] for _, w in (*self.contract, *self.batch)}
        for a in reversed(range(leading)):
            matmul = jax.vmap(matmul, in_axes=(0 if a in paired else None, 0))
        return matmul

    def result(
        self,
        y: Array,
        x: Array,
        out_shape: tuple[int, ...],
        axes: tuple[int, ...],
        leading: int,
        contracted: set[int],
    ) -> Array:
        """The product as the dot_general gives it, from what the mapped matmul gave for x."""
        free = [x.shape[a] for a in self.x_free()]
        y = y.reshape(*y.shape[:leading], *free, *out_shape)
        return self._ordered(y, axes, leading, contracted)

    def output_labels(self, axes: tuple[int, ...]) -> list[tuple[str, int]]:
        """What each axis of the output is: ("x", axis of x) or ("w", stored axis of w)."""
        used = self.contracted(axes) | self.batched(axes)
        batch = [("w", axes[w]) for _, w in self.batch]
        w_free = [("w", a) for a in axes if a not in used]
        x_free = [("x", a) for a in self.x_free()]
        return batch + (w_free + x_free if self.weight_left else x_free + w_free)

    def output_rows(self, g: Array, axes: tuple[int, ...], leading: int) -> Array:
        """The output g as [*leading axes of w (1 where absent), m, n], float32: rows as `rows`."""
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

    def energy(self, g: Array, axes: tuple[int, ...], leading: int) -> Array:
        """|g|^2 of every input row, [*leading axes of w (1 where absent), m], from the output g."""
        return jnp.sum(jnp.square(self.output_rows(g, axes, leading)), axis=-1)

    def _ordered(
        self, y: Array, axes: tuple[int, ...], leading: int, contracted: set[int]
    ) -> Array:
        """Sum the summed leading axes; put the rest in dot_general's order of output axes."""
        summed = [a for a in range(leading) if a in self.contracted(axes)]
        core = [a for a in sorted(axes) if a >= leading and a not in contracted]
        labels = [("w", a) for a in range(leading) if a not in summed]
        labels += [("x", a) for a in self.x_free()] + [("w", a) for a in core]
        y = jnp.sum(y, axis=tuple(summed)) if summed else y
        return jnp.transpose(y, [labels.index(label) for label in self.output_labels(axes)])
