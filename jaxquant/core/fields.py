"""Field checks of frozen dataclasses: types, and that numbers are finite."""

import dataclasses
import math
import reprlib
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**32 - 1  # of integers: the range of a seed; sizes and counts are below it
LONGEST = 200  # characters of a text; all texts are names
_MOST = sys.float_info.max


def check_fields(value: Any) -> None:
    """Raise ValueError unless every field matches its annotation.

    Checked are bool, int, str, float, None, literals, tuples of these, and unions. Floats must be
    finite, integers at most 2**32 - 1 in magnitude, texts at most 200 characters long, and a
    boolean is not a number. A list in the place of a tuple is converted. Fields annotated with
    classes or Any are left to the dataclass. The metadata of a field may map float to what the
    message adds if a fraction comes where an integer must stand.

    Args:
      value: an instance of a frozen dataclass; use this function as its `__post_init__`.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Size:
    ...     bits: int = dataclasses.field(metadata={float: "Trellis takes fractions"})
    ...     block: int | None = None
    ...     __post_init__ = check_fields
    >>> Size(4.0)
    Traceback (most recent call last):
    ValueError: bits must be int, got 4.0; write 4
    >>> Size(2.5)
    Traceback (most recent call last):
    ValueError: bits must be int, got 2.5; Trellis takes fractions
    >>> Size(4, float("inf"))
    Traceback (most recent call last):
    ValueError: block must be int or None, got inf
    """
    for field in dataclasses.fields(value):
        got = getattr(value, field.name)
        if isinstance(got, list) and get_origin(field.type) is tuple:
            got = tuple(got)
            object.__setattr__(value, field.name, got)
        if not _fits(got, field.type):
            wanted, hint = _wanted(field.type, got), _hint(got, field)
            raise ValueError(f"{field.name} must be {wanted}, got {shown(got)}{hint}")


def _fits(got: Any, wanted: Any) -> bool:
    whole = isinstance(got, int) and not isinstance(got, bool)
    if wanted is bool:
        return isinstance(got, bool)
    if wanted is str:
        return isinstance(got, str) and len(got) <= LONGEST
    if wanted is int:
        return whole and abs(got) <= LARGEST
    if wanted is float:  # NaN fails both comparisons
        return (whole or isinstance(got, float)) and -_MOST <= got <= _MOST
    if wanted is None or wanted is type(None):
        return got is None
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(_fits(got, one) for one in args)
    if origin is Literal:
        return any(type(got) is type(one) and got == one for one in args)
    if origin is tuple and args[1:] == (...,):
        return isinstance(got, tuple) and all(_fits(one, args[0]) for one in got)
    return True


def _wanted(wanted: Any, got: Any = None) -> str:
    """Describe an annotation, as narrowly as the value that was given requires."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _either([_wanted(one, got) for one in args])
    if origin is Literal:
        return f"one of {args}"
    if origin is tuple:
        return f"a tuple of {_wanted(args[0])}"
    if wanted is int and isinstance(got, int) and not isinstance(got, bool):
        return f"int of at most {LARGEST}"
    if wanted is str and isinstance(got, str):
        return f"str of at most {LONGEST} characters"
    if wanted is float and isinstance(got, int | float) and not isinstance(got, bool):
        return "a finite float"
    return "None" if wanted is type(None) else getattr(wanted, "__name__", str(wanted))


def _hint(got: Any, field: dataclasses.Field) -> str:
    """Return what to do about a finite float in the place of an integer, or ""."""
    of = got[0] if isinstance(got, tuple) and got else got
    if not isinstance(of, float) or not math.isfinite(of):
        return ""
    if of.is_integer():
        return f"; write {int(of)}" if _fits(int(of), field.type) else ""
    return f"; {field.metadata[float]}" if float in field.metadata else ""


def _either(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def article(noun: str) -> str:
    """Return the indefinite article of a noun by its first letter.

    >>> article("Estimator"), article("Format")
    ('an', 'a')
    """
    return "an" if noun[:1].lower() in "aeiou" else "a"


def shown(value: Any) -> str:
    """Format a value for an error message, shortened to one line.

    >>> shown([1, "a" * 99])
    "[1, 'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa']"
    """
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring, short.maxother = 60, 120  # enough for a path, and for a dataclass of ours
    return " ".join(short.repr(value).split())


def brief(value: Any) -> str:
    """Format a dataclass on one line: its integers, and other fields that differ from the default.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Grid:
    ...     bits: int = 4
    ...     clip: float = 1.0
    >>> brief(Grid()), brief(Grid(clip=0.9))
    ('Grid(bits=4)', 'Grid(bits=4, clip=0.9)')
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    given = ((f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr)
    parts = (f"{f.name}={brief(v)}" for f, v in given if type(v) is int or v != f.default)
    return f"{type(value).__name__}({', '.join(parts)})"


def check_positive(value: Any, *names: str) -> None:
    """Raise ValueError unless these fields are positive.

    Args:
      value: an object.
      *names: names of its fields.
    """
    for name in names:
        if not getattr(value, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(value, name)}")
