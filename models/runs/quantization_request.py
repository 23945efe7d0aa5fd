"""The request for quantizing a language model: everything that determines the result."""

import dataclasses

import jax

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant_models.architectures.llama import LAYER_MATRICES


@dataclasses.dataclass(frozen=True)
class QuantizationRequest:
    """Everything that determines the result, except the model and the contents of the texts.

    Attributes:
      recipe: the method of every weight; None if methods are to be allocated.
      choices: the methods that an allocation chooses from.
      target_bits: the average number of bits per weight that an allocation must not exceed.
      exact_prefix: number of tokens at the beginning of a text whose activations are not rounded.
      calibration: the calibration text, a file or a name of `readers.text`.
      calibration_tokens: number of tokens of that text to use.
      weighting: how tokens are weighted, as in `jaxquant.calibrate`.
      seed: seed of all random draws.
      rotation: how the residual stream is rotated first: "" (not at all), "random" or "learned".
      rotating: how the rotation is learned.
      learning: how input transforms are trained before rounding; None leaves them as fitted.
      healing: how the quantized model is trained; None skips this.
      recoding: how the codes of learned codebooks are trained after that; None skips this.
      layers_healed: whether the rounded layers are trained one by one, instead of `healing`.
      heal_text: the training text, a file or a name; "" for the calibration text; "generated" for
        text that the model generates.
      lossless: whether arrays are stored in fewer bytes without loss. Default: False.
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
    rotating: jq.tuning.Healing | None
    learning: jq.tuning.Healing | None
    healing: jq.tuning.Healing | None
    recoding: jq.tuning.Healing | None
    layers_healed: bool
    heal_text: str
    lossless: bool = False

    @property
    def rules(self) -> list[tuple[str, jq.Method]]:
        """(path pattern, method) for every method that weights may get."""
        if self.recipe is None:
            return [(LAYER_MATRICES, m) for m in self.choices]
        return [(p, m) for p, m in self.recipe.rules if isinstance(m, jq.Method)]

    @property
    def training(self) -> list[jq.tuning.Healing]:
        """All training on sequences, in order."""
        stages = (self.rotating, self.learning, self.healing, self.recoding)
        return [how for how in stages if how is not None]

    @property
    def heals(self) -> bool:
        """Whether the quantized model is trained, so that it may get bytes to train."""
        return self.layers_healed or self.healing is not None

    @property
    def key(self) -> jax.Array:
        """The PRNG key of all draws."""
        return jax.random.key(self.seed)

    @property
    def whole(self) -> tuple[str, ...]:
        """The steps that need the whole model in memory; the others go layer by layer."""
        steps = {
            "--rotate-residual learned": self.rotating is not None,
            "--learn": self.learning is not None,
            "--heal": self.healing is not None,
        }
        return tuple(name for name, there in steps.items() if there)
