"""What a quantization of a language model is asked for: all that decides its result."""

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
    """What texts hold: the one to calibrate on; the one to train on, "" for the same, or
    `GENERATED`."""

    calibration: str
    heal: str


@dataclasses.dataclass(frozen=True)
class QuantizationRequest:
    """All that decides the result, but for the model and what the texts hold.

    Attributes:
      recipe: or, to have methods allocated, None.
      choices, target_bits: methods to allocate, and the average to keep.
      exact_prefix: first tokens of a text whose activations are not rounded.
      calibration: the text to calibrate on, a FILE or a name. calibration_tokens: how many of it.
      weighting: of tokens, see `jaxquant.calibrate`.
      rotation: of the residual stream, before all else: "" none, "random" or "learned".
      rotating: how to learn it.
      learning: how to train transforms of inputs before rounding; None: they stay as fitted.
      healing: how to train at last; None: not at all.
      recoding: how to train the codes of learned codebooks after that; None: not at all.
      heal_text: to train on, a FILE or a name, "" for that of calibration; or `GENERATED`.
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
        """Which methods weights may get."""
        if self.recipe is None:
            return [(LAYER_MATRICES, m) for m in self.choices]
        return [(p, m) for p, m in self.recipe.rules if isinstance(m, jq.Method)]

    @property
    def training(self) -> list[jq.Healing]:
        """All training on sequences, in its order."""
        stages = (self.rotating, self.learning, self.healing, self.recoding)
        return [how for how in stages if how is not None]

    @property
    def needs_statistics(self) -> bool:
        """Whether there is anything to calibrate for."""
        kinds = ("gram", "output", "channels", "sample")
        needed = any(getattr(m, f"needs_{kind}") for _, m in self.rules for kind in kinds)
        return needed or self.recipe is None

    @property
    def needs_gram(self) -> bool:
        """Whether second moments are needed."""
        return self.recipe is None or any(m.needs_gram for _, m in self.rules)

    @property
    def sample(self) -> int:
        """Rows of inputs that are needed, of either kind."""
        return SAMPLE if any(m.needs_sample for _, m in self.rules) else 0

    @property
    def needs_module_loss(self) -> bool:
        """Whether scales are searched for that a module's output judges."""
        searched = (m for _, m in self.rules if getattr(m.input, "searched", False))
        return any(m.activations is None for m in searched)

    @property
    def output(self) -> tuple[str, ...]:
        """Globs of weights whose output-side statistics are needed."""
        return tuple(dict.fromkeys(p for p, m in self.rules if m.needs_output))

    def read_texts(self) -> Texts:
        """What the texts hold.

        Raises:
          ValueError: one cannot be read.
        """
        own = self.heal_text in ("", GENERATED)
        return Texts(
            read_text(self.calibration, calibration=True),
            self.heal_text if own else read_text(self.heal_text, calibration=True),
        )

    def fingerprint(self, source: Model, texts: Texts) -> dict[str, JsonValue]:
        """Plain values that differ where results may: of this, the weights, the libraries."""
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
