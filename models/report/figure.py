"""Figures as inline SVG: drawn by matplotlib, coloured by the style sheet of the page.

Text stays text, in the font of the page. Colours are placeholders that become CSS variables, so
that a figure follows the page into the dark. Identifiers get a prefix: they are unique on a page.
"""

import dataclasses
import importlib
import importlib.util
import io
import re
import warnings
from typing import Any

from markupsafe import Markup

from jaxquant_models.report.numbers import number

# Placeholder colours, and the variables of page.css that replace them.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#010a01", "#010a02", "#010a03", "#010a04")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper"}
_VARIABLES |= {colour: f"series-{i + 1}" for i, colour in enumerate(SERIES)}
_LONGEST = 28  # characters of a label in a figure; longer ones are cut, tables have them whole
_LOOK = {
    "svg.fonttype": "none", "svg.hashsalt": "jaxquant", "font.size": 10, "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.facecolor": "none",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none",
    "axes.unicode_minus": False, "axes.formatter.use_mathtext": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
      svg: the `svg` element, with a title and a description for those who cannot see it.
      caption: the sentence below it.
    """

    svg: Markup
    caption: str


def check() -> None:
    """Raise ValueError if matplotlib, which draws the figures, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report needs matplotlib; run: pip install 'jaxquant[report]'")


def clean(text: str) -> str:
    """Return the text with its control characters and changes of direction made visible.

    >>> clean("a\\x00b\\u202ec")
    'a\ufffdb\ufffdc'
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text)


def label(text: str) -> str:
    """Return the text, cut to the length of a label in a figure.

    >>> label("a" * 40)
    'aaaaaaaaaaaaaaaaaaaaaaaaaaa…'
    """
    text = clean(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


class Canvas:
    """A figure being drawn: `with Canvas(...) as axis`, and then `drawing`.

    Args:
      name: name of the figure, unique on the page: letters, digits and hyphens.
      title: title, one short line.
      width, height: size in units of the font's size over 10; the page scales the figure.
    """

    def __init__(self, name: str, title: str, width: float = 400, height: float = 270) -> None:
        self.name, self.title = name, title
        self.size = (width / 72, height / 72)

    def __enter__(self) -> Any:
        check()
        matplotlib: Any = importlib.import_module("matplotlib")  # optional, and slow to import
        figures: Any = importlib.import_module("matplotlib.figure")
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")  # of characters that matplotlib's own font lacks
        self._look = matplotlib.rc_context(_LOOK)
        self._look.__enter__()
        self.figure = figures.Figure(figsize=self.size, layout="constrained")
        return self.figure.subplots()

    def __exit__(self, *failed: object) -> None:
        try:
            if failed[0] is None:
                out = io.StringIO()
                # None of these leaves traces of the machine or the time.
                nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
                self.figure.savefig(out, format="svg", metadata=nothing)
                self._text = out.getvalue()
        finally:
            self._look.__exit__(None, None, None)
            self._warnings.__exit__(None, None, None)

    def drawing(self, description: str, caption: str) -> Drawing:
        """Return the figure for the page.

        Args:
          description: what the figure shows, for those who cannot see it.
          caption: the sentence below the figure.
        """
        inner = self._text[self._text.index("<svg") :]
        view = re.search(r'viewBox="[^"]*"', inner)[0]  # type: ignore[index]
        inner = re.sub(r"(?s)<metadata>.*?</metadata>", "", inner[inner.index(">") + 1 :])
        inner = inner[: inner.rindex("</svg>")].replace("xlink:href", "href")
        inner = re.sub(r"(<[^>]*?\bid=\")", rf"\1{self.name}-", inner)
        inner = re.sub(r"(url\(#|href=\"#)", rf"\1{self.name}-", inner)
        for colour, variable in _VARIABLES.items():
            inner = re.sub(rf'(style="[^"]*){colour}', rf"\1var(--{variable})", inner)
            inner = re.sub(rf'(style="[^"]*){colour}', rf"\1var(--{variable})", inner)
        inner = re.sub(r"(font: [^'\";]*?px) [^;\"]*", r"\1 var(--font)", inner)
        head = Markup(
            '<svg {view} role="img" aria-labelledby="{n}-title {n}-desc">'
            '<title id="{n}-title">{title}</title><desc id="{n}-desc">{about}</desc>'
        ).format(view=Markup(view), n=self.name, title=clean(self.title), about=clean(description))
        return Drawing(head + Markup(inner) + Markup("</svg>"), caption)


def axis_labels(axis: Any, x: str = "", y: str = "") -> None:
    """Label the axes; that of y stands above its axis, flat, where a phone has room for it."""
    axis.set_xlabel(x)
    axis.set_title(y, loc="left", fontsize=10, color=INK)


def log_ticks(axis: Any, format: Any = number) -> None:
    """Label the ticks of a logarithmic axis (of x or of y) by `format(value)`."""
    ticker: Any = importlib.import_module("matplotlib.ticker")
    low, high = sorted(axis.get_view_interval())
    decades = max(high / max(low, 1e-300), 1)
    steps = (1.0, 2.0, 5.0) if decades < 40 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(10, steps, numticks=7))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: format(value)))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())
