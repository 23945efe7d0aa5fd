"""Conversion of jaxquant's frozen dataclasses to and from plain JSON values."""

import dataclasses
import difflib
from typing import Any

from jaxquant import formats, rounding, transforms
from jaxquant.adapters import L4Q, PEQA, Adapted, LoRA, LoTA, QALoRA
from jaxquant.core.activations import Activations
from jaxquant.core.fields import shown
from jaxquant.core.protocols import (
    Adapter,
    Estimator,
    Format,
    RangeEstimator,
    Rounder,
    Transform,
)
from jaxquant.core.tensor import View
from jaxquant.estimators.input_ranges import PACT, LSQRange
from jaxquant.estimators.latent_format import Drawing, Latent
from jaxquant.estimators.learned_clipping import LearnedClipping
from jaxquant.estimators.weight_estimators import LSQ, AbsMean, StraightThrough, StretchedElastic
from jaxquant.methods.method import Keep, Method

DEEPEST = 20
_PARTS = [vars(m)[name] for m in (formats, rounding, transforms) for name in m.__all__]
_TRAINED = (
    AbsMean, LSQ, StraightThrough, StretchedElastic, LearnedClipping, LSQRange, PACT,
    Drawing, Latent, Adapted, LoRA, LoTA, QALoRA, L4Q, PEQA,
)  # fmt: skip
_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (*_PARTS, *_TRAINED, Activations, Method, Keep, View)
    if isinstance(t, type) and dataclasses.is_dataclass(t)
}
KINDS = (Format, Transform, Rounder, Estimator, RangeEstimator, Adapter)


def register(part: type) -> type:
    """Register a custom class so that checkpoints and recipes can name it; a decorator.

    Args:
      part: a frozen dataclass that derives from `Format`, `Transform`, `Rounder`, `Estimator`,
        `RangeEstimator` or `Adapter`. Its fields must hold JSON values, tuples or other such
        dataclasses. It is stored under the class name, so a program that loads it must first
        register a class of the same name.
    Returns:
      The class.
    Raises:
      ValueError: `part` is not such a class, or another class has the same name.

    >>> register(dict)
    Traceback (most recent call last):
    ValueError: expected a class that derives from Format, Transform, Rounder, Estimator, ...
    """
    if not (isinstance(part, type) and issubclass(part, KINDS)):
        *others, last = (kind.__name__ for kind in KINDS)
        kinds = f"{', '.join(others)} or {last}"
        raise ValueError(f"expected a class that derives from {kinds}, got {shown(part)}")
    options = vars(part).get("__dataclass_params__")
    if options is None or not options.frozen:
        raise ValueError(f"{part.__name__} must be a dataclass itself, with frozen=True")
    known = _TYPES.get(part.__name__, part)
    place = lambda t: (
        t.__module__,
        t.__qualname__,
    )  # reloading a module creates new classes
    if place(known) != place(part):
        raise ValueError(
            f"the name {part.__name__!r} is taken by {known.__module__}; choose another"
        )
    _TYPES[part.__name__] = part
    return part


def to_json(value: Any) -> Any:
    """Return a value as JSON; a dataclass becomes {"type": name, field: ...}.

    Args:
      value: a dataclass, tuple, list or plain JSON value; tuples become lists.

    >>> from_json(to_json(formats.Integer(bits=3))) == formats.Integer(bits=3)
    True
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any, depth: int = 0) -> Any:
    """Read a value written by `to_json`; lists come back as tuples.

    Args:
      value: parsed JSON.
      depth: current nesting depth; callers leave it at 0.
    Raises:
      ValueError: a type or field is unknown to this version, a field has a bad value, or values are
        nested more than `DEEPEST` levels deep.
    """
    if depth > DEEPEST:
        raise ValueError(f"values are nested more than {DEEPEST} levels deep")
    if isinstance(value, list):
        return tuple(from_json(v, depth + 1) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("type")
    if not isinstance(name, str) or name not in _TYPES:
        near = difflib.get_close_matches(str(name)[:40], sorted(_TYPES), 3, 0.0)
        raise ValueError(f"unknown type {shown(name)}; nearest: {', '.join(near)}")
    given = {k: from_json(v, depth + 1) for k, v in value.items() if k != "type"}
    fields = [f.name for f in dataclasses.fields(_TYPES[name])]
    if unknown := sorted(given.keys() - set(fields)):
        raise ValueError(f"{name} has no {shown(unknown[0])}; it has {', '.join(fields) or 'none'}")
    try:
        return _TYPES[name](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
