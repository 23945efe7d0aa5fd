"""Token sequences of texts: cut, and split into those to train on and those to judge on."""

import warnings

import numpy as np

from jaxquant.evaluate import chunk
from jaxquant_models.readers.model import Model

CONTEXT = 512  # tokens of one sequence to calibrate or train on
HELD_OUT = 8  # sequences kept apart to judge training on, at most


def context_length(model: Model) -> int:
    """Tokens of one sequence to calibrate or train on: 512, or all positions the model has."""
    return min(CONTEXT, model.config.max_position)


def token_sequences(model: Model, text: str, length: int, count: int | None = None) -> np.ndarray:
    """Sequences [N, length] of a text; each begins with the model's [bos], if any, as in llama.cpp.

    Args:
      count: the first so many; None: all.
    Raises:
      ValueError: the text is too short, or the model was made for fewer positions than `length`.
    """
    if length > model.config.max_position:
        raise ValueError(f"ctx {length} exceeds the model's {model.config.max_position} positions")
    sequences = chunk(model.tokenizer.encode(text), length, count)
    if bos := model.bos_ids:
        sequences[:, 0] = bos[0]
    return sequences


def first_tokens(sequences: np.ndarray, tokens: int) -> np.ndarray:
    """The first sequences of so many tokens; warns where there are fewer."""
    wanted = max(1, tokens // sequences.shape[1])
    if len(sequences) < wanted:
        warnings.warn(
            f"the calibration text has {sequences.size} tokens for it, {tokens} were asked",
            stacklevel=3,
        )
    return sequences[:wanted]


def split(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split sequences into those to train on and the last ones, a quarter but at most `HELD_OUT`.

    Raises:
      ValueError: there are too few.
    """
    if len(sequences) < 3:
        raise ValueError(
            f"the text has {len(sequences)} sequences of {sequences.shape[1]} tokens; to train "
            f"or to share bits out takes 3 or more, since some are kept apart: give a longer text"
        )
    kept = max(1, min(HELD_OUT, len(sequences) // 4))
    return sequences[:-kept], sequences[-kept:]
