"""How much text, and how many generated tokens, a suite of limits spends."""

import dataclasses
from typing import Self

from jaxquant.theory.limits.middle import MARGIN

SHORTEST = 64  # positions that a model must have
LEAST = {"chunks": 1, "chunk": 2, "inside": 2, "contexts": 2, "context": 2, "passage": 2} | {
    "prompts": 2, "prompt": 2, "new": 1, "sentences": 2, "variants": 0, "trials": 1, "memories": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Effort:
    """Numbers of texts and tokens.

    Attributes:
      chunks, chunk: chunks of the text that both models read, and tokens of each.
      inside: tokens of the text whose attention is looked at.
      contexts, context: contexts with passages, and tokens of each.
      passage: tokens of a passage, as many passages as contexts.
      prompts, prompt: prompts, and tokens of each. Fewer than 20 cannot certify that sampled texts
        do not loop.
      new: tokens generated for each prompt.
      sentences: passages for retrieval.
      variants: quantized versions for the diagonal adversary.
      trials: labelings of points in an experiment.
      memories: memories whose facts are rounded.
    Raises:
      ValueError: a number is too small for its purpose.
    """

    chunks: int = 4
    chunk: int = 512
    inside: int = 1024
    contexts: int = 5
    context: int = 1024
    passage: int = 64
    prompts: int = 32
    prompt: int = 32
    new: int = 128
    sentences: int = 400
    variants: int = 3
    trials: int = 200
    memories: int = 8

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} of an effort must be {least} or more, got {getattr(self, name)}"
                )

    @property
    def tokens(self) -> int:
        """Number of tokens that the text must have."""
        middle = self.contexts * (self.context + self.passage)
        return max(self.chunks * self.chunk, self.inside, middle, self.prompts * self.prompt)

    def within(self, positions: int) -> Self:
        """Return the effort for a model with few positions.

        Args:
          positions: largest number of positions of the model.
        Raises:
          ValueError: they are fewer than 64, or too few for the passages of so many contexts.
        """
        if positions < SHORTEST:
            raise ValueError(
                f"the limits need a model of {SHORTEST} positions or more, got {positions}"
            )
        prompt = min(self.prompt, positions // 4)
        passage = min(self.passage, positions // (2 * self.contexts))
        context = min(self.context, positions - passage)
        return dataclasses.replace(
            self,
            chunk=min(self.chunk, positions),
            inside=min(self.inside, positions),
            context=context,
            passage=min(passage, (context - MARGIN) // self.contexts),
            prompt=prompt,
            new=min(self.new, positions - prompt),
        )


EFFORTS = {
    "fast": Effort(
        chunks=2,
        inside=512,
        contexts=3,
        context=512,
        new=80,
        sentences=200,
        variants=2,
        trials=60,
        memories=4,
    ),
    "default": Effort(),
}
