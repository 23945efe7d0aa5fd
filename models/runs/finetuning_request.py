"""The request for a finetuning: it states all that decides the result."""

import dataclasses
from typing import NamedTuple

import jaxquant as jq
from jaxquant.training.qat import How
from jaxquant_models.architectures.llama import NORM_SCALES
from jaxquant_models.runs.recipes import recipe_of


class Stages(NamedTuple):
    """How a method trains the whole model, and single blocks before that."""

    end_to_end: How
    blocks: How


_QAT = jq.QAT(in_steps=True, scale_rate=3e-4, also=(NORM_SCALES,), validate_every=25)
# Forward only: every number of a layer moves by itself, for the layer's error is all of one step;
# end to end a draw is of a whole matrix or norm, 271 numbers of which some hundred losses tell.
_SINGLE = dataclasses.replace(jq.ZeroQAT().zeroth, others=(NORM_SCALES,))
_SHARED = dataclasses.replace(
    _SINGLE, drawing=dataclasses.replace(_SINGLE.drawing, shared=True), sizes=(0.05, 0.02)
)
METHODS = {
    "qat": Stages(
        dataclasses.replace(_QAT, learning_rate=3e-3),
        dataclasses.replace(_QAT, learning_rate=0.03),
    ),
    "zeroqat": Stages(
        jq.ZeroQAT(learning_rate=0.03, zeroth=_SHARED, validate_every=20),
        jq.ZeroQAT(learning_rate=0.05, zeroth=_SINGLE),
    ),
}


@dataclasses.dataclass(frozen=True)
class FinetuningRequest:
    """Everything that decides the result, apart from the models and the contents of the text.

    Attributes:
      end_to_end: how the whole model is trained; None: it is not.
      blocks: how single blocks are trained before that; None: they are not.
      method: the method that rounds a model of floats, whose weights then train; None for a
        checkpoint, whose weights train in the formats that they have.
      only: patterns of the weights that train; the others stay packed. Empty: all of the layers.
      generated: how many sequences the teacher writes to train on (LLM-QAT, arXiv:2305.17888).
      context: tokens of a sequence.
      seed: what all random draws start from.
    """

    end_to_end: How | None
    blocks: How | None
    method: jq.Method | None
    only: tuple[str, ...]
    generated: int
    context: int
    seed: int

    @property
    def stages(self) -> list[How]:
        """All training, in the order in which it happens."""
        return [how for how in (self.blocks, self.end_to_end) if how is not None]

    @property
    def recipe(self) -> jq.Recipe | None:
        """The recipe that rounds a model of floats."""
        return None if self.method is None else recipe_of(self.method)

    def steps(self, layers: int) -> int:
        """How many steps the training of a model of so many layers takes in all."""
        whole, blocks = (how.steps if how else 0 for how in (self.end_to_end, self.blocks))
        return whole + layers * blocks
