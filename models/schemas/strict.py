"""What comes from outside: JSON read strictly, and a schema's errors in one line.

The line says which file, which field, what was expected, and what came.
"""

import json
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from jaxquant.core.fields import shown

S = TypeVar("S", bound="Schema")
V = TypeVar("V", bound=Hashable)


class Schema(BaseModel):
    """What a file must hold; fields that it does not name may be anything.

    Types are strict: no text for a number, no number for a boolean; no NaN and no infinity.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, extra="ignore", protected_namespaces=()
    )


def checked(schema: type[S], data: object, where: str, prefix: str = "") -> S:
    """The data as the schema has it.

    Args:
      data: plain values, as from JSON.
      where: names the source in an error.
      prefix: stands before the names of fields in the source.
    Raises:
      ValueError: a field is missing, or of another type or range; the first one, in one line.

    >>> class Size(Schema):
    ...     width: int
    >>> checked(Size, {"width": "4"}, "size.json")
    Traceback (most recent call last):
    ValueError: size.json: width must be a valid integer, got '4'
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ValueError(_line(error.errors(include_url=False)[0], where, prefix)) from None


def _line(error: ErrorDetails, where: str, prefix: str) -> str:
    """Of one error of pydantic's."""
    if error["type"] == "value_error":  # a check of the schema's own, which names its fields
        return f"{where}: {error['ctx']['error']}"
    name = prefix + ".".join(map(_part, error["loc"]))
    if error["type"] == "missing":
        return f"{where} lacks {name!r}"
    if error["input"] is None:
        return f"{where} lacks {name!r}: it {_expected(error)}, not null"
    return f"{where}: {name or 'it'} {_expected(error)}, got {shown(error['input'])}"


def _expected(error: ErrorDetails) -> str:
    """What the schema wants: must be ..."""
    if error["type"] == "literal_error":
        *others, last = (w.strip(" ',") for w in re.split(r",| or ", error["ctx"]["expected"]))
        if len(others) < 2:
            return "must be " + " or ".join([*others, last])
        return f"must be one of {', '.join([*others, last])}"
    for bound, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
        if bound in error.get("ctx", ()):
            value = error["ctx"][bound]
            return f"must be {word} {f'{value:g}' if isinstance(value, float) else value}"
    return re.sub(r"^\w+ should ", "must ", error["msg"]).split(" after validation")[0]


def _part(part: int | str) -> str:
    """Of a field's path; a key that the file chose is cut short."""
    text = str(part)
    return text if text.replace("_", "").replace(".", "").isalnum() else shown(text)


def read_json(path: Path) -> dict[str, JsonValue]:
    """The object in a JSON file. Raises ValueError if there is none."""
    data = parse_json(read_bytes(path), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} should hold a JSON object, holds a {type(data).__name__}")
    return data


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def parse_json(text: str | bytes, where: str) -> JsonValue:
    """The value that a JSON text stands for.

    Raises:
      ValueError: not UTF-8, not JSON, nested too deep, a key twice in an object, or the literals
        NaN and Infinity, which JSON does not have.

    >>> parse_json('{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ValueError: x.json is not JSON: the key 'a' comes twice in an object
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} is invalid") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _object(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = first_repeat(key for key, _ in pairs)
        raise ValueError(f"the key {shown(key)} comes twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def first_repeat(values: Iterable[V]) -> V | None:
    """The first value that came before; None if each comes once."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
