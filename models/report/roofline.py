"""The memory wall: rooflines of the chips, with this model's decoding and prompt on each."""

import re
from collections.abc import Sequence

from jaxquant_models.report.figure import MUTED, SERIES, Canvas, Drawing, axis_labels, label
from jaxquant_models.report.figure import log_ticks as ticks
from jaxquant_models.report.numbers import number, quantity
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, table
from jaxquant_models.schemas.report import ChipRow, Report

FAMILIES = (
    ("TPUs", r"(?i)^(tpu|v\d)"),
    ("NVIDIA GPUs", r"(?i)^(nvidia )?(a|h|b|gb|l|rtx)\s?\d{2,}"),
    ("Apple", r"(?i)^(apple )?m\d"),
    ("Others", ""),
)
STYLES = ("-", "--", "-.", ":")

COLUMNS = (
    Column("chip", "", lambda c: c.chip, str),
    Column("fits", "Whether weights and the cache of one sequence fit in its memory.",
           lambda c: "yes" if c.fits else "no", lambda v: "✓ yes" if v == "yes" else "✗ no", None,
           lambda c: "good" if c.fits else "bad"),
    Column("decode, tokens/s", "Most tokens per second for one user; an upper bound.",
           lambda c: c.decode),
    Column("prompt, tokens/s", "Most tokens per second while a prompt is read.",
           lambda c: c.prefill),
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
SOURCES = "Where the figures of the chips come from"
SOURCE = (
    Column("chips", "", lambda row: row[0], str),
    Column("source", "", lambda row: row[1], str),
)


def section(report: Report) -> Section | None:
    """Return the section, or None if no chip was computed."""
    chips = report.roofline
    if not chips:
        return None
    lead = (
        "A chip computes no faster than its memory feeds it (the slope) and than its arithmetic "
        "allows (the flat roof). Decoding for one user reads every weight for each token, so it "
        f"sits on the slope. All figures are upper bounds at {report.context:,} tokens of context.",
    )
    groups: dict[str, list[ChipRow]] = {}
    for c in chips:
        family = next(name for name, pattern in FAMILIES if re.search(pattern, c.chip))
        groups.setdefault(family, []).append(c)
    drawn = [
        (family, drawable[i : i + len(STYLES)])
        for family, members in groups.items()
        if (drawable := [c for c in members if c.bandwidth and min(c.bandwidth, c.ridge) > 0])
        for i in range(0, len(drawable), len(STYLES))
    ]
    shown = [c for _, members in drawn for c in members]
    drawings = tuple(
        plot(family, members, f"roofline-{i}", limits(shown))
        for i, (family, members) in enumerate(drawn)
    )
    rows = sorted(chips, key=lambda c: -c.decode)
    caption = "Bounds of this model on every chip, fastest decoding first"
    tables = table(caption, COLUMNS, rows), table(SOURCES, SOURCE, sources(chips))
    return Section("roofline", "The memory wall", lead, drawings, tables)


def sources(chips: Sequence[ChipRow]) -> list[tuple[str, str]]:
    """Return each source once, with the chips whose figures come from it."""
    groups: dict[str, list[str]] = {}
    for c in chips:
        groups.setdefault(c.source, []).append(c.chip)
    return [(", ".join(names), source) for source, names in groups.items()]


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
        axis.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    about = "; ".join(f"{label(c.chip)}: at most {number(c.decode)} tokens/s of decoding, "
                      f"{number(c.prefill)} of a prompt" for c in chips)  # fmt: skip
    prompt = ", squares: a prompt" if any(c.prefill_intensity for c in chips) else ""
    return canvas.drawing(about, f"{family}. Circles: decoding for one user{prompt}.")
