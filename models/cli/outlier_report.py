"""Displays outliers as a table, a heat map or a picture."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from jaxquant.theory.outliers import HEADER, Outliers, layer_name

SUFFIXES = (".png", ".svg", ".pdf")
DECADES = 5  # upper end of the color scale: a maximum of 10^5 medians
# viridis at 0, 1/5, ..., 1; colors in between are interpolated.
COLOURS = np.array(
    [(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)]
)


def table(found: Outliers) -> Table:
    """Return a table with a row for every site of every layer.

    Args:
      found: the outliers.
    """
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEADER:
        out.add_column(name, no_wrap=name not in ("site", "token", "kinds", HEADER[-1]))
    for row in found.rows():
        out.add_row(*map(Text, row))  # Text, because a token must not be read as markup
    return out


def heat_map(found: Outliers) -> Text:
    """Return a heat map of log10(max / median), with layers as rows and sites as columns.

    It is readable without colors too.

    Args:
      found: the outliers.
    """
    sites, layers, values = found.heat()
    width = max(len(layer_name(layer)) for layer in layers) + 2
    out = Text("log10(max / median), layers down: ")
    out.append_text(Text.assemble(*(_cell(float(v), 4) for v in range(DECADES + 1))))
    for i, site in enumerate(sites):
        out.append(f"\n{'':{width}}{'│ ' * i}┌ {site}")
    for layer, row in zip(layers, values, strict=True):
        out.append(f"\n{layer_name(layer):>{width}}")
        for value in row:
            out.append_text(Text.assemble(_cell(value, 5)))
    return out


def _cell(value: float, width: int) -> tuple[str, str]:
    if np.isnan(value):
        return " " * width, ""
    place = min(max(value / DECADES, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    red, green, blue = (COLOURS[low] + (place - low) * (COLOURS[low + 1] - COLOURS[low])).astype(
        int
    )
    ink = "black" if place > 2.5 else "white"
    return f"{value:^{width}.1f}", f"{ink} on rgb({red},{green},{blue})"


def check_plot(path: str | Path) -> None:
    """Raise ValueError if no picture can be written to path, before anything is computed.

    Args:
      path: the file, with a suffix in `SUFFIXES`.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot writes {', '.join(SUFFIXES)}, got {str(path)!r}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--plot: there is no folder {Path(path).parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; run: pip install 'jaxquant[report]'")


def plot(found: Outliers, path: str | Path) -> None:
    """Write the heat map as a picture; the file is written completely or not at all.

    Args:
      found: the outliers.
      path: the file.
    """
    check_plot(path)
    figures: Any = importlib.import_module("matplotlib.figure")  # optional, and slow to import
    sites, layers, values = found.heat()
    figure = figures.Figure(figsize=(2 + 0.9 * len(sites), 2 + 0.2 * len(layers)))
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto", vmin=0, vmax=DECADES, cmap="viridis")
    axis.set_xticks(range(len(sites)), sites, rotation=30, ha="right")
    axis.set_yticks(range(len(layers)), [layer_name(layer) for layer in layers], fontsize=6)
    axis.set(ylabel="layer")
    figure.colorbar(image, label="log10(max |x| / median |x|)")
    path = Path(path)
    aside = path.with_name(f"{path.name}.aside")
    try:
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=150, bbox_inches="tight")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
