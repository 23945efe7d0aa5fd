"""The memory wall: rooflines of the chips, with this model's decoding and prompt on each."""

import math
import re
from collections.abc import Sequence

from jaxquant_models.report.figure import MUTED, SERIES, Canvas, Drawing, axis_labels, label
from jaxquant_models.report.figure import log_ticks as ticks
from jaxquant_models.report.numbers import number, quantity
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, sources, table
from jaxquant_models.schemas.report import ChipRow, Report

FAMILIES = (
    ("TPUs", r"(?i)^(tpu|v\d)"),
    ("NVIDIA GPUs", r"(?i)^(nvidia )?(a|h|b|gb|l|rtx)\s?\d{2,}"),
    *((f"Apple M{n}", rf"(?i)^(apple )?m{n}\b") for n in range(1, 5)),
    ("Laptops", r"(?i)^laptop"),
    ("Others", ""),
)
NARROW = 16  # characters of a name, of which two fit side by side below a figure
STYLES = ("-", "--", "-.", ":")


def rate(value: float) -> str:
    """Return a rate with three significant digits, written out where a reader can compare it.

    >>> rate(7_943_601.2), rate(123.4), rate(2e12)
    ('7,940,000', '123', '2×10¹²')
    """
    return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= value < 1e9 else number(value)


COLUMNS = (
    Column("chip", "", lambda c: c.chip, str),
    Column("fits", "Whether weights and the cache of one sequence fit in its memory.",
           lambda c: "yes" if c.fits else "no", lambda v: "✓ yes" if v == "yes" else "✗ no", None,
           lambda c: "good" if c.fits else "bad"),
    Column("decode, tokens/s", "Most tokens per second for one user; an upper bound.",
           lambda c: c.decode, rate),
    Column("prompt, tokens/s", "Most tokens per second while a prompt is read.",
           lambda c: c.prefill, rate),
    Column("wall", "What bounds decoding: the memory's bandwidth or arithmetic.",
           lambda c: c.wall, str),
    Column("critical batch", "Users at a time from which arithmetic is the bound; a dash where it "
           "never is.", lambda c: c.critical_batch),
    Column("operations / byte", "Operations per byte moved, of decoding for one user.",
           lambda c: c.intensity),
    Column("ridge", "Operations per byte at which the chip's two bounds meet.", lambda c: c.ridge),
    Column("energy / token", "Energy of a token for one user; a dash where no constant is known.",
           lambda c: c.joules, lambda v: quantity(v, "J")),
)  # fmt: skip
SOURCES = "Where the figures of the chips come from, and when that was read"


def section(report: Report) -> Section | None:
    """Return the section, or None if no chip was computed."""
    chips = report.roofline
    if not chips:
        return None
    lead: tuple[str, ...] = (
        "A chip computes no faster than its memory feeds it (the slope) and than its arithmetic "
        "allows (the flat roof). Decoding for one user reads every weight for each token, so it "
        f"sits on the slope. All figures are upper bounds at {report.context:,} tokens of context, "
        "for the units that the sources name.",
    )
    if all(c.critical_batch is None for c in chips):
        lead += (
            "More users at a time do not change that here: the cache of each takes longer to read "
            "than its token takes to compute.",
        )
    groups: dict[str, list[ChipRow]] = {}
    for c in chips:
        family = next(name for name, pattern in FAMILIES if re.search(pattern, c.chip))
        groups.setdefault(family, []).append(c)
    drawn = [(family, part) for family, members in groups.items() for part in parts(members)]
    shown = [c for _, members in drawn for c in members]
    if drawn:
        squares = any(c.prefill_intensity for c in shown)
        prompt = ", squares are reading a prompt" if squares else ""
        lead += (f"In the figures, circles are decoding for one user{prompt}.",)
    drawings = tuple(
        plot(family, members, f"roofline-{i}", limits(shown))
        for i, (family, members) in enumerate(drawn)
    )
    rows = sorted(chips, key=lambda c: -c.decode)
    caption = "Bounds of this model on every chip, fastest decoding first"
    origins = sources(SOURCES, [(c.chip, c.source) for c in chips])
    tables = table(caption, COLUMNS, rows), origins
    return Section("roofline", "The memory wall", lead, drawings, tables)


def parts(members: Sequence[ChipRow]) -> list[list[ChipRow]]:
    """Return the chips that can be drawn, shared evenly among as few figures as possible."""
    chips = [c for c in members if c.bandwidth and min(c.bandwidth, c.ridge) > 0]
    count = math.ceil(len(chips) / len(STYLES))
    size = math.ceil(len(chips) / count) if count else 1
    return [chips[i : i + size] for i in range(0, len(chips), size)]


def limits(chips: Sequence[ChipRow]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits of both axes, the same for all figures, so that they can be compared."""
    x = [v for c in chips for v in (c.intensity, c.ridge, c.prefill_intensity or 0) if v > 0]
    y = [roof(c, v) for c in chips for v in (c.intensity, c.ridge) if v > 0]
    return (min(x) / 3, max(x) * 4), (min(y) / 4, max(y) * 3)


def roof(chip: ChipRow, intensity: float) -> float:
    """Return the operations per second of a chip at an intensity, in operations per byte."""
    return (chip.bandwidth or 0) * min(intensity, chip.ridge)


def plot(
    family: str,
    chips: Sequence[ChipRow],
    name: str,
    view: tuple[tuple[float, float], tuple[float, float]],
) -> Drawing:
    """Draw the roofs of a family, with a circle for decoding and a square for the prompt."""
    canvas = Canvas(name, f"Roofline: {family}", 285, 265)
    (low, high), _ = view
    with canvas as axis:
        for i, c in enumerate(chips):
            x = [low, min(max(c.ridge, low), high), high]
            axis.plot(x, [roof(c, v) for v in x], STYLES[i], color=SERIES[i], lw=1.6,
                      label=label(c.chip))  # fmt: skip
            for intensity, marker in ((c.intensity, "o"), (c.prefill_intensity, "s")):
                if intensity and intensity > 0:
                    axis.plot([intensity], [roof(c, intensity)], marker, ms=6, color=SERIES[i])
        axis.set(xscale="log", yscale="log", xlim=view[0], ylim=view[1])
        ticks(axis.xaxis)
        ticks(axis.yaxis, lambda v: quantity(v, "").strip())
        axis.tick_params(colors=MUTED)
        axis_labels(axis, "operations per byte", "operations per second")
        narrow = all(len(c.chip) <= NARROW for c in chips)
        axis.figure.legend(loc="outside lower center", ncols=2 if narrow else 1, frameon=False,
                           fontsize=9)  # fmt: skip
    about = "; ".join(f"{label(c.chip)}: at most {number(c.decode)} tokens/s of decoding, "
                      f"{number(c.prefill)} of a prompt" for c in chips)  # fmt: skip
    return canvas.drawing(about, f"{family}.")
