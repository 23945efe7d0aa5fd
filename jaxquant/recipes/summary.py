"""`summary`: a table of the weights of a tree, with equal layers in one row."""

import dataclasses
import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from jaxtyping import PyTree

from jaxquant.core.fields import shown
from jaxquant.core.standin import is_standin
from jaxquant.core.text_table import aligned
from jaxquant.core.tree import leaf_bytes
from jaxquant.estimators.latent_format import Latent
from jaxquant.recipes.size import Size, size_of, weight_leaves

# A number that is a whole key of a path, as in layers/0, or its end, as in layers_0.
NUMBER = re.compile(r"(?<![^/_])\d+(?![^/])")
HEADER = ("weight", "count", "shape", "method", "bits/weight", "bytes")
LEFT = (True, False, True, True, False, False)  # columns whose text is flush left


@dataclasses.dataclass(frozen=True)
class Row:
    """Weights that have all but a number in their paths in common.

    Attributes:
      path: their path, with "*" in the place of the number; if other weights differ in the number
        too, the numbers of these, such as "layers/0-2,5/w".
      count: how many there are.
      shape: the shape of each.
      method: name of the method that quantized them, or the dtype of floating-point arrays.
      weights: number of weights in all of them.
      bytes: size of all of them in bytes.
    """

    path: str
    count: int
    shape: tuple[int, ...]
    method: str
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes / weights."""
        return 8 * self.bytes / max(1, self.weights)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The weights of a tree, in its order. `str` prints them as a table, and notebooks draw it.

    Attributes:
      rows: one `Row` for equal weights.
      size: the `Size` of the whole tree, which is the sum of the rows.
    """

    rows: tuple[Row, ...]
    size: Size

    def __str__(self) -> str:
        table = [HEADER, *self._cells(), self._total()]
        lines = aligned(table, LEFT)
        return "\n".join([*lines[:-1], "-" * max(map(len, lines)), lines[-1]])

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        body = "".join(_html_row("td", cells) for cells in self._cells())
        return (
            f"<table><thead>{_html_row('th', HEADER)}</thead><tbody>{body}</tbody>"
            f"<tfoot>{_html_row('th', self._total())}</tfoot></table>"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.path,
                f"{row.count:,}",
                "x".join(map(str, row.shape)) or "scalar",
                row.method,
                f"{row.bits_per_weight:.3f}",
                f"{row.bytes:,}",
            )
            for row in self.rows
        ]

    def _total(self) -> tuple[str, ...]:
        count = sum(row.count for row in self.rows)
        return (
            "total",
            f"{count:,}",
            f"{self.size.weights:,} weights",
            f"{self.size.share:.1%} quantized",
            f"{self.size.bits_per_weight:.3f}",
            f"{self.size.bytes:,}",
        )


def _html_row(tag: str, cells: Iterable[str]) -> str:
    columns = zip(cells, LEFT, strict=True)
    aligned = (
        f'<{tag} style="text-align:{"left" if left else "right"}">{html.escape(text)}</{tag}>'
        for text, left in columns
    )
    return f"<tr>{''.join(aligned)}</tr>"


def summary(tree: PyTree) -> Summary:
    """Return a table of a tree's weights: path, shape, method, bits per weight and bytes.

    Weights whose paths differ in numbers only (layers/0/w, layers/1/w) and that are otherwise equal
    share a row. Leaves that are neither floating-point arrays nor quantized are left out.

    Args:
      tree: tree of arrays and `QTensor` leaves, or the same tree with `jax.ShapeDtypeStruct`s in
        place of the arrays (`jax.eval_shape`): parameters of Flax or Equinox, an NNX `State` or
        module, whether quantized, latent or unquantized.
    Returns:
      A `Summary`; print it for the table.
    Raises:
      ValueError: the tree holds no weights.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> layers = [{"w": jnp.ones((64, 32)), "b": jnp.ones(32)} for _ in range(12)]
    >>> recipe = jq.Recipe([("*/w", jq.rtn(bits=4)), ("*", jq.KEEP)])
    >>> print(summary(jq.quantize({"layers": layers}, recipe)))
    weight      count  shape           method           bits/weight   bytes
    layers/*/b     12  32              float32               32.000   1,536
    layers/*/w     12  64x32           rtn                    4.312  13,248
    -----------------------------------------------------------------------
    total          24  24,960 weights  98.5% quantized        4.738  14,784
    """
    leaves = weight_leaves(tree)
    if not leaves:
        raise ValueError(
            f"expected a tree with floating-point or quantized arrays, got {shown(tree)}; pass the "
            f"parameters, such as variables['params'] or nnx.state(model)"
        )
    return Summary(tuple(_folded([_row(path, w) for path, w in leaves])), size_of(leaves))


def _row(path: str, w: PyTree) -> Row:
    return Row(path, 1, tuple(np.shape(w)), _method(w), w.size, leaf_bytes(w))


def _method(w: PyTree) -> str:
    if not is_standin(w):
        return str(w.dtype)
    format = getattr(w, "format", None)
    name = getattr(w, "method", "") or type(w if format is None else format).__name__
    return f"{name}, latent" if isinstance(format, Latent) else name


def _folded(rows: list[Row]) -> list[Row]:
    """Merge rows that differ in the numbers of their paths only."""
    pattern = lambda row: NUMBER.sub("*", row.path)
    alike = defaultdict(list)
    for row in rows:
        alike[pattern(row), dataclasses.replace(row, path="")].append(row)
    known = Counter(map(pattern, rows))
    return [
        dataclasses.replace(
            group[0],
            path=_common([row.path for row in group], whole=len(group) == known[of]),
            count=len(group),
            weights=sum(row.weights for row in group),
            bytes=sum(row.bytes for row in group),
        )
        for (of, _), group in alike.items()
    ]


def _common(paths: list[str], whole: bool) -> str:
    """Return the path of a group of weights.

    Args:
      paths: paths that differ in their numbers only.
      whole: whether these are all paths that differ in their numbers only.

    >>> _common(["a/0/b/1", "a/0/b/2", "a/0/b/5"], whole=True)
    'a/0/b/*'
    >>> _common(["a/0/b/1", "a/0/b/2", "a/0/b/5"], whole=False)
    'a/0/b/1-2,5'
    """
    places = [set(numbers) for numbers in zip(*map(NUMBER.findall, paths), strict=True)]
    texts = (min(n) if len(n) == 1 else "*" if whole else _ranges(map(int, n)) for n in places)
    return NUMBER.sub(lambda _: next(texts), paths[0])


def _ranges(numbers: Iterable[int]) -> str:
    """List numbers, those that follow each other as a range.

    >>> _ranges([3, 0, 1, 2, 7])
    '0-3,7'
    """
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in found)
