"""The request for a quantization of a language model: it states all that decides the result."""

import dataclasses
from typing import NamedTuple

from pydantic import JsonValue

import jaxquant as jq
from jaxquant.calibration.calibrate import Weighting
from jaxquant.recipes.serialize import to_json
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_model, digest_of_text
from jaxquant_models.runs.generated_text import GENERATED
from pallas_kernels import viterbi

SAMPLE = 256  # rows of every input kept to fit transforms to, and as many at random


class Texts(NamedTuple):
    """The contents of the texts.

    Attributes:
      calibration: the text to calibrate on.
      heal: the text to train on; "" stands for that of calibration, `GENERATED` for text that the
        model writes.
    """

    calibration: str
    heal: str


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
      heal_text: the text to train on, a file or a name; "" for that of calibration; or `GENERATED`.
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

    @property
    def needs_statistics(self) -> bool:
        """Whether any step asks for statistics of inputs."""
        kinds = ("gram", "output", "channels", "sample")
        needed = any(getattr(m, f"needs_{kind}") for _, m in self.rules for kind in kinds)
        return needed or self.recipe is None

    @property
    def needs_gram(self) -> bool:
        """Whether any step asks for second moments of inputs."""
        return self.recipe is None or any(m.needs_gram for _, m in self.rules)

    @property
    def sample(self) -> int:
        """How many rows of each input calibration keeps, of either kind."""
        return SAMPLE if any(m.needs_sample for _, m in self.rules) else 0

    @property
    def needs_module_loss(self) -> bool:
        """Whether scales are searched for that the output of a module judges."""
        searched = (m for _, m in self.rules if getattr(m.input, "searched", False))
        return any(m.activations is None for m in searched)

    @property
    def output(self) -> tuple[str, ...]:
        """Patterns of the weights whose output-side statistics are needed."""
        return tuple(dict.fromkeys(p for p, m in self.rules if m.needs_output))

    def read_texts(self) -> Texts:
        """The contents of the texts that the request names.

        Raises:
          ValueError: a text cannot be read.
        """
        own = self.heal_text in ("", GENERATED)
        return Texts(
            read_text(self.calibration, calibration=True),
            self.heal_text if own else read_text(self.heal_text, calibration=True),
        )

    def fingerprint(self, source: Model, texts: Texts) -> dict[str, JsonValue]:
        """Plain values that differ wherever results may differ: the run's identity."""
        training = ("learning", "healing", "recoding", "rotating")
        return {
            **VERSIONS,
            "encoder": viterbi.backend(),
            "weights": digest_of_model(source),
            "prefix": source.prefix,
            "recipe": None if self.recipe is None else self.recipe.to_json(),
            "choices": [to_json(m) for m in self.choices],
            **{name: (how := getattr(self, name)) and dataclasses.asdict(how) for name in training},
            "rotate": self.rotation,
            "text": digest_of_text(texts.calibration),
            "heal_text": digest_of_text(texts.heal),
            "tokens": self.calibration_tokens,
            "weighting": self.weighting,
            "seed": self.seed,
            "target_bits": self.target_bits,
        }
