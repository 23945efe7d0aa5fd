"""Frozen dataclasses check the plain types of their fields, from code and from JSON alike."""

import dataclasses
from typing import Any

_PLAIN: dict[Any, Any] = {bool: bool, int: int, str: str, float: (int, float)}


def check_fields(value: Any) -> None:
    """Raise ValueError unless every field annotated bool, int, str or float holds one.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Size:
    ...     bits: int
    ...     __post_init__ = check_fields
    >>> Size(4.0)
    Traceback (most recent call last):
    ValueError: bits must be int, got 4.0
    """
    for field in dataclasses.fields(value):
        got: Any = getattr(value, field.name)
        wanted: Any = field.type
        if wanted not in _PLAIN:
            continue
        if not isinstance(got, _PLAIN[wanted]) or (isinstance(got, bool) and wanted is not bool):
            raise ValueError(f"{field.name} must be {wanted.__name__}, got {got!r}")


def check_positive(value: Any, *names: str) -> None:
    """Raise ValueError unless the fields of these names are above zero."""
    for name in names:
        if not getattr(value, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(value, name)}")
