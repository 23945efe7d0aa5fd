"""Strict parsing of external data: JSON, and schema violations reported in one line.

The line states the file, the field, what was expected and what was found.
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
    """Base class of schemas; fields that a schema does not name are ignored.

    Types are strict: strings are not accepted as numbers, nor numbers as booleans, and NaN and
    infinity are rejected.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, extra="ignore", protected_namespaces=()
    )


def checked(schema: type[S], data: object, where: str, prefix: str = "") -> S:
    """Return the data as an instance of the schema.

    Args:
      schema: the schema.
      data: plain values, as from JSON.
      where: name of the source in error messages.
      prefix: prefix of the field names in the source.
    Raises:
      ValueError: a field is missing, or has the wrong type or range; the message is one line about
        the first such field.

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
    """Format one pydantic error."""
    if error["type"] == "value_error":  # a check of the schema's own, which names its fields
        return f"{where}: {error['ctx']['error']}"
    name = prefix + ".".join(map(_part, error["loc"]))
    if error["type"] == "missing":
        return f"{where} lacks {name!r}"
    if error["input"] is None:
        return f"{where} lacks {name!r}: it {_expected(error)}, not null"
    return f"{where}: {name or 'it'} {_expected(error)}, got {shown(error['input'])}"


def _expected(error: ErrorDetails) -> str:
    """Return what the schema expects, as "must be ..."."""
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
    """Return one part of a field's path; a key chosen by the file is shortened."""
    text = str(part)
    return text if text.replace("_", "").replace(".", "").isalnum() else shown(text)


def read_json(path: Path) -> dict[str, JsonValue]:
    """Return the object in a JSON file. Raises ValueError if there is none.

    Args:
      path: the file.
    """
    data = parse_json(read_bytes(path), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(data).__name__}")
    return data


def read_bytes(path: Path) -> bytes:
    """Return the contents of a file. Raises ValueError if it cannot be read.

    Args:
      path: the file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def read_text_file(path: Path) -> str:
    """Return the contents of a text file. Raises ValueError if it is not readable or not UTF-8.

    Args:
      path: the file.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from None


def parse_json(text: str | bytes, where: str) -> JsonValue:
    """Return the value of a JSON text.

    Args:
      text: the text; bytes must be UTF-8.
      where: name of the source in error messages.
    Raises:
      ValueError: text is not UTF-8 or not JSON, is nested too deep, repeats a key in an object, or
        has the literals NaN or Infinity, which are not JSON.

    >>> parse_json('{"a": 1, "a": 2}', "x.json")
    Traceback (most recent call last):
    ValueError: x.json is not JSON: the key 'a' appears twice in an object
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError(f"{where} is not readable as JSON: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: byte {error.start} is invalid") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _object(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = first_repeat(key for key, _ in pairs)
        raise ValueError(f"the key {shown(key)} appears twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def first_repeat(values: Iterable[V]) -> V | None:
    """Return the first value that occurred before, or None if all are distinct.

    Args:
      values: hashable values.
    """
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
