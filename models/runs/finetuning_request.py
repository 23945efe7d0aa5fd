"""What a finetuning is asked for: all that decides its result, but for the models and the text."""

import dataclasses
from typing import NamedTuple

import jaxquant as jq
from jaxquant.training.qat import How
from jaxquant_models.architectures.llama import NORM_SCALES
from jaxquant_models.runs.recipes import recipe_of


class Stages(NamedTuple):
    """How a way to train does it: end to end, and block by block before."""

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
    """All that decides the result, but for the models and the text.

    Attributes:
      end_to_end, blocks: how to train the whole, and block by block before that; None: not at all.
      method: that floats are rounded by, and trained; of a checkpoint None, its weights train in
        the formats they have.
      only: globs of the weights that train; the others stay packed. (): all of the layers.
      generated: sequences beside the text that the teacher writes (LLM-QAT, arXiv:2305.17888).
      context: tokens of a sequence.
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
        """All training, in its order."""
        return [how for how in (self.blocks, self.end_to_end) if how is not None]

    @property
    def recipe(self) -> jq.Recipe | None:
        """That floats are rounded by."""
        return None if self.method is None else recipe_of(self.method)

    def steps(self, layers: int) -> int:
        """Of all the training of a model of so many layers."""
        whole, blocks = (how.steps if how else 0 for how in (self.end_to_end, self.blocks))
        return whole + layers * blocks
