"""The page: everything in one file, complete without a network and without a script."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from jaxquant_models.report import (
    dimensions,
    energy,
    exponents,
    frontier,
    heading,
    limits,
    roofline,
    tensors,
)
from jaxquant_models.report.figure import check, clean
from jaxquant_models.report.numbers import number, quantity
from jaxquant_models.schemas.report import Report

__all__ = ["check", "render"]

# In the order of the page; what is said in the notes where there is nothing to show.
SECTIONS = (
    (frontier, "no quantized variants were run, so there is no frontier"),
    (tensors, "no tensor was measured"),
    (exponents, "exponents were not counted"),
    (dimensions, "the dimension of hidden states was not measured"),
    (limits, "limits were not checked"),
    (roofline, "no chip was computed"),
    (energy, "the energy of a token was not computed"),
)


def render(report: Report) -> str:
    """Return the report as one self-contained HTML file.

    The same report gives the same text. Nothing is loaded from elsewhere; a small script sorts
    tables, and the page is complete without it.

    Args:
      report: the report.
    Returns:
      The text of the file, to be written as UTF-8.
    Raises:
      ValueError: matplotlib, which draws the figures, is not installed.
    """
    check()
    built = [(part.section(report), missing) for part, missing in SECTIONS]
    notes = [*report.notes, *(f"Left out: {missing}." for section, missing in built if not section)]
    return _template().render(
        report=report,
        summary=heading.summary(report),
        architecture=heading.architecture(report),
        made=heading.made(report),
        sections=[section for section, _ in built if section],
        notes=notes,
    )


def _shown(value: Any) -> Any:
    """What a template writes: control characters in texts are replaced, markup is kept."""
    return clean(value) if type(value) is str else value


def breakable(text: str) -> Markup:
    """Return the text for HTML, with places after slashes where a line may end.

    >>> breakable("a/<b>")
    Markup('a/<wbr>&lt;b&gt;')
    """
    return escape(clean(text)).replace("/", Markup("/<wbr>"))


@cache
def _template() -> jinja2.Template:
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, file in (("style", "page.css"), ("script", "page.js")):
        environment.globals[name] = Markup((folder / file).read_text("utf-8"))
    filters: dict[str, Any] = {
        "number": number,
        "bytes": lambda value: quantity(value, "B"),
        "breakable": breakable,
    }
    environment.filters |= filters
    return environment.get_template("page.html")
