"""Tables of plain text, which reports print."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: Sequence[bool] | None = None) -> list[str]:
    """Return one line for each row, with the cells of a column padded to one width.

    Args:
      rows: the cells, as many in each row.
      left: whether the text of each column is flush left, otherwise right. Default: all are.

    >>> aligned([("weight", "MB"), ("a", "10")], left=(True, False))
    ['weight  MB', 'a       10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [True] * len(widths) if left is None else left
    pads = [str.ljust if flush else str.rjust for flush in left]
    lines = (
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
        for row in rows
    )
    return [line.rstrip() for line in lines]
