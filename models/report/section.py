"""A section of the page, and what the template needs of it."""

import dataclasses

from jaxquant_models.report.figure import Drawing
from jaxquant_models.report.table import Table


@dataclasses.dataclass(frozen=True)
class Section:
    """A section: a heading, sentences, figures and tables, in this order.

    Attributes:
      name: the anchor, unique on the page: letters and hyphens.
      title: the heading.
      lead: sentences that say how to read what follows.
      drawings: the figures.
      tables: the tables.
      wide: whether a table needs a page in landscape when printed.
    """

    name: str
    title: str
    lead: tuple[str, ...]
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()
    wide: bool = False
