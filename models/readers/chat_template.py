"""Chat templates: jinja2 programs, distributed with models, that write a conversation as one text.

The environment is that of Transformers (`utils/chat_template_utils.py`): its options, filters and
functions. A template is a program from outside; it runs in jinja2's sandbox, without access to
files or to attributes of Python objects, and its output and its time are limited.
"""

import dataclasses
import datetime
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from pydantic import JsonValue

from jaxquant_models.schemas.files import ChatTemplateFields
from jaxquant_models.schemas.strict import checked

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}
SECONDS = 10.0  # time that a template may take
LONGEST = 2**22  # maximum number of characters that a template may write or repeat a text to
ANSWER = "jaxquant-answer"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model.

    Attributes:
      source: the jinja2 program.
      tokens: variable of the program, such as "bos_token" -> special token.
    """

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """Return the text of a conversation.

        Args:
          messages: the messages so far.
          answer: whether the text ends with the beginning of an answer of the assistant.
        Raises:
          ValueError: the template is not valid, rejects the messages, or exceeds the limits; the
            message is one line.

        >>> ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}").render(
        ...     [{"role": "user", "content": "Hello"}]
        ... )
        '[Hello]'
        """
        values = {"messages": [dict(m) for m in messages], "add_generation_prompt": answer}
        return _limited(lambda: _render(self.source, {**self.tokens, **values}))

    def after_answer(self) -> str:
        """Return the text that ends an answer, such as "<|im_end|>\\n".

        Raises:
          ValueError: as `render`.
        """
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant"}
        text = self.render([question, {**answer, "content": ANSWER}], answer=False)
        return text.rpartition(ANSWER)[2]

    def to_json(self) -> dict[str, JsonValue]:
        """Return the template as a dict of JSON values; `from_json` is the inverse."""
        return {"source": self.source, "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, data: JsonValue, where: str) -> "ChatTemplate":
        """Return the template that `to_json` serialized.

        Args:
          data: the JSON values.
          where: name of the source in error messages.
        Raises:
          ValueError: data does not have this form.
        """
        held = checked(ChatTemplateFields, data, where)
        return cls(held.source, held.tokens)


def _render(source: str, values: Mapping[str, Any]) -> str:
    parts, length = [], 0
    for part in _ENVIRONMENT.from_string(source).generate(values):
        parts.append(part)
        length += len(part)
        if length > LONGEST:
            raise SecurityError(f"it writes more than {LONGEST} characters")
    return "".join(parts)


def _limited(work: Callable[[], str]) -> str:
    """Return the result of work that may not end, run in a thread that is then left alone."""
    results: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:  # whatever a program from outside raises
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = results.get(timeout=SECONDS)
    except queue.Empty:
        raise ValueError(f"the chat template fails: it takes more than {SECONDS:g} s") from None
    if isinstance(result, Exception):
        text = " ".join(str(result).split())[:200] or type(result).__name__
        raise ValueError(f"the chat template fails: {text}") from None
    return result


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, which also rejects powers and long repetitions, as both may take all memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("it uses powers, which are not allowed")
        for of, times in ((left, right), (right, left)):
            if hasattr(of, "__len__") and isinstance(times, int) and len(of) * times > LONGEST:
                raise SecurityError(f"it repeats a text to more than {LONGEST} characters")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """Prints what is between {% generation %} and {% endgeneration %}, which are for training."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


_ENVIRONMENT = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
)
_ENVIRONMENT.filters["tojson"] = _to_json
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
_ENVIRONMENT.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
