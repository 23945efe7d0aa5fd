"""Token sequences of texts, split into training and held-out sequences."""

import warnings

import numpy as np

from jaxquant.evaluation import chunk
from jaxquant_models.readers.model import Model

CONTEXT = 512  # number of tokens of a calibration or training sequence
HELD_OUT = 8  # maximum number of sequences held out to evaluate training
MEASURED = HELD_OUT // 4  # number of these on which an allocation is evaluated


def context_length(model: Model) -> int:
    """Return the number of tokens of a calibration or training sequence for a model.

    It is 512, or the model's maximum number of positions if that is smaller.

    Args:
      model: the model.
    """
    return min(CONTEXT, model.config.max_position)


def token_sequences(model: Model, text: str, length: int, count: int | None = None) -> np.ndarray:
    """Return sequences [N, length] of a text.

    Each begins with the model's [bos] token, if it has one, as in llama.cpp.

    Args:
      model: the model.
      text: the text.
      length: number of tokens per sequence.
      count: number of sequences, from the beginning; None for all.
    Raises:
      ValueError: the text is too short, or the model supports fewer positions than `length`.
    """
    if length > model.config.max_position:
        raise ValueError(f"ctx {length} exceeds the model's {model.config.max_position} positions")
    sequences = chunk(model.tokenizer.encode(text), length, count)
    if bos := model.bos_ids:
        sequences[:, 0] = bos[0]
    return sequences


def first_tokens(sequences: np.ndarray, tokens: int) -> np.ndarray:
    """Return the first sequences, with `tokens` tokens in total; warn if there are fewer.

    Args:
      sequences: token ids, int [N, length].
      tokens: total number of tokens wanted; at least one sequence is returned.
    """
    wanted = max(1, tokens // sequences.shape[1])
    if len(sequences) < wanted:
        warnings.warn(
            f"the calibration text has only {sequences.size} tokens for calibration, "
            f"but {tokens} were requested",
            stacklevel=3,
        )
    return sequences[:wanted]


def split(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the training sequences and the held-out ones: the last quarter, at most `HELD_OUT`.

    Args:
      sequences: at least three sequences.
    Raises:
      ValueError: there are fewer than three.
    """
    if len(sequences) < 3:
        raise ValueError(
            f"there are {len(sequences)} sequences of {sequences.shape[-1]} tokens, but at least "
            "3 are needed, since some are held out: give a longer text, or more examples"
        )
    kept = max(1, min(HELD_OUT, len(sequences) // 4))
    return sequences[:-kept], sequences[-kept:]
