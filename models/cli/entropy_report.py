"""Displays the entropies of stored tensors as a table that fits a terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from jaxquant_models.runs.stored_entropy import StoredEntropy, TensorEntropy

ROWS = 30  # tensors that are shown
NAME, WEIGHTS, CELL = 22, 11, 6  # widths: the least of names, of weights, the least of numbers
# Header of each column, the field of `TensorEntropy`, and which columns are left out first where
# the terminal is narrow: those of the highest number.
COLUMNS = (
    ("stored", "stored", 0), ("sign", "sign", 5), ("H(E)", "exponent", 1),
    ("H(E|row)", "exponent_given_row", 3), ("mantissa", "mantissa", 5), ("value", "value", 2),
    ("ideal", "ideal", 0), ("planes", "planes", 0), ("Huffman", "huffman", 0), ("rANS", "rans", 0),
    ("alpha", "alpha", 3), ("E(alpha)", "exponent_of_alpha", 4),
)  # fmt: skip

LEGEND = (
    "Columns are bits per weight. H(E|row): entropy of exponents, one table per output.",
    "ideal: sign and mantissa as they are, and the entropy of the exponent; of quantized tensors,",
    "  the entropy of the codes, and scales as they are.",
    "planes, Huffman, rANS: what these codes take; of quantized tensors, scales stay as they are,",
    "  which jaxquant compress codes too.",
    "alpha: index of the alpha-stable distribution that fits best; E(alpha): the entropy of the",
    "  exponents of its samples.",
)


def table(found: StoredEntropy, width: int) -> Table:
    """Return a table of the tensors on which coding saves most, the dtypes and the whole model.

    Args:
      found: the entropies.
      width: number of characters of a line.
    """
    dtypes = found.dtypes()
    longest = max(map(len, dtypes))
    columns, left = _columns(width - WEIGHTS - longest - 4)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    out.add_column("tensor", no_wrap=True, overflow="ellipsis", max_width=left)
    out.add_column("dtype", no_wrap=True)
    out.add_column("weights", justify="right", no_wrap=True)
    for header, _ in columns:
        out.add_column(header, justify="right", no_wrap=True, min_width=CELL)
    largest = sorted(found.tensors, key=lambda t: -t.saved)
    for one in largest[:ROWS]:
        out.add_row(*_row(one, columns))
    out.add_section()
    for name in dtypes if len(dtypes) > 1 else []:
        out.add_row(*_row(found.total(name), columns))
    out.add_row(*_row(found.total(), columns))
    return out


def _columns(width: int) -> tuple[list[tuple[str, str]], int]:
    """Return headers and fields of the columns that fit beside names, and the room for names."""
    kept = list(COLUMNS)
    needs = lambda: sum(max(CELL, len(header)) + 1 for header, _, _ in kept)
    while needs() + NAME > width and (last := max(kept, key=lambda column: column[2]))[2]:
        kept.remove(last)
    return [(header, field) for header, field, _ in kept], max(NAME, width - needs() - 2)


def _row(one: TensorEntropy, columns: list[tuple[str, str]]) -> list[Text]:
    values = [getattr(one, field) for _, field in columns]
    cells = ["" if value is None else f"{value:.3f}" for value in values]
    return [Text(cell) for cell in (one.name, one.dtype, f"{one.weights:,}", *cells)]


def findings(found: StoredEntropy) -> list[str]:
    """Return sentences about the whole: what is hidden, and what the best code would save.

    Args:
      found: the entropies.
    """
    out = [*LEGEND]
    if (hidden := len(found.tensors) - ROWS) > 0:
        out.append(f"{hidden} more tensors, on which coding saves less, are in --json")
    for name, counts in found.pooled.items():
        each = counts.entropies
        out.append(
            f"{name}, one table for all {counts.number:,} weights: exponent {each.exponent:.3f} "
            f"bits, value {each.value:.3f}"
        )
    whole = found.total()
    before = whole.weights * whole.stored / 8
    for label, bits in (("planes", whole.planes), ("Huffman", whole.huffman), ("rANS", whole.rans)):
        if bits is not None:
            after = whole.weights * bits / 8
            out.append(f"{label}: {before:,.0f} bytes -> {after:,.0f}, {after / before:.1%}")
    return out
