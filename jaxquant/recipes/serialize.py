"""Frozen dataclasses of the house to and from plain JSON values."""

import dataclasses
import difflib
from typing import Any

from jaxquant import formats, rounding, transforms
from jaxquant.core.activations import Activations
from jaxquant.core.fields import shown
from jaxquant.core.protocols import Estimator, Format, RangeEstimator, Rounder, Transform
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
    Drawing, Latent,
)  # fmt: skip
_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (*_PARTS, *_TRAINED, Activations, Method, Keep, View)
    if isinstance(t, type) and dataclasses.is_dataclass(t)
}
KINDS = (Format, Transform, Rounder, Estimator, RangeEstimator)


def register(part: type) -> type:
    """Let checkpoints and recipes name a part of one's own by its class; a decorator.

    Args:
      part: a frozen dataclass that derives from a `Format`, `Transform`, `Rounder`, `Estimator` or
        `RangeEstimator`; its fields hold JSON values, tuples or other parts. It is known by the
        name of the class, so whoever loads must register one of the same name first.
    Returns:
      the class.
    Raises:
      ValueError: it is no such class, or another one has its name.

    >>> register(dict)
    Traceback (most recent call last):
    ValueError: expected a class that derives from Format, Transform, Rounder, Estimator or ...
    """
    if not (isinstance(part, type) and issubclass(part, KINDS)):
        *others, last = (kind.__name__ for kind in KINDS)
        kinds = f"{', '.join(others)} or {last}"
        raise ValueError(f"expected a class that derives from {kinds}, got {shown(part)}")
    options = vars(part).get("__dataclass_params__")
    if options is None or not options.frozen:
        raise ValueError(f"{part.__name__} must be a dataclass of its own, with frozen=True")
    known = _TYPES.get(part.__name__, part)
    place = lambda t: (
        t.__module__,
        t.__qualname__,
    )  # a module that is loaded again has new classes
    if place(known) != place(part):
        raise ValueError(
            f"the name {part.__name__!r} is taken by {known.__module__}; choose another"
        )
    _TYPES[part.__name__] = part
    return part


def to_json(value: Any) -> Any:
    """A JSON value; a dataclass becomes {"type": name, field: ...}.

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
    """Inverse of `to_json`; lists come back as tuples.

    Raises:
      ValueError: a type or field this version does not know, a value that its field does not take,
        or values more than `DEEPEST` deep in one another.
    """
    if depth > DEEPEST:
        raise ValueError(f"values lie more than {DEEPEST} deep in one another")
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
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
