"""What every part must offer: formats, transforms, rounders, estimators, learned ranges.

A part is a frozen dataclass that derives from the class here that names its kind. Abstract members
must be defined; the others have defaults, and the capabilities among them, plain class attributes,
say what more a part can do. Nothing else is asked of it, and nothing is probed for.

To add a part of your own, outside of this package too:

  1. Derive from `Format` (or from `GridFormat`, if codes are chosen row by row, so that every
     rounder takes it), `Transform`, `Rounder`, `Estimator` or `RangeEstimator`, and define what is
     abstract.
  2. Put it in a `Method`, which `quantize` and recipes take like any other.
  3. Call `jaxquant.register(YourClass)` once, so that checkpoints and recipes can name it.

`tests/foreign.py` does that with one of three kinds; the contract suites take a new part by one
line in their tables.

Notation: a weight is a matrix [k, n] with y = x @ w. Arrays are float32 where not stated otherwise.
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
    """What an object would need to be of a kind of part, in words; "" if it is one.

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
