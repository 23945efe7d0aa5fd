"""Where the energy of a token goes."""

import re

from jaxquant_models.report.figure import SERIES, Canvas, Drawing, axis_labels
from jaxquant_models.report.numbers import number, quantity
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, sources, table
from jaxquant_models.schemas.report import Energy, Report

CAPTION = (
    "This model as it is, and with other widths of the matrices of its layers; embeddings and the "
    "cache stay as they are."
)
PARTS = (
    Column("part", "", lambda row: row[0], str),
    Column("energy / token", "", lambda row: row[1], lambda v: quantity(v, "J")),
    Column("share", "", lambda row: row[2], lambda v: f"{number(100 * v)} %"),
)
CONSTANTS = (
    Column("constant", "", lambda row: row[0], str),
    Column("value", "", lambda row: row[1]),
)


def section(report: Report) -> Section | None:
    """Return the section, or None if no energy was computed."""
    found = report.energy
    if found is None:
        return None
    parts = {"moving weights": found.weights, "moving the cache": found.cache,
             "arithmetic": found.arithmetic}  # fmt: skip
    total = sum(parts.values())
    rows: list[tuple[str, float, float | None]] = [
        (name, joules, joules / total if total > 0 else None) for name, joules in parts.items()
    ]
    rows.append(("together", total, None))
    moved = found.weights + found.cache
    lead: tuple[str, ...] = (
        f"One decoded token under the constants of {found.node}, at {report.context:,} tokens of "
        f"context: {quantity(total, 'J')}.",
    )
    if found.landauer > 0:
        lead += (
            "Erasing as many bits as are moved costs at least "
            f"{quantity(found.landauer, 'J')} at 300 K (Landauer): moving them costs "
            f"{number(moved / found.landauer, 2)} times as much.",
        )
    tables = [table("Energy of one token", PARTS, rows)]
    if found.constants:
        constants = [(constant(n), v) for n, v in found.constants.items()]
        tables.append(table("The constants", CONSTANTS, constants))
    if found.sources:
        pairs = [(constant(n).split(",")[0], source) for n, source in found.sources.items()]
        tables.append(sources("Where the constants come from", pairs))
    drawings = (plot(found),) if found.by_bits else ()
    return Section("energy", "Energy of a token", lead, drawings, tuple(tables))


def constant(name: str) -> str:
    """Return the name of a constant in words, its unit last.

    >>> constant("int8_add_pj"), constant("memory_pj_per_bit")
    ('int8 add, pJ', 'memory, pJ per bit')
    """
    return re.sub(r" pj( per bit)?$", r", pJ\1", name.replace("_", " "))


def plot(found: Energy) -> Drawing:
    """Draw stacked bars of movement and arithmetic at several widths."""
    own = ("as it is", found.weights + found.cache, found.arithmetic)
    rows = [*((number(b), m, a) for b, m, a in sorted(found.by_bits)), own]
    scale, unit = unit_of(max(m + a for _, m, a in rows))
    canvas = Canvas("energy-plot", "Energy of a token by bits per weight", 370, 80 + 26 * len(rows))
    with canvas as axis:
        at = range(len(rows))
        movement, work = [m / scale for _, m, _ in rows], [a / scale for *_, a in rows]
        axis.barh(at, movement, 0.7, color=SERIES[0], label="moving data")
        axis.barh(at, work, 0.7, movement, color=SERIES[1], label="arithmetic")
        for i, (_, m, a) in enumerate(rows):
            axis.annotate(quantity(m + a, "J"), ((m + a) / scale, i), (4, 0), va="center",
                          textcoords="offset points", fontsize=9)  # fmt: skip
        axis.set_yticks(at, [name for name, *_ in rows])
        axis.margins(x=0.16)
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_formatter(lambda v, _: number(v))
        axis_labels(axis, f"{unit} per token", "bits per weight")
        axis.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    about = "; ".join(
        f"{name}{' bits' if name != own[0] else ''}: {quantity(m, 'J')} of movement, "
        f"{quantity(a, 'J')} of arithmetic"
        for name, m, a in rows
    )
    return canvas.drawing(about, CAPTION)


def unit_of(largest: float) -> tuple[float, str]:
    """Return the unit for an axis that ends at `largest` joules, and its name.

    >>> unit_of(0.003)
    (0.001, 'mJ')
    """
    for scale, unit in ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")):
        if largest >= scale:
            return scale, unit
    return 1.0, "J"
