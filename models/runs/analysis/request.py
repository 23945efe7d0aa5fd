"""The request for an analysis, and how much work each effort spends."""

import dataclasses
from typing import Literal, NamedTuple

Name = Literal["fast", "default"]


class Effort(NamedTuple):
    """How much work an analysis spends.

    Attributes:
      chunks: chunks of the text on which models are compared.
      calibration_tokens: tokens of the calibration text, as `jaxquant quantize --effort` uses.
      variants: (method, bits) of the quantized versions that are made of the reference.
      sequences: sequences of the text whose hidden states are looked at.
      points: vectors of each layer of which the dimension is estimated.
    """

    chunks: int
    calibration_tokens: int
    variants: tuple[tuple[str, int], ...]
    sequences: int
    points: int


EFFORTS: dict[str, Effort] = {
    "fast": Effort(
        4,
        4096,
        (*(("rtn", bits) for bits in (8, 4, 3, 2)), *(("gptq", bits) for bits in (4, 3, 2))),
        2,
        800,
    ),
    "default": Effort(
        16,
        8192,
        (
            *(("rtn", bits) for bits in (8, 4, 3, 2)),
            *(("gptq", bits) for bits in (8, 4, 3, 2)),
            *(("awq", bits) for bits in (4, 3)),
        ),
        6,
        3000,
    ),
}


@dataclasses.dataclass(frozen=True)
class AnalysisRequest:
    """What is analyzed, and how.

    Attributes:
      model: the spec of the model, as in `readers.registry.load`.
      against: the spec of the reference, usually the float model; None for none.
      text: the text, a file or a name of `readers.text`.
      effort: a name of `EFFORTS`.
      context: number of tokens in the cache that roofline and energy assume.
      seed: seed of all random draws.
    """

    model: str
    against: str | None = None
    text: str = "builtin"
    effort: Name = "default"
    context: int = 2048
    seed: int = 0

    @property
    def size(self) -> Effort:
        """The work to spend."""
        return EFFORTS[self.effort]
