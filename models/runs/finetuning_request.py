"""The request for finetuning: the settings that determine the result."""

import dataclasses
from typing import NamedTuple

import jaxquant as jq
from jaxquant.training.finetuning import Finetuning
from jaxquant.training.qat import How
from jaxquant_models.architectures.llama import NORM_SCALES
from jaxquant_models.runs.recipes import recipe_of


class Stages(NamedTuple):
    """How a method trains.

    Attributes:
      end_to_end: settings for the whole model.
      blocks: settings for single blocks, which are trained first.
    """

    end_to_end: How
    blocks: How


_QAT = jq.training.QAT(in_steps=True, scale_rate=3e-4, also=(NORM_SCALES,), validate_every=25)
# Forward-only training. For single layers every parameter is perturbed independently, since a step
# measures the error of that layer alone. End to end a draw is shared by a whole matrix or norm, 271
# numbers in all, because some hundred losses cannot determine more.
_SINGLE = dataclasses.replace(jq.training.ZeroQAT().zeroth, others=(NORM_SCALES,))
_SHARED = dataclasses.replace(
    _SINGLE, drawing=dataclasses.replace(_SINGLE.drawing, shared=True), sizes=(0.05, 0.02)
)
METHODS = {
    "qat": Stages(
        dataclasses.replace(_QAT, learning_rate=3e-3),
        dataclasses.replace(_QAT, learning_rate=0.03),
    ),
    "zeroqat": Stages(
        jq.training.ZeroQAT(learning_rate=0.03, zeroth=_SHARED, validate_every=20),
        jq.training.ZeroQAT(learning_rate=0.05, zeroth=_SINGLE),
    ),
}


# Adapters: rates that suit a few hundred steps of one sequence.
ADAPTING = {
    "qlora": Finetuning(learning_rate=1e-3, clip=1.0, validate_every=25),
    "qa-lora": Finetuning(learning_rate=2e-3, clip=1.0, validate_every=25),
    "l4q": Finetuning(learning_rate=1e-3, scale_rate=1e-3, clip=1.0, validate_every=25),
    "lota": Finetuning(validate_every=25),
    "peqa": Finetuning(scale_rate=3e-3, clip=1.0, validate_every=25),
}
# Matrices A and B that start from the error of rounding are larger than those that start at zero,
# and a step of either changes the weight by more.
STARTED_RATE = ADAPTING["qlora"].learning_rate / 2


@dataclasses.dataclass(frozen=True)
class FinetuningRequest:
    """Everything that determines the result, except the models, the text and the examples.

    Attributes:
      end_to_end: how the whole model is trained; None skips this.
      blocks: how single blocks are trained before that; None skips this.
      method: the method that quantizes a floating-point model before its weights are trained; None
        for a checkpoint, whose weights are trained in their own formats.
      only: patterns of the weights that are trained; the others stay packed. Empty for all weights
        of the layers.
      generated: number of training sequences that the teacher generates (LLM-QAT,
        arXiv:2305.17888).
      context: number of tokens per sequence.
      seed: seed of all random draws.
      adapter: adapter that is trained in place of the weights, with the settings `end_to_end`; None
        trains the weights.
    """

    end_to_end: How | Finetuning | None
    blocks: How | None
    method: jq.Method | None
    only: tuple[str, ...]
    generated: int
    context: int
    seed: int
    adapter: jq.adapters.Adapter | None = None

    @property
    def stages(self) -> list[How | Finetuning]:
        """All training stages, in order."""
        return [how for how in (self.blocks, self.end_to_end) if how is not None]

    @property
    def recipe(self) -> jq.Recipe | None:
        """The recipe that quantizes a floating-point model, or None for a checkpoint."""
        return None if self.method is None else recipe_of(self.method)

    def steps(self, layers: int) -> int:
        """Return the total number of training steps for a model with `layers` layers.

        Args:
          layers: number of layers.
        """
        whole, blocks = (how.steps if how else 0 for how in (self.end_to_end, self.blocks))
        return whole + layers * blocks
