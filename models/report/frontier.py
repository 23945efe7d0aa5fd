"""The rate-quality frontier: KL divergence against bytes of all variants that were run."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jaxquant_models.report.figure import INK, MUTED, SERIES, Canvas, Drawing, axis_labels, label
from jaxquant_models.report.figure import log_ticks as ticks
from jaxquant_models.report.numbers import number, quantity
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, table
from jaxquant_models.schemas.report import Frontier, Point, Report

KL = (1e-6, 1e12)  # nats; a KL beyond them is drawn there
BYTES = (1.0, 1e18)  # the same of bytes
MOST = 14  # points that are labelled; of more, those on the frontier
WRONG = 150.0  # square points that a label may cover rather than stand nearer to another point
LEADER, CROSSED = 10.0, 60.0  # the same rather than at the end of a line; than cross something
# Where a label may stand: offset from its point in points, and alignment.
PLACES = [(6, 4, "left"), (6, -11, "left"), (-6, 4, "right"), (-6, -11, "right"),
          (14, 18, "left"), (-14, 18, "right"), (-14, -24, "right"), (14, -24, "left"),
          (26, -12, "left"), (-26, -12, "right"), (10, 34, "left"), (-10, 34, "right"),
          (40, 12, "left"), (-20, -44, "right"),
          ]  # fmt: skip
NEAR = 4  # the first places; from the others, a thin line leads to the point

COLUMNS = (
    Column("variant", "", lambda p: p.name, str,
           lambda p: "" if p.command else "this model, as it is"),
    Column("bits per weight", "Bits per quantized weight, with scales and codebooks.",
           lambda p: p.bits_per_weight),
    Column("size", "Bytes of all parameters in memory.",
           lambda p: p.bytes, lambda v: quantity(v, "B")),
    Column("KL", "Mean Kullback-Leibler divergence from the reference, in nats per token: 0 means "
           "the same predictions, 0.01 is hardly noticed, 1 is another model.", lambda p: p.kl),
    Column("same token", "How often the most likely token is that of the reference.",
           lambda p: p.top1, lambda v: f"{number(100 * v)} %"),
    Column("perplexity", "Perplexity on the text.", lambda p: p.perplexity),
    Column("frontier", "Whether no other variant is both smaller and closer to the reference.",
           lambda p: "on it" if p.on_frontier else "behind", str, None,
           lambda p: "good" if p.on_frontier else ""),
    Column("command", "The command line that makes it.", lambda p: p.command, str, code=True),
)  # fmt: skip


def section(report: Report) -> Section | None:
    """Return the section, or None if no variant was run."""
    found = report.frontier
    if found is None or not found.points:
        return None
    lead = (
        "Lower left is better: fewer bytes, and predictions closer to those of the reference, "
        f"{found.reference} (perplexity {number(found.perplexity)}), on {found.tokens:,} tokens. "
        "No variant beats those on the line in both.",
    )
    points = sorted(found.points, key=lambda p: (p.bytes, p.kl))
    return Section("frontier", "Size against quality", lead, (plot(found),),
                   (table("The variants that were run, by size", COLUMNS, points),))  # fmt: skip


def plot(found: Frontier) -> Drawing:
    """Draw KL divergence against bytes; only labels, not points, are left out for lack of room."""
    points = sorted(found.points, key=lambda p: (p.bytes, p.kl))
    canvas = Canvas("frontier-plot", "KL divergence against size", 370, 300)
    with canvas as axis:
        line = [p for p in points if p.on_frontier]
        if line:
            axis.plot(*zip(*map(spot, line), strict=True), color=SERIES[0], lw=1.5)
        for p in points:
            own = not p.command
            style = (
                {"marker": "*", "ms": 13, "color": SERIES[1]}
                if own
                else {"marker": "o", "ms": 5.5, "color": SERIES[0] if p.on_frontier else MUTED}
            )
            hollow = {} if own or p.on_frontier else {"mfc": "none"}
            axis.plot(*([v] for v in spot(p)), ls="", **style, **hollow)
        axis.set_yscale("log")
        axis.margins(x=0.14, y=0.14)
        if points[-1].bytes > 4 * max(points[0].bytes, 1):
            axis.set_xscale("log")
            ticks(axis.xaxis, lambda v: quantity(v, "B"))
        else:
            axis.locator_params(axis="x", nbins=5)
            axis.xaxis.set_major_formatter(lambda v, _: quantity(v, "B"))
        ticks(axis.yaxis)
        axis_labels(axis, "bytes of all parameters", "KL from the reference, nats per token")
        few = len(points) <= MOST
        place_labels(axis, [p for p in points if few or p.on_frontier or not p.command], points)
    about = "; ".join(
        f"{label(p.name)}: {quantity(p.bytes, 'B')}, KL {number(p.kl)}" for p in points[:40]
    )
    caption = "Filled points are on the frontier, hollow ones behind it."
    if any(not p.command for p in points):
        caption += " The star is this model."
    return canvas.drawing(about, caption)


def spot(p: Point) -> tuple[float, float]:
    """Return where a point is drawn."""
    return min(max(p.bytes, BYTES[0]), BYTES[1]), min(max(p.kl, KL[0]), KL[1])


def place_labels(axis: Any, named: Sequence[Point], points: Sequence[Point]) -> None:
    """Write the names where they cover the fewest points and labels, the first place preferred."""
    figure = axis.figure
    figure.draw_without_rendering()  # fixes the axes, in whose units the places are
    draw = figure._get_renderer()
    spots = axis.transData.transform([spot(p) for p in points])
    taken: list[Any] = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    taken += line_boxes(axis, [p for p in points if p.on_frontier])
    area = axis.get_window_extent(draw)
    for p in sorted(named, key=lambda p: (bool(p.command), not p.on_frontier)):
        own = axis.transData.transform(spot(p))
        text = axis.annotate(label(p.name), spot(p), (0, 0), fontsize=9, color=INK,
                             textcoords="offset points", in_layout=False)  # fmt: skip
        if not p.command:
            text.set_fontweight("bold")
        costs = {}
        for rank, place in enumerate(PLACES):
            cost = _cost(text, place, taken, area, draw)
            if rank >= NEAR:
                cost += LEADER + CROSSED * _crossed(own, place, taken, draw)
            elif _nearer(text, own, spots, draw):
                cost += WRONG
            costs[place] = (cost, rank)
        best = min(costs, key=costs.__getitem__)
        _move(text, best)
        if PLACES.index(best) >= NEAR:
            axis.annotate("", spot(p), best[:2], textcoords="offset points", in_layout=False,
                          arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.7,
                                      "shrinkA": 0, "shrinkB": 4})  # fmt: skip
        taken.append(text.get_window_extent(draw).extents)


def line_boxes(axis: Any, line: Sequence[Point]) -> list[tuple[float, ...]]:
    """Small boxes along the frontier's line, so that labels keep off it."""
    if len(line) < 2:
        return []
    corners = axis.transData.transform([spot(p) for p in line])
    steps = [(a + (b - a) * i / 24) for a, b in pairwise(corners) for i in range(25)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in steps]


def _move(text: Any, place: tuple[int, int, str]) -> None:
    text.set_position(place[:2])
    text.set_ha(place[2])


def _crossed(own: Any, place: tuple[int, int, str], taken: Sequence[Any], draw: Any) -> int:
    """How many points, labels and pieces of the frontier a line to the place would cross."""
    unit = draw.points_to_pixels(1)
    path = [(own[0] + unit * place[0] * i / 12, own[1] + unit * place[1] * i / 12)
            for i in range(3, 12)]  # fmt: skip
    others = [b for b in taken if not (b[0] <= own[0] <= b[2] and b[1] <= own[1] <= b[3])]
    return sum(any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for x, y in path) for b in others)


def _nearer(text: Any, own: Any, spots: Any, draw: Any) -> bool:
    """Whether another point is nearer to the text than its own, which a reader would mistake."""
    x0, y0, x1, y1 = text.get_window_extent(draw).extents

    def away(at: Any) -> float:
        return math.hypot(max(x0 - at[0], 0, at[0] - x1), max(y0 - at[1], 0, at[1] - y1))

    return min(map(away, spots)) < away(own) - 1e-6


def _cost(text: Any, place: Any, taken: Sequence[Any], area: Any, draw: Any) -> float:
    """Area covered, or outside of the axes, at a place where the text then stands."""
    _move(text, place)
    x0, y0, x1, y1 = text.get_window_extent(draw).extents
    overlap = sum(
        max(min(x1, b[2]) - max(x0, b[0]), 0) * max(min(y1, b[3]) - max(y0, b[1]), 0) for b in taken
    )
    inside = max(min(x1, area.x1) - max(x0, area.x0), 0) * max(
        min(y1, area.y1) - max(y0, area.y0), 0
    )
    return float(overlap + (x1 - x0) * (y1 - y0) - inside)
