"""The request for a quantization of a language model: it states all that decides the result."""

import dataclasses

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant_models.architectures.llama import LAYER_MATRICES


@dataclasses.dataclass(frozen=True)
class QuantizationRequest:
    """Everything that decides the result, apart from the model and the contents of the texts.

    Attributes:
      recipe: the method of every weight; None if methods are to be allocated.
      choices: the methods that an allocation chooses from.
      target_bits: the average that an allocation keeps to.
      exact_prefix: how many tokens at the beginning of a text keep their activations exact.
      calibration: the text to calibrate on, a file or a name of `readers.text`.
      calibration_tokens: how many tokens of that text are used.
      weighting: how tokens are weighted, as in `jaxquant.calibrate`.
      seed: what all random draws start from.
      rotation: how the residual stream is rotated first: "" (not at all), "random" or "learned".
      rotating: how the rotation is learned.
      learning: how transforms of inputs are trained before rounding; None leaves them as fitted.
      healing: how the rounded model is trained; None leaves it as rounded.
      recoding: how the codes of learned codebooks are trained after that; None leaves them.
      heal_text: the text to train on, a file or a name; "" for that of calibration; "generated" for
        text that the model writes.
    """

    recipe: jq.Recipe | None
    choices: tuple[jq.Method, ...]
    target_bits: float
    exact_prefix: int
    calibration: str
    calibration_tokens: int
    weighting: Weighting
    seed: int
    rotation: str
    rotating: jq.Healing | None
    learning: jq.Healing | None
    healing: jq.Healing | None
    recoding: jq.Healing | None
    heal_text: str

    @property
    def rules(self) -> list[tuple[str, jq.Method]]:
        """The methods that weights may get, with the paths of these weights."""
        if self.recipe is None:
            return [(LAYER_MATRICES, m) for m in self.choices]
        return [(p, m) for p, m in self.recipe.rules if isinstance(m, jq.Method)]

    @property
    def training(self) -> list[jq.Healing]:
        """All training on sequences, in the order in which it happens."""
        stages = (self.rotating, self.learning, self.healing, self.recoding)
        return [how for how in stages if how is not None]
