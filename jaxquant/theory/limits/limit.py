"""The result of one check of a limit, and the table of several.

A check compares a measured number with a bound that is computed. What follows if it fails depends
on its kind:

- "theorem": the bound holds for every model that satisfies the assumptions, exact identities
  included. A violation means that the measurement or an assumption is wrong (a nondeterministic
  function, a stale cache, a misstated number of bits). That it holds says nothing about the quality
  of a model: it holds for useless models too.
- "expectation": the bound holds for data of a stated distribution. A violation means that the
  data are unlike it.
- "survival": a measured loss of quality against a stated tolerance. Only these checks judge a
  quantized model.
- "description": a measurement without a verdict.
"""

import dataclasses
import math
from typing import Any, Literal, cast, get_args

from jaxquant.core.text_table import aligned

Kind = Literal["theorem", "expectation", "survival", "description"]
HEADER = ("limit", "kind", "measured", "bound", "verdict", "seconds")
_VERDICTS = {True: ("holds", "survives"), False: ("violated", "collapsed")}


@dataclasses.dataclass(frozen=True)
class Limit:
    """One check.

    Attributes:
      name: short name, unique in a suite, such as "fact floor".
      statement: a sentence that says what is compared with what.
      kind: "theorem", "expectation", "survival" or "description".
      measured: the measured number; None if there is none.
      bound: the number with which it is compared; None if there is none.
      holds: whether the comparison came out as stated; None if it is undecided, if the bound is
        vacuous (a floor that is 0 or less, or a ceiling that is 1 or more, of a share), and always
        for a description.
      seconds: time that the check took.
      note: what else a reader should know: assumptions, the reason of an undecided check.
    Raises:
      ValueError: the name or the statement is empty, the kind is unknown, a number is not finite,
        the time is negative, or a description has a verdict.

    >>> row = Limit("floor", "At least a share of .25 is wrong.", "theorem", 0.3, 0.25, True)
    >>> row.verdict, dataclasses.replace(row, kind="survival", holds=False).verdict
    ('holds', 'collapsed')
    """

    name: str
    statement: str
    kind: Kind
    measured: float | None
    bound: float | None
    holds: bool | None
    seconds: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "statement"):
            if not getattr(self, field):
                raise ValueError(f"a limit must have a {field}, got an empty one")
        if self.kind not in get_args(Kind):
            expected = ", ".join(get_args(Kind))
            raise ValueError(
                f"limit {self.name!r}: kind must be one of {expected}, got {self.kind!r}"
            )
        if self.kind == "description" and self.holds is not None:
            raise ValueError(
                f"limit {self.name!r}: a description has no verdict, so holds must be None, "
                f"got {self.holds}"
            )
        for field in ("measured", "bound", "seconds"):
            object.__setattr__(self, field, self._number(field))
        # NumPy's booleans are neither JSON nor `is True`.
        object.__setattr__(self, "holds", None if self.holds is None else bool(self.holds))

    def _number(self, field: str) -> float | None:
        value = getattr(self, field)
        if value is None and field != "seconds":
            return None
        number = float(value)
        if not math.isfinite(number) or (field == "seconds" and number < 0):
            raise ValueError(f"limit {self.name!r}: {field} must be finite, got {value}")
        return number

    @property
    def verdict(self) -> str:
        """One word: holds, violated, survives, collapsed, undecided, or "-" for a description."""
        if self.kind == "description":
            return "-"
        if self.holds is None:
            return "undecided"
        return _VERDICTS[self.holds][self.kind == "survival"]

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values: the attributes and the verdict."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}


@dataclasses.dataclass(frozen=True)
class Suite:
    """The checks of one run, in the order in which they ran; print it for a table.

    Attributes:
      rows: the checks.
    Raises:
      ValueError: two checks have the same name.

    >>> print(Suite((Limit("floor", "A share is wrong.", "theorem", 0.3, 0.25, True),)))
    limit  kind     measured  bound  verdict  seconds
    floor  theorem       0.3   0.25  holds        0.0
    floor: A share is wrong.
    """

    rows: tuple[Limit, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the names of checks must differ, but these occur twice: {twice}")

    def row(self, name: str) -> Limit:
        """Return the check of that name.

        Args:
          name: name of a row.
        Raises:
          ValueError: there is no such row.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no check is called {name!r}; there are {[r.name for r in self.rows]}")

    def to_json(self) -> list[dict[str, Any]]:
        """Return one dict of JSON values for each row."""
        return [row.to_json() for row in self.rows]

    def __str__(self) -> str:
        cells = [HEADER, *(_cells(row) for row in self.rows)]
        lines = aligned(cells, left=(True, True, False, False, True, False))
        texts = (f"{row.name}: {row.statement} {row.note}".rstrip() for row in self.rows)
        return "\n".join([*lines, *texts])


def _cells(row: Limit) -> tuple[str, ...]:
    number = lambda x: "-" if x is None else f"{x:.4g}"
    numbers = number(row.measured), number(row.bound)
    return (row.name, cast(str, row.kind), *numbers, row.verdict, f"{row.seconds:.1f}")
