"""Training of rotations with the Cayley transform, under which a matrix stays orthonormal."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.tuning.trainable import Opened, Values
from jaxquant.tuning.trainer import Healing, Loss

MOMENTUM, DECAY = 0.9, 0.95  # decay of the mean of skew gradients, and of their mean square
_TINY = 1e-30
_exact = jax.default_matmul_precision("highest")


class _Slots(NamedTuple):
    """State by rotation: mean skew gradient and mean square of it; and the number of updates."""

    mean: Values
    square: Values
    steps: Array


@dataclasses.dataclass(frozen=True)
class Cayley:
    """A training rule (`trainer.Rule`) for orthonormal matrices: Cayley SGD with momentum.

    A gradient G of R is projected to the skew matrix A = (G R^T - R G^T) / 2. With S the normalized
    running mean of A, R becomes `turned(R, -rate * S)`. S is normalized so that a row turns by
    `rate` radians if all updates agree. One learning rate therefore suits all widths and losses.

    Attributes:
      healing: number of steps and learning rate, an angle in radians.
      momentum: decay of the running mean of A.

    Source:
      Li, Fuxin and Todorovic 2020, arXiv:2002.01113; SpinQuant, Liu et al. 2024, arXiv:2405.16406,
      uses it without momentum. This implementation differs from the papers: the linear system is
      solved exactly, not by five iterations; the mean is taken of skew matrices, which need no
      transport; and the step is normalized by one mean square for the whole matrix (Cayley Adam of
      the first paper), not by the size of the gradient.
    """

    healing: Healing
    momentum: float = MOMENTUM

    def init(self, opened: Opened) -> tuple[Values, PyTree]:
        """Return the initial rotations and an empty state.

        Args:
          opened: the opened tree, whose start values are the rotations.
        Returns:
          The rotations, and the state.
        """
        zeros = jax.tree.map(jnp.zeros_like, opened.start)
        square = jax.tree.map(lambda _: jnp.float32(0), opened.start)
        return opened.start, _Slots(zeros, square, jnp.int32(0))

    @_exact
    def update(
        self, loss: Loss, change: Values, slots: _Slots, opened: Opened, *batch: PyTree
    ) -> tuple[Values, _Slots, dict[str, Array]]:
        value, slope = jax.value_and_grad(loss)(change, opened, *batch)
        steps = slots.steps + 1
        blend = lambda rate, old, new: rate * old + (1 - rate) * new
        skew = jax.tree.map(lambda g, r: (g @ r.T - r @ g.T) / 2, slope, change)
        mean = jax.tree.map(lambda m, a: blend(self.momentum, m, a), slots.mean, skew)
        square = jax.tree.map(lambda s, a: blend(DECAY, s, jnp.mean(a**2)), slots.square, skew)
        rate = self.healing.schedule()(steps)

        def moved(r: Array, m: Array, s: Array) -> Array:
            m, s = m / (1 - self.momentum**steps), s / (1 - DECAY**steps)
            return turned(r, -rate * m / jnp.sqrt(len(r) * s + _TINY))

        change = jax.tree.map(moved, change, mean, square)
        return change, _Slots(mean, square, steps), {"loss": value}


@_exact
def turned(r: Float[Array, "d d"], a: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Return (I - A/2)^-1 (I + A/2) R, which is orthonormal for skew A.

    One step of a Newton-Schulz iteration restores the orthonormality that float32 loses.

    Args:
      r: orthonormal matrix [d, d].
      a: skew-symmetric matrix [d, d].
    Returns:
      The turned matrix.

    >>> a = jnp.array([[0.0, 0.2], [-0.2, 0.0]])
    >>> r = turned(jnp.eye(2), a)
    >>> bool(jnp.allclose(r @ r.T, jnp.eye(2), atol=1e-6)), f"{r[0, 1]:.3f}"
    (True, '0.198')
    """
    one = jnp.eye(len(r), dtype=r.dtype)
    r = jnp.linalg.solve(one - a / 2, (one + a / 2) @ r)
    return r + (r - r @ r.T @ r) / 2  # Newton-Schulz step towards the nearest rotation
