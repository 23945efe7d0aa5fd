"""Forward only: how latent weights train by losses alone, in the memory of inference."""

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

DECAY = 0.95  # of the running mean square of the numbers
EACH = Zeroth(
    epsilon=0.5, drawing=Drawing(signs=True, relative=True), kinds=(SCALE, OTHER),
    sizes=(0.04, 0.04), others=(),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ZeroQAT(Healing):
    """How to train latent weights by zeroth-order gradients: see `Zeroth`.

    A step costs `2 * zeroth.samples` forward passes, and holds nothing beside the parameters but
    one number: the mean square of the slopes seen so far, by whose root steps are divided. So a
    step is of a length known before.

    Attributes:
      learning_rate: at its highest, of the moves that `zeroth` makes: 0.1 is a tenth of a weight's
        or a scale's own move, before `epsilon`.
      zeroth: what moves, how far, how often it is looked at. Its moves are relative here: a
        weight's to its step, any other number's to itself.

    Source: ZeroQAT, arXiv:2509.00031. We differ: it trains weights at steps of a learning rate
    times the estimate, its clipping and smoothing by derivatives before; here any kinds move.
    """

    learning_rate: float = 0.01
    zeroth: Zeroth = EACH

    @property
    def forward_passes(self) -> int:
        """Of all the training, of one batch each; looks at held-out data aside."""
        return 2 * self.steps * self.zeroth.samples

    @property
    def also(self) -> tuple[str, ...]:
        """Globs of leaves that train and are not quantized."""
        return self.zeroth.others if OTHER in self.zeroth.kinds else ()

    def rule(self) -> Rule:
        """What `Trainer` asks for."""
        return Forward(self)

    def trained(self, params: PyTree) -> PyTree:
        """Which arrays of a tree train, a tree of booleans."""
        return trained(params, *self.zeroth.kinds, also=self.zeroth.others)


class _Slots(NamedTuple):
    """What training keeps: the steps done, and the running mean square of the slopes."""

    step: Array
    square: Float[Array, ""]


class Forward:
    """The training rule (`trainer.Rule`) of a tree's arrays by zeroth-order gradients."""

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
