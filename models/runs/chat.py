"""Conversations with a model by its chat template, with a cache that is kept between answers."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax

import jaxquant as jq
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.readers.chat_template import ChatTemplate, Message
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.generate import Session

STRIDE = 8  # tokens between two pieces of an answer
ROOM = 1024  # tokens for which the first cache has room; a longer conversation gets a larger one


def template_of(model: Model) -> ChatTemplate:
    """Return the chat template of a model.

    Args:
      model: the model.
    Raises:
      ValueError: it has none.
    """
    if model.tokenizer.chat is None:
        raise ValueError(
            f"{model.name} has no chat template, so it can only continue texts (jaxquant "
            f"generate); a checkpoint written before jaxquant 0.2 lacks it: quantize the model "
            f"again"
        )
    return model.tokenizer.chat


def chat_model(model: Model) -> Model:
    """Return the model with the token that ends an answer, by its template, as a stop token.

    The configuration of a model often names only the token that ends a text.

    Args:
      model: a model with a chat template.
    Raises:
      ValueError: it has no template, or the template fails.
    """
    ids = model.tokenizer.encode(template_of(model).after_answer().lstrip())[:1]
    stops = tuple(i for i in ids if model.tokenizer.is_added(i))
    eos_ids = tuple(dict.fromkeys(model.config.eos_ids + stops))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=eos_ids))


def chat_ids(model: Model, messages: Iterable[Message]) -> list[int]:
    """Return the tokens of a conversation, up to the beginning of the next answer.

    Args:
      model: a model with a chat template, which also writes the token that begins a text.
      messages: the messages so far.
    Raises:
      ValueError: the model has no template, or the template fails.
    """
    return model.tokenizer.encode(template_of(model).render(list(messages)))


class Conversation:
    """A conversation, answered by sampling or by the most likely tokens.

    Attributes:
      messages: what has been said.
      session: the generation, with its times.
      tokens: number of tokens of the last answer.

    Args:
      model: a model with a chat template, ready to serve.
      system: the system message; "" leaves it to the template.
      max_tokens: maximum number of tokens of an answer.
      temperature: as in `runs.generate.generate`.
      seed: seed of the sampling.
      kv: format of the cache, or None.
    Raises:
      ValueError: the model has no template, or the template fails.
    """

    def __init__(
        self,
        model: Model,
        system: str = "",
        max_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        kv: KVFormat | None = None,
    ) -> None:
        self.model = chat_model(model)
        self.max_tokens, self.temperature, self.tokens = max_tokens, temperature, 0
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._key = jax.random.key(seed)
        # After an exact prefix, a long call would be taken for the beginning of a text.
        self.session = Session(
            jq.quantized(model.apply_cached), model.params, self.model.config, kv=kv,
            size=min(ROOM, model.config.max_position), keeps=not model.prefix,
        )  # fmt: skip

    def ask(self, text: str) -> Iterator[str]:
        """Yield the pieces of the answer; afterwards, question and answer are among the messages.

        Args:
          text: the question.
        Raises:
          ValueError: the template fails, or the conversation exceeds the model's positions.
        """
        question: Message = {"role": "user", "content": text}
        ids = chat_ids(self.model, [*self.messages, question])
        most = self.model.config.max_position
        if len(ids) >= most:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, but the model only {most} "
                "positions; start a new one"
            )
        self._key, key = jax.random.split(self._key)
        count = min(self.max_tokens, most - len(ids))
        answer: list[int] = []
        yield from _pieces(
            self.model.tokenizer,
            self.session.stream(ids, count, self.temperature, key, STRIDE),
            answer,
        )
        self.tokens = len(answer)
        said: Message = {"role": "assistant", "content": self.model.tokenizer.decode(answer)}
        self.messages += [question, said]


def _pieces(tokenizer: Tokenizer, parts: Iterable[list[int]], ids: list[int]) -> Iterator[str]:
    """Yield the text of the tokens as they come, in whole characters, and collect their ids."""
    shown = ""
    for part in parts:
        ids += part
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") and text.startswith(shown):  # else a character is incomplete
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(ids)
    if text != shown:
        yield text[len(shown) :]
