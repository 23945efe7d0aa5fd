"""Interfaces of the replaceable parts: formats, transforms, rounders, estimators, adapters.

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

from jaxquant.core.fields import article, shown
from jaxquant.core.protocols.adapters import Adapter, Known
from jaxquant.core.protocols.formats import Codes, Data, Format, OpArguments
from jaxquant.core.protocols.grid_formats import Grid, GridFormat
from jaxquant.core.protocols.levels import LevelFormat
from jaxquant.core.protocols.rounders import Moments, Rounder
from jaxquant.core.protocols.training import ActivationForm, Estimator, RangeEstimator
from jaxquant.core.protocols.transforms import Transform

__all__ = [
    "ActivationForm",
    "Adapter",
    "Codes",
    "Data",
    "Estimator",
    "Format",
    "Grid",
    "GridFormat",
    "Known",
    "LevelFormat",
    "Moments",
    "OpArguments",
    "RangeEstimator",
    "Rounder",
    "Transform",
    "lacking",
]


# Base class and ability -> what a part that says that it has the ability must define.
_ABILITIES: dict[tuple[type, str], tuple[str, ...]] = {
    (Format, "wide"): ("scaled",),
    (Format, "storage"): ("arguments",),
    (Format, "recodes"): ("recoded",),
    (Format, "plans"): ("planned",),
    (Format, "exact"): ("settled", "encode_bits", "decode_bits"),
    (Format, "latent"): ("product",),
    (Adapter, "exact"): ("merged",),
    (GridFormat, "fits"): ("fit",),
    (Rounder, "takes_ranges"): ("within",),
    (Transform, "searched"): ("candidates",),
    (Transform, "learns"): ("latent", "learned"),
}


def lacking(kind: type, value: Any) -> str:
    """Say what an object lacks to be a part of some kind.

    Args:
      kind: one of the base classes of this package.
      value: the object.

    Returns:
      A message, or "" if the object is an instance of `kind` with all that its abilities need.

    >>> lacking(Rounder, 3), lacking(Rounder, Rounder)
    ('3 is not a Rounder', 'the class Rounder lacks __call__, and an instance of it is needed')
    """
    is_class = isinstance(value, type)
    of = value if is_class else type(value)
    missing = _missing(kind, of) if is_class else [*_missing(kind, of), *_unable(value)]
    wanted = f"{article(kind.__name__)} {kind.__name__}"
    names = ", ".join(missing)
    if not issubclass(of, kind):
        if of.__module__.partition(".")[0] in ("builtins", "numpy", "jaxquant"):  # not the user's
            return f"{shown(value)} is not {wanted}"
        rest = f" and define {names}" if missing else ""
        return f"{of.__name__} is not {wanted}: derive it from {kind.__name__}{rest}"
    if is_class and missing:
        return f"the class {of.__name__} lacks {names}, and an instance of it is needed"
    if is_class:
        return f"{of.__name__} is a class: pass an instance, {of.__name__}(...)"
    if missing:
        return f"{of.__name__} lacks {names}"
    try:
        hash(value)
    except TypeError as error:
        return f"{of.__name__} cannot be hashed ({error}): make it a dataclass with frozen=True"
    return ""


def _missing(kind: type, of: type) -> list[str]:
    """Return the names of the abstract members of `kind`, and of its own, that a class lacks."""
    needed = {*getattr(kind, "__abstractmethods__", ()), *getattr(of, "__abstractmethods__", ())}
    defined = {name for one in of.__mro__ for name, v in vars(one).items() if not _abstract(v)}
    return sorted(needed - defined)


def _abstract(member: Any) -> bool:
    return getattr(member, "__isabstractmethod__", False)


def _unable(value: Any) -> list[str]:
    """Return the methods that a part lacks, with the ability that it claims and that needs them."""
    return [
        f"{name} (required by {ability} = {getattr(value, ability)!r})"
        for (base, ability), names in _ABILITIES.items()
        if isinstance(value, base) and getattr(value, ability)
        for name in names
        if getattr(type(value), name) is getattr(base, name)
    ]
