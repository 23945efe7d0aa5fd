"""Forward-only training: latent weights train from losses alone, in the memory of inference."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.estimators.latent_format import Drawing
from jaxquant.training.latent import OTHER, SCALE, trained
from jaxquant.training.zeroth import Slope, Zeroth, estimate, moved
from jaxquant.tuning.trainable import Opened
from jaxquant.tuning.trainer import Healing, Loss, Rule

DECAY = 0.95  # decay of the running mean square of the slopes
EACH = Zeroth(
    epsilon=0.5, drawing=Drawing(signs=True, relative=True), kinds=(SCALE, OTHER),
    sizes=(0.04, 0.04), others=(),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ZeroQAT(Healing):
    """Settings for training latent weights by zeroth-order gradients; see `Zeroth`.

    A step costs `2 * zeroth.samples` forward passes. Beside the parameters it stores a single
    number, the running mean square of the slopes. Steps are divided by its root, so the length of a
    step is known in advance.

    Attributes:
      learning_rate: peak learning rate, in units of the moves of `zeroth` without its `epsilon`: at
        0.1 a weight or scale changes by a tenth of its move.
      zeroth: what moves, how far, and how many draws a step takes. Moves are relative by default:
        for a weight, to its quantization step; for any other number, to its own magnitude.

    Source:
      ZeroQAT, arXiv:2509.00031. This implementation differs from the paper, which updates weights
      by a learning rate times the estimate, and trains its clipping and smoothing by
      backpropagation beforehand; here any kind of array can be trained.
    """

    learning_rate: float = 0.01
    zeroth: Zeroth = EACH

    @property
    def forward_passes(self) -> int:
        """The number of forward passes of the training, on one batch each, without evaluations."""
        return 2 * self.steps * self.zeroth.samples

    @property
    def also(self) -> tuple[str, ...]:
        """Globs of plain leaves that are trained."""
        return self.zeroth.others if OTHER in self.zeroth.kinds else ()

    def rule(self) -> Rule:
        """Return the rule for `Trainer`."""
        return Forward(self)

    def trained(self, params: PyTree) -> PyTree:
        """Return which arrays of a tree are trained.

        Args:
          params: tree with latent weights.
        Returns:
          A tree of booleans, like `params`.
        """
        return trained(params, *self.zeroth.kinds, also=self.zeroth.others)


class _Slots(NamedTuple):
    """Training state: number of steps, and running mean square of the slopes."""

    step: Array
    square: Float[Array, ""]


class Forward:
    """A training rule (`trainer.Rule`) that trains a tree's arrays by zeroth-order gradients.

    Args:
      how: training settings.
    """

    def __init__(self, how: ZeroQAT) -> None:
        self.how = how

    def init(self, opened: Opened) -> tuple[PyTree, PyTree]:
        return opened.start, _Slots(jnp.int32(0), jnp.zeros(()))

    def update(
        self, loss: Loss, change: PyTree, slots: _Slots, opened: Opened, *batch: PyTree
    ) -> tuple[PyTree, _Slots, dict[str, Array]]:
        how, tree = self.how, eqx.combine(change, opened.params)
        at = lambda tree: loss(tree, opened._replace(params=tree), *batch)
        key = jax.random.fold_in(jax.random.key(how.seed), slots.step)
        value, slope = estimate(at, tree, key, how.zeroth)
        square = DECAY * slots.square + (1 - DECAY) * jnp.mean(slope.numbers**2)
        typical = jnp.sqrt(square / (1 - DECAY ** (slots.step + 1))) + 1e-12
        rate = how.schedule()(slots.step)
        new = moved(tree, Slope(slope.keys, slope.numbers / typical), rate, how.zeroth)
        slots = _Slots(slots.step + 1, square)
        return eqx.filter(new, how.trained(tree)), slots, {"loss": value, "slope": typical}
