"""The table of tensors, worst first, and a map of the worst layers."""

import math
import re
from collections.abc import Sequence

from jaxquant_models.report.figure import INK, SERIES, Canvas, Drawing, axis_labels, label
from jaxquant_models.report.numbers import number, quantity
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, table
from jaxquant_models.schemas.report import Report, TensorRow

MOST = (12, 100)  # kinds and layers of a map

COLUMNS = (
    Column("tensor", "", lambda t: t.path, str, lambda t: " × ".join(map(str, t.shape))),
    Column("stored as", "Method or type in the files, and the form in memory.",
           lambda t: t.method, str, lambda t: t.format),
    Column("size", "Bytes in memory; a GGUF file is decoded to floats there.",
           lambda t: t.bytes, lambda v: quantity(v, "B")),
    Column("stored bits", "Bits per weight as stored, with scales and codebooks.",
           lambda t: t.stored),
    Column("entropy", "Entropy of the codes, or of the floats, in bits per weight.",
           lambda t: t.entropy),
    Column("lossless ideal", "Bits per weight of an ideal lossless code of what is stored.",
           lambda t: t.ideal),
    Column("exponent entropy", "Bits of information in the exponents of the floats.",
           lambda t: t.exponent),
    Column("distortion", "Mean squared error over the variance of the reference's weight.",
           lambda t: t.distortion),
    Column("output distortion", "The same, weighted by how large the inputs are: what the layer's "
           "output loses.", lambda t: t.output_distortion),
    Column("R(D)", "Fewest bits per weight at that distortion for Gaussian weights (Shannon).",
           lambda t: t.shannon),
    Column("gap, bits", "Stored bits minus R(D): what a better code could save.", lambda t: t.gap),
    Column("gap, dB", "The same in decibels; 6.02 dB are one bit.", lambda t: t.gap_decibels),
    Column("temperature", "By how many nats the loss falls for each million bits that are added "
           "here: the largest deserve bits first.", lambda t: t.temperature),
    Column("largest / rms", "The largest weight over the root mean square.", lambda t: t.largest),
    Column("kurtosis", "Excess kurtosis of the weights: 0 for a Gaussian, more with heavy tails.",
           lambda t: t.kurtosis),
    Column("outliers", "Kinds of outliers among the layer's inputs.",
           lambda t: ", ".join(t.outliers), str),
)  # fmt: skip

# The first that any tensor has is what "worst" means.
WORST = (
    ("output_distortion", "output distortion"),
    ("distortion", "distortion"),
    ("ideal", "bits that a lossless code would save"),
)


def badness(tensors: Sequence[TensorRow]) -> tuple[str, list[float]]:
    """Return what "worst" means here, and it for each tensor; -inf where it is unknown."""
    for name, words in WORST:
        values = [getattr(t, name) for t in tensors]
        if any(v is not None for v in values):
            bad = [-math.inf if v is None else v for v in values]
            if name == "ideal":
                bad = [t.stored - v if v > -math.inf else v
                       for t, v in zip(tensors, bad, strict=True)]  # fmt: skip
            return words, bad
    return "stored bits", [t.stored for t in tensors]


def section(report: Report) -> Section | None:
    """Return the section, or None if there are no tensors."""
    if not report.tensors:
        return None
    words, bad = badness(report.tensors)
    order = sorted(range(len(bad)), key=lambda i: (-bad[i], report.tensors[i].path))
    lead = (f"One row per matrix, or per stack of them; the worst first, by {words}.",)
    drawing = plot(report.tensors, words, bad)
    rows = [report.tensors[i] for i in order]
    return Section("tensors", "Tensor by tensor", lead, (drawing,) if drawing else (),
                   (table(f"The tensors, by {words}", COLUMNS, rows),), wide=True)  # fmt: skip


def plot(tensors: Sequence[TensorRow], words: str, bad: Sequence[float]) -> Drawing | None:
    """Draw a map of kinds and layers; None unless most tensors are of a layer with a number."""
    cells: dict[tuple[str, int], float] = {}
    for t, value in zip(tensors, bad, strict=True):
        layer = re.search(r"(?:^|\D)(\d{1,4})(?:\D|$)", t.path)
        if layer and math.isfinite(value):
            key = (t.kind, int(layer[1]))
            cells[key] = max(value, cells.get(key, -math.inf))
    kinds = sorted({k for k, _ in cells})[: MOST[0]]
    layers = sorted({i for _, i in cells})[: MOST[1]]
    if len(kinds) < 2 or len(layers) < 2 or 2 * len(cells) < len(tensors):
        return None
    known = sorted(v for (k, i), v in cells.items() if k in kinds and i in layers)
    low, high = known[0], known[-1]
    scale, steps = (math.log, "ratios") if low > 0 else (float, "steps")
    canvas = Canvas("tensor-map", f"{words} by layer", 370, 70 + 19 * len(kinds))
    with canvas as axis:
        drawn = {(k, i): v for (k, i), v in cells.items() if k in kinds and i in layers}
        span = max(scale(high) - scale(low), 1e-12)
        axis.bar([layers.index(i) - 0.5 for _, i in drawn], 1, 1,
                 [kinds.index(k) - 0.5 for k, _ in drawn], align="edge", lw=0,
                 color=[(SERIES[1], 0.06 + 0.94 * (scale(v) - scale(low)) / span)
                        for v in drawn.values()])  # fmt: skip
        step = max(1, len(layers) // 8)
        axis.set_xticks(range(0, len(layers), step), layers[::step])
        axis.set_yticks(range(len(kinds)), [label(k) for k in kinds], color=INK)
        axis.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(kinds) - 0.5, -0.5))
        axis.grid(visible=False)
        axis_labels(axis, "layer")
    worst = max(cells, key=lambda key: cells[key])
    about = f"A map of {len(kinds)} kinds of tensors and {len(layers)} layers. "
    about += f"The worst is {label(worst[0])} of layer {worst[1]}: {number(cells[worst])}."
    caption = f"The stronger the colour, the larger the {words}: from {number(low)} to "
    return canvas.drawing(about, f"{caption}{number(high)}, in equal {steps}.")
