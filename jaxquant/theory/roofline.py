"""What limits a model on an accelerator: memory, unpacking or multiplication.

The estimate is a lower bound on time from published bandwidths and peaks
(`pallas_kernels.cost.chips`) and the static rates of the kernels (`pallas_kernels.cost.rates`), not
a measurement. Contention, load latency and everything that is not a matmul with weights come on
top.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxquant.core.activations import kernel_form
from jaxquant.core.arguments import check_arguments
from jaxquant.core.sites import Site
from jaxquant.core.tensor import QTensor
from jaxquant.core.text_table import aligned
from jaxquant.core.tree import leaf_bytes
from jaxquant.recipes.size import weight_leaves
from pallas_kernels.cost import chips as table
from pallas_kernels.cost import rates

ROWS = 20  # of a printed table; the other weights share one row


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of one pass over one weight (over all matrices of a stack together).

    Attributes:
      path: path of the weight.
      bytes: bytes of the weight in memory, on all chips together.
      read: bytes that the pass moves to and from memory, on all chips together.
      seconds: time of the pass.
      bound: "memory", "unpacking" or "multiplying"; "no kernel" if there is none with a known rate,
        in which case the weight is assumed to be unpacked to bfloat16 in memory first and read
        again.
    """

    path: str
    bytes: int
    read: int
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds of all weights, quantized or not, for a number of tokens at once.

    Attributes:
      chip: name of the chip.
      tokens: number of tokens.
      chips: number of chips.
      bounds: one bound per weight.
      notes: what the bounds leave out.
    """

    chip: str
    tokens: int
    chips: int
    bounds: tuple[Bound, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all weights, on all chips together."""
        return sum(b.bytes for b in self.bounds)

    @property
    def read(self) -> int:
        """Bytes that one pass moves to and from memory, on all chips together."""
        return sum(b.read for b in self.bounds)

    @property
    def seconds(self) -> float:
        """The least time of one pass over all weights, in seconds."""
        return sum(b.seconds for b in self.bounds)

    @property
    def tokens_per_second(self) -> float:
        """The largest number of tokens per second."""
        return self.tokens / self.seconds

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of the time that each kind of bound takes, largest first."""
        kinds = dict.fromkeys(b.bound for b in self.bounds)
        total = {k: sum(b.seconds for b in self.bounds if b.bound == k) for k in kinds}
        return {k: total[k] / self.seconds for k in sorted(kinds, key=lambda k: -total[k])}

    @property
    def bound(self) -> str:
        """The kind of bound that takes most of the time, as in `Bound.bound`."""
        return next(iter(self.shares))

    @property
    def memory(self) -> float:
        """Bytes of memory of all chips together."""
        return self.chips * table.CHIPS[self.chip].memory

    @property
    def fits(self) -> bool:
        """Whether the weights fit in that memory; caches and activations come on top."""
        return self.bytes <= self.memory

    def __str__(self) -> str:
        rows = [("weight", "", "MB", "MB read", "us", "bound by"), *_rows(self.bounds)]
        lines = aligned(rows, left=(True, False, False, False, False, True))
        return "\n".join([*lines, *self._totals(), *self.notes])

    def _totals(self) -> list[str]:
        s = lambda count: "" if count == 1 else "s"
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in self.shares.items())
        least = math.ceil(self.bytes / table.CHIPS[self.chip].memory)
        return [
            f"{self.tokens} token{s(self.tokens)} on {self.chips} {self.chip}: at least "
            f"{1e3 * self.seconds:.3f} ms, at most {self.tokens_per_second:,.0f} tokens/s; "
            f"bound by {shares}",
            f"weights: {self.bytes / 1e9:.2f} GB of {self.memory / 1e9:.0f} GB of memory, "
            + ("which fits" if self.fits else f"which does not fit: they take {least} chips"),
        ]


def roofline(
    params: PyTree,
    chip: str,
    tokens: int = 1,
    *,
    chips: int = 1,
    sites: Mapping[str, Site] | None = None,
) -> Roofline:
    """Return a lower bound on the time a chip needs to multiply `tokens` rows by every weight.

    A matmul reads its weight once, whatever the number of rows, and a look-up reads one row for
    each token. `sites` tells which weights are only looked up. An embedding table that is also the
    output head counts in full, and so does a weight whose use cannot be traced (through a reshape,
    or in a convolution), which is treated as a matrix.

    Not modelled: activations and key-value caches; routing (all experts of a mixture are counted);
    with several chips, communication, uneven splits and arrays that every chip holds in full.

    Args:
      params: tree of floating-point arrays and `QTensor` leaves, or the same tree with
        `jax.ShapeDtypeStruct`s in place of the arrays (`jax.eval_shape`). Arrays are counted at the
        size of their dtype.
      chip: "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200" or "b200".
      tokens: number of rows of activations, 1 or more.
      chips: number of chips, 1 or more. Each holds an equal part of every weight, so memory,
        bandwidth and peaks add up.
      sites: how the function uses its weights, as `sites(fn, params, x)` of the unquantized tree
        returns it. By default every array of rank 2 or more counts as a matrix in a matmul,
        embedding tables included.
    Returns:
      The bounds; print them for a table. A weight is bound by "memory", "unpacking" or
        "multiplying" (compute).
    Raises:
      ValueError: the chip is unknown, a number is below 1, the tree holds no weights, or the sites
        belong to a different tree.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize({"w": jnp.ones((4096, 4096))}, jq.rtn(4, 128, symmetric=True))
    >>> print(roofline(q, "v5e").bound, roofline(q, "v5e", 4096).bound)
    memory multiplying
    """
    check_arguments(roofline, locals())
    chip, tokens, chips = table.known(chip), int(tokens), int(chips)
    if min(tokens, chips) < 1:
        raise ValueError(f"tokens and chips must be 1 or more, got {tokens} and {chips}")
    weights = weight_leaves(params)
    if not weights:
        raise ValueError("expected a tree of weights, but it holds no floating or quantized arrays")
    uses = {path: _pass(path, w, tokens, sites) for path, w in weights}
    bounds = tuple(_bound(path, w, chip, chips, uses[path]) for path, w in weights)
    packed = any(isinstance(w, QTensor) for _, w in weights)
    return Roofline(chip, tokens, chips, bounds, tuple(_notes(chip, chips, sites, packed)))


@dataclasses.dataclass(frozen=True)
class Use:
    """How a function uses a weight.

    Attributes:
      multiplied: whether the weight is in a matmul, or in an operation without a rule.
      rows: number of rows of a table that is only looked up; 0 if it is none.
    """

    multiplied: bool
    rows: int


def weight_use(path: str, w: PyTree, sites: Mapping[str, Site] | None) -> Use:
    """Return how a weight is used: multiplied, looked up, or neither (a vector).

    Args:
      path: path of the weight.
      w: the weight, or the same with shapes in place of arrays.
      sites: the sites of the tree; None takes every weight of rank 2 or more to be multiplied.
    Raises:
      ValueError: the sites lack the weight, or give it another shape.
    """
    if len(w.shape) < 2:
        return Use(False, 0)
    if sites is None:
        return Use(True, 0)
    site = sites.get(path)
    if site is None or site.shape != tuple(w.shape):
        known = "do not contain it" if site is None else f"give it shape {list(site.shape)}"
        raise ValueError(
            f"{path!r} has shape {list(w.shape)}, but the sites {known}: pass those "
            "of this tree before quantization, sites(fn, jax.eval_shape(dequantize, "
            "params), x)"
        )
    if site.contracted or site.otherwise or site.gathered is None:
        return Use(bool(site.contracted or site.otherwise), 0)
    return Use(False, w.shape[site.gathered])


@dataclasses.dataclass(frozen=True)
class _Pass:
    """How one pass uses a weight.

    Attributes:
      share: fraction of the weight that is read.
      rows: number of rows of x that are multiplied by it, 0 if it is in no matmul.
    """

    share: float
    rows: int


def _pass(path: str, w: PyTree, tokens: int, sites: Mapping[str, Site] | None) -> _Pass:
    use = weight_use(path, w, sites)
    share = min(1.0, tokens / use.rows) if use.rows else 1.0
    return _Pass(share, tokens if use.multiplied else 0)


def _bound(path: str, w: PyTree, chip: str, chips: int, use: _Pass) -> Bound:
    of, size, nbytes = table.CHIPS[chip], math.prod(w.shape), leaf_bytes(w)
    rate, peak = math.inf, of.flops
    if isinstance(w, QTensor) and use.rows:
        rate, peak = kernel_rate(w, chip), table.peak(chip, kernel_form(w.activations))
    moved = use.share * nbytes + (0 if rate else 4 * size)  # bfloat16, written and read again
    times = {
        "memory": moved / of.bandwidth,
        "unpacking": size / (rate * of.clock * of.cores) if rate else 0.0,
        "multiplying": 2 * size * use.rows / peak,
    }
    bound = max(times, key=times.__getitem__)
    label = bound if rate else "no kernel"
    return Bound(path, nbytes, round(moved), times[bound] / chips, label)


def kernel_rate(w: QTensor, chip: str) -> float:
    """Return the weights per cycle and core of the kernel for a weight; 0 if there is none.

    Args:
      w: the weight, or the same with shapes in place of arrays.
      chip: a key of `pallas_kernels.cost.chips.CHIPS`. If no rate of it is known, all are infinite.
    """
    if not w.format.storage:
        return 0.0
    if not rates.has_rates(chip):
        return math.inf  # a note says so
    static: dict[str, Any] = {}

    def arguments(data: dict[str, Array]) -> tuple:
        arrays, found = w.format.arguments(data, w.stored_rows)
        static.update(found)
        return arrays

    jax.eval_shape(arguments, w.data)  # fills `static` without computing
    op, form = f"{w.format.storage}_matmul", kernel_form(w.activations)
    return rates.weights_per_cycle(op, chip, form, **static)


def _notes(chip: str, chips: int, sites: Mapping[str, Site] | None, packed: bool) -> Iterator[str]:
    if sites is None:
        yield "no sites given: tables whose rows are only looked up are counted in full"
    if packed and not rates.has_rates(chip):
        yield f"the rates of kernels on {chip} are not known, so unpacking is not counted"
    if chips > 1:
        yield "communication between chips is not counted"


def _rows(bounds: tuple[Bound, ...]) -> list[tuple[str, ...]]:
    """Return the cells of a table in which layers share a row, and small weights the last one."""
    folded: dict[tuple[str, str], list[Bound]] = {}
    for b in bounds:
        layers = re.sub(r"(?<![^/])\d+(?![^/])", "*", b.path)
        folded.setdefault((layers, b.bound), []).append(b)
    time = lambda key: sum(b.seconds for b in folded[key])
    shown = set(sorted(folded, key=time, reverse=True)[:ROWS])
    rows = [
        _row(alike[0].path if len(alike) == 1 else key[0], alike, key[1])
        for key, alike in folded.items()
        if key in shown
    ]
    rest = [b for key, alike in folded.items() if key not in shown for b in alike]
    kinds = ", ".join(dict.fromkeys(b.bound for b in rest))
    return [*rows, _row("(others)", rest, kinds)] if rest else rows


def _row(name: str, alike: list[Bound], bound: str) -> tuple[str, ...]:
    count = f"x {len(alike)}" if len(alike) > 1 else ""
    total = lambda field: sum(getattr(b, field) for b in alike)
    numbers = (total("bytes") / 1e6, total("read") / 1e6, 1e6 * total("seconds"))
    return (name, count, *(f"{n:,.2f}" for n in numbers), bound)
