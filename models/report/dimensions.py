"""Intrinsic dimension of the hidden states, layer by layer."""

from jaxquant_models.report.figure import SERIES, Canvas, Drawing, axis_labels, label
from jaxquant_models.report.numbers import number
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, table
from jaxquant_models.schemas.report import Dimensions, Report

MARKS = "os^D"


def section(report: Report) -> Section | None:
    """Return the section, or None if no layer was measured."""
    found = report.dimensions
    if found is None or not found.layers or not found.estimators:
        return None
    lead = (
        "How many directions the hidden states really vary in, after every layer, estimated from "
        f"{found.points:,} vectors."
        + (" Where the model leaves the reference, a layer has lost or added structure."
           if found.reference else
           " Estimators differ in level; compare layers by one of them."),
    )  # fmt: skip
    columns = [Column("after layer", "", lambda row: row[0])]
    for i, name in enumerate(found.estimators):
        columns.append(Column(name, "", lambda row, i=i: _at(row[1], i)))
        columns.append(
            Column(f"{name}, reference", "", lambda row, i=i: _at(row[2], i) if row[2] else None)
        )
    others = found.reference or []
    rows = [
        (i, layer, others[i] if i < len(others) else None) for i, layer in enumerate(found.layers)
    ]
    shown = table("Intrinsic dimension after every layer", columns, rows)
    return Section("dimension", "Dimension by layer", lead, (plot(found),), (shown,))


def _at(values: list[float], i: int) -> float | None:
    return values[i] if i < len(values) else None


def plot(found: Dimensions) -> Drawing:
    """Draw one line for each estimator, dashed for the reference."""
    canvas = Canvas("dimension-plot", "Intrinsic dimension by layer", 370, 270)
    sides = [("this model", found.layers, "-")]
    if found.reference:
        sides.append(("reference", found.reference, "--"))
    ends = []
    with canvas as axis:
        for i, estimator in enumerate(found.estimators[: len(SERIES)]):
            for side, layers, style in sides:
                points = [(x, _at(v, i)) for x, v in enumerate(layers) if _at(v, i) is not None]
                if not points:
                    continue
                who = f", {side}" if found.reference else ""
                axis.plot(*zip(*points, strict=True), style, color=SERIES[i], lw=1.6, ms=4,
                          marker=MARKS[i] if style == "-" else None,
                          label=label(estimator) if style == "-" else None)  # fmt: skip
                y = [v for _, v in points if v is not None]
                ends.append(f"{label(estimator)}{who}: from {number(y[0])} to {number(y[-1])}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis_labels(axis, "after layer", "intrinsic dimension")
        if ends:
            axis.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    caption = (
        "Solid: this model; dashed: the reference."
        if found.reference
        else "One line for each estimator."
    )
    return canvas.drawing("; ".join(ends) or "No estimate.", caption)
