"""Training examples from a JSONL file: conversations, or prompts with completions.

Only completions (the messages of the assistant) are predicted. Sequences are padded at their ends,
which causal attention never sees from inside a sequence, and the loss leaves the padding out.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant_models.readers.model import Model
from jaxquant_models.runs.chat import template_of
from jaxquant_models.schemas.files import TrainingExample
from jaxquant_models.schemas.strict import checked, parse_json, read_text_file


def read_examples(file: str | Path) -> list[TrainingExample]:
    """Return the examples of a JSONL file; empty lines are skipped.

    Args:
      file: the file. Every line is an object with "messages" (each with "role" and "content"), or
        with "prompt" and "completion".
    Raises:
      ValueError: the file cannot be read, a line is not such an object (the message gives its
        number), or there are none.
    """
    examples = []
    for number, line in enumerate(read_text_file(Path(file)).splitlines(), 1):
        if line.strip():
            where = f"{file}, line {number}"
            examples.append(checked(TrainingExample, parse_json(line, where), where))
    if not examples:
        raise ValueError(f"{file} holds no examples: expected one JSON object per line")
    return examples


def example_sequences(
    model: Model, examples: Sequence[TrainingExample], length: int
) -> Int[np.ndarray, "N 2 t"]:
    """Return token sequences of examples, and which of their tokens are predicted.

    Args:
      model: the model, whose tokenizer and chat template are used.
      examples: the examples.
      length: number of tokens per sequence. Longer examples are cut off, shorter ones padded.
    Returns:
      int32 [N, 2, length]: the tokens, and 1 for those that are predicted, else 0. A prompt and its
      completion follow each other as they are, and the model's first end-of-sequence token, which
      is predicted too, ends them; a conversation is written by the chat template. Examples whose
      completions begin beyond `length` are left out.
    Raises:
      ValueError: the model has no chat template for conversations, the template does not write a
        conversation as a continuation of its beginning, or no example is left.
    Warns:
      If examples are left out.
    """
    rows, fill = [], next(iter(model.config.eos_ids), 0)
    for example in examples:
        tokens, predicted = _encoded(model, example)
        tokens, predicted = tokens[:length], predicted[:length]
        if any(predicted[1:]):
            pad = length - len(tokens)
            rows.append([tokens + [fill] * pad, predicted + [0] * pad])
    if not rows:
        raise ValueError(f"no completion begins within the first {length} tokens of its example")
    if lost := len(examples) - len(rows):
        warnings.warn(
            f"{lost} of {len(examples)} examples were left out: their completions begin after the "
            f"first {length} tokens; give a longer --context",
            stacklevel=2,
        )
    return np.asarray(rows, np.int32)


def _encoded(model: Model, example: TrainingExample) -> tuple[list[int], list[int]]:
    """Return the tokens of an example, and 1 for those that are predicted."""
    encode = model.tokenizer.encode
    if example.messages is None:
        prompt = model.bos_ids + encode(example.prompt or "")
        answer = encode(example.completion or "") + list(model.config.eos_ids[:1])
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)
    template, messages = template_of(model), [m.model_dump() for m in example.messages]
    tokens: list[int] = []
    predicted: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = encode(template.render(messages[:i]))
        whole = encode(template.render(messages[: i + 1], answer=False))
        if before[: len(tokens)] != tokens or whole[: len(before)] != before:
            raise ValueError(
                "the chat template writes a message differently once others follow, so it is not "
                'known which tokens are answers; give "prompt" and "completion" instead'
            )
        predicted += [0] * (len(before) - len(tokens)) + [1] * (len(whole) - len(before))
        tokens = whole
    return tokens, predicted


def completion_loss(logits: Float[Array, "b t v"], x: Int[Array, "b 2 t"]) -> Array:
    """Return the mean cross-entropy of the tokens that are predicted, in nats.

    Args:
      logits: predictions at each token.
      x: tokens and which are predicted, as in `example_sequences`.

    >>> x = jnp.array([[[0, 1, 1], [0, 0, 1]]])
    >>> f"{completion_loss(jnp.zeros((1, 3, 2)).at[0, 0].set(9.0), x):.4f}"
    '0.6931'
    """
    following = jnp.roll(x[:, 0], -1, axis=1)[..., None]
    weight = jnp.roll(x[:, 1], -1, axis=1).at[:, -1].set(0).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, following, axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(nll * weight) / jnp.maximum(jnp.sum(weight), 1.0)
