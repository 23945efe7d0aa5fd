"""What limits a quantized model on an accelerator: memory, unpacking or multiplication.

The estimate is a lower bound on time from published bandwidths and peaks
(`pallas_kernels.cost.chips`) and the static rates of the kernels (`pallas_kernels.cost.rates`), not
a measurement. Contention, load latency and everything that is not a product with weights come on
top.
"""

import dataclasses
import math
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxquant.core.activations import kernel_form
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves
from jaxquant.core.tensor import QTensor
from pallas_kernels.cost import chips, rates


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time of the products with one weight (with all matrices of a stack together).

    Attributes:
      path: path of the weight.
      bytes: bytes of the weight in memory.
      seconds: time of its products with all tokens.
      bound: "memory", "unpacking" or "multiplying"; "no kernel" if there is no measured one, in
        which case the weight is assumed to be unpacked to bfloat16 in memory first and read again.
    """

    path: str
    bytes: int
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bounds of all weights, quantized or not, for a number of tokens at once.

    Attributes:
      chip: name of the chip.
      tokens: number of tokens.
      bounds: one bound per weight.
    """

    chip: str
    tokens: int
    bounds: tuple[Bound, ...]

    @property
    def seconds(self) -> float:
        """The least time of one pass over all weights, in seconds."""
        return sum(b.seconds for b in self.bounds)

    def __str__(self) -> str:
        rows = [("weight", "MB", "us", "bound by")]
        rows += [
            (b.path, f"{b.bytes / 1e6:.2f}", f"{1e6 * b.seconds:.2f}", b.bound) for b in self.bounds
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        total = f"{self.chip}, {self.tokens} tokens: at least {1e6 * self.seconds:.1f} us"
        return "\n".join(line.rstrip() for line in [*lines, total])


def roofline(params: PyTree, chip: str, tokens: int = 1) -> Roofline:
    """Return the least time of the products of `tokens` rows with every weight on a chip.

    Args:
      params: tree with `QTensor` leaves (or their shapes); plain leaves with two or more axes count
        as bfloat16 matrices.
      chip: one of `pallas_kernels.cost.chips.CHIPS`.
      tokens: number of rows of activations.
    Returns:
      The bounds.
    Raises:
      ValueError: the chip is unknown.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = {"w": jq.quantize_array(jnp.ones((4096, 4096)), jq.rtn(4, 128, symmetric=True))}
    >>> print(roofline(q, "v5e").bounds[0].bound, roofline(q, "v5e", 4096).bounds[0].bound)
    memory multiplying
    """
    check_arguments(roofline, locals())
    if chip not in chips.CHIPS:
        raise ValueError(f"chip must be one of {', '.join(chips.CHIPS)}, got {chip!r}")
    weights = [(p, w) for p, w in path_leaves(params) if w.ndim > 1]
    return Roofline(chip, tokens, tuple(_bound(p, w, chip, tokens) for p, w in weights))


def _bound(path: str, w: PyTree, chip: str, tokens: int) -> Bound:
    of = chips.CHIPS[chip]
    size = math.prod(w.shape)
    packed = isinstance(w, QTensor)
    nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(w))
    rate = _rate(w, chip) if packed else math.inf
    moved = nbytes if packed and rate else nbytes * packed + 2 * size * (1 + packed)
    times = {
        "memory": moved / of.bandwidth,
        "unpacking": size / (rate * of.clock * of.cores) if rate else 0.0,
        "multiplying": 2 * size * tokens / of.flops,
    }
    bound = max(times, key=times.__getitem__)
    return Bound(path, nbytes, times[bound], bound if rate else "no kernel")


def _rate(w: QTensor, chip: str) -> float:
    """Return the weights per cycle and core of the kernel for this weight; 0 if there is none."""
    if not w.format.storage:
        return 0.0
    static: dict[str, Any] = {}

    def arguments(data: dict[str, Array]) -> tuple:
        arrays, found = w.format.arguments(data, w.stored_rows)
        static.update(found)
        return arrays

    jax.eval_shape(arguments, w.data)  # fills `static` without computing
    op, form = f"{w.format.storage}_matmul", kernel_form(w.activations)
    return rates.weights_per_cycle(op, chip, form, **static)
