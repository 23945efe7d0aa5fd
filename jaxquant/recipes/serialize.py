"""Frozen dataclasses of the house to and from plain JSON values."""

import dataclasses
import difflib
from typing import Any

from jaxquant import formats, rounding, transforms
from jaxquant.core.activations import Activations
from jaxquant.core.fields import shown
from jaxquant.core.tensor import View
from jaxquant.estimators import input_ranges, latent, learned_clipping, surrogates
from jaxquant.methods.registry import Keep, Method

DEEPEST = 20
_PARTS = [vars(m)[name] for m in (formats, rounding, transforms) for name in m.__all__]
_TRAINED = (
    surrogates.AbsMean, surrogates.LSQ, surrogates.StraightThrough, surrogates.StretchedElastic,
    learned_clipping.LearnedClipping, input_ranges.LSQRange, input_ranges.PACT, latent.Drawing,
    latent.Latent,
)  # fmt: skip
_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (*_PARTS, *_TRAINED, Activations, Method, Keep, View)
    if hasattr(t, "__dataclass_fields__")
}


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
