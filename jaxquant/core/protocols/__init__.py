"""Interfaces of the replaceable parts: formats, transforms, rounders, estimators, learned ranges.

A part is a frozen dataclass that derives from the base class of its kind. Abstract members must be
defined; the others have defaults. Optional abilities are declared by plain class attributes, listed
under "Capabilities". Nothing else is required, and no attribute is probed for.

To add a part of your own, in this package or outside of it:

  1. Derive from `Format` (or from `GridFormat` if codes are chosen row by row, so that every
    rounder accepts the format), `Transform`, `Rounder`, `Estimator` or `RangeEstimator`, and define
    the abstract members.
  2. Put it in a `Method`, which `quantize` and recipes accept like any other.
  3. Call `jaxquant.recipes.register(YourClass)` once, so that checkpoints and recipes can name it.

`tests/support/foreign.py` does this with one part of each of three kinds. To run the contract
suites on a new part, add one line to their tables.

Notation: a weight is a matrix [k, n] with y = x @ w. Arrays are float32 unless stated otherwise.
"""

from typing import Any

from jaxquant.core.protocols.formats import Codes, Data, Format, Grid, GridFormat, OpArguments
from jaxquant.core.protocols.levels import LevelFormat
from jaxquant.core.protocols.rounders import Moments, Rounder
from jaxquant.core.protocols.training import ActivationForm, Estimator, RangeEstimator
from jaxquant.core.protocols.transforms import Transform

__all__ = [
    "ActivationForm",
    "Codes",
    "Data",
    "Estimator",
    "Format",
    "Grid",
    "GridFormat",
    "LevelFormat",
    "Moments",
    "OpArguments",
    "RangeEstimator",
    "Rounder",
    "Transform",
    "lacking",
]


def lacking(kind: type, value: Any) -> str:
    """Say what an object lacks to be a part of some kind.

    Args:
      kind: one of the base classes of this package.
      value: the object.

    Returns:
      A message, or "" if the object is an instance of `kind`.

    >>> lacking(Rounder, 3)
    'an int is no Rounder: derive it from Rounder and define __call__'
    """
    if isinstance(value, kind):
        return ""
    of = type(value).__name__
    needed = sorted(getattr(kind, "__abstractmethods__", ()))
    defined = {name for one in type(value).__mro__ for name in vars(one)}
    missing = [name for name in needed if name not in defined]
    article = "an" if of[:1].lower() in "aeiou" else "a"
    rest = f" and define {', '.join(missing)}" if missing else ""
    return f"{article} {of} is no {kind.__name__}: derive it from {kind.__name__}{rest}"
