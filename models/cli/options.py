"""Options shared by several commands."""

import click
from pydantic import JsonValue

from jaxquant_models.schemas.strict import parse_json

SEED = click.IntRange(0, 2**32 - 1)


def setting(text: str) -> tuple[str, JsonValue]:
    """Return the name and value of a `--set NAME=VALUE`; a value that is not JSON is a string.

    Args:
      text: the text after `--set`.
    Raises:
      ValueError: the text does not have this form.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, parse_json(value, name)
    except ValueError:
        return name, value
