"""Histograms of the exponents of the weights, one small figure for each kind."""

from jaxquant_models.report.figure import SERIES, Canvas, Drawing, axis_labels, label
from jaxquant_models.report.numbers import number, whole
from jaxquant_models.report.section import Section
from jaxquant_models.schemas.report import Histogram, Report

MOST = 9  # figures
WIDEST = 64  # exponents of a figure


def section(report: Report) -> Section | None:
    """Return the section, or None if no weight was counted."""
    counted = [h for h in report.histograms if sum(h.counts) > 0]
    if not counted:
        return None
    lead: tuple[str, ...] = (
        "The exponent of a float takes 5 bits (float16) or 8 bits (bfloat16, float32), but few "
        "values are in use: the difference to the entropy is what a lossless code saves.",
    )
    if len(counted) > MOST:
        lead += (f"The first {MOST} of {len(counted)} kinds are shown.",)
    drawings = tuple(plot(h, f"exponents-{i}") for i, h in enumerate(counted[:MOST]))
    return Section("exponents", "Exponents of the weights", lead, drawings)


def plot(found: Histogram, name: str) -> Drawing:
    """Draw the share of each exponent; rare ones at the lower end are not drawn."""
    total = sum(found.counts)
    used = [i for i, n in enumerate(found.counts) if n > 0]
    first, last = max(used[0], used[-1] - WIDEST + 1), used[-1]
    counts = found.counts[first : last + 1]
    canvas = Canvas(name, f"Exponents of {label(found.kind)}", 285, 165)
    with canvas as axis:
        axis.bar(range(len(counts)), [100 * (n / total) for n in counts], 0.8, color=SERIES[0])
        step = max(1, len(counts) // 6)
        places = range(0, len(counts), step)
        axis.set_xticks(places, [number(found.first + first + i) for i in places])
        axis.grid(visible=False, axis="x")
        axis_labels(axis, "exponent of 2", "share of the weights, %")
    common = found.first + max(used, key=lambda i: found.counts[i])
    about = f"{whole(total)} weights; the most common exponent is {number(common)}."
    return canvas.drawing(about, f"{label(found.kind)}: {number(found.entropy)} bits of entropy.")
