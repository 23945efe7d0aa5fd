"""Entropy of the codes of quantized weights, beside the bits that they are stored in."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jaxtyping import PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.core.text_table import aligned
from jaxquant.formats.symbols import Symbols, symbols
from jaxquant.theory.description_length import adaptive_bits
from jaxquant.theory.entropy import symbol_entropy


@dataclasses.dataclass(frozen=True)
class CodeEntropy:
    """What the codes of a weight take and what they would take, in bits per weight.

    A table belongs to one matrix: of a stack, each matrix has its own.

    Attributes:
      weights: number of weights.
      stored: all bytes of the weight: codes, scales, codebooks, transforms.
      codes: the bits of the codes as they are stored, without padding.
      entropy: order-0 entropy of the codes, with one table per matrix (and kind of codes, see
        `jaxquant.formats.symbols`). Tables are not counted.
      given_group: the same with one table per scale group. Tables are not counted, and many small
        groups make this number small: it is no rate that a coder could reach.
      adaptive: what an adaptive coder takes that starts anew for every matrix (`adaptive_bits`), so
        that the price of its table is counted.
      adaptive_given_group: the same for a coder that starts anew for every scale group.
    """

    weights: int
    stored: float
    codes: float
    entropy: float
    given_group: float
    adaptive: float
    adaptive_given_group: float

    @property
    def side(self) -> float:
        """Everything that is stored beside the codes: scales, codebooks, transforms, padding."""
        return self.stored - self.codes

    @property
    def coded(self) -> float:
        """Everything, if an adaptive order-0 coder with one table per matrix stored the codes."""
        return self.adaptive + self.side

    @classmethod
    def pooled(cls, several: "Iterable[CodeEntropy]") -> "CodeEntropy":
        """Return the averages over several weights, each of which counts by its size.

        Args:
          several: at least one.
        Returns:
          The averages, and the number of all weights.
        Raises:
          ValueError: there are none.
        """
        rows = np.array([dataclasses.astuple(one) for one in several], np.float64)
        if not len(rows):
            raise ValueError("expected the entropies of at least one weight, got none")
        return cls(int(rows[:, 0].sum()), *np.average(rows[:, 1:], 0, rows[:, 0]).tolist())


@dataclasses.dataclass(frozen=True)
class CodeEntropies:
    """The entropies of all quantized weights of a tree.

    Attributes:
      weights: the entropies by path.
    """

    weights: Mapping[str, CodeEntropy]

    @property
    def total(self) -> CodeEntropy:
        """The averages over all weights."""
        return CodeEntropy.pooled(self.weights.values())

    def __str__(self) -> str:
        header = ("weight", "stored", "codes", "entropy", "given group", "adaptive", "by group")
        rows = [
            (name, *(f"{bits:.3f}" for bits in dataclasses.astuple(one)[1:]))
            for name, one in [*self.weights.items(), ("(all)", self.total)]
        ]
        return "\n".join(aligned([header, *rows], left=(True, *(False,) * 6)))


def code_entropy(params: PyTree) -> CodeEntropies:
    """Return the order-0 entropies of the codes of all quantized weights, and what is stored.

    An entropy is that of the frequencies with which the codes occur (`symbol_entropy`), divided by
    the number of weights that a code covers: 8 for E8P, for example. It does not say that an
    entropy-coded file would be this small; `adaptive` does, since it counts what the table costs.
    That matters for large codebooks. A matrix with fewer codes than its codebook has entries cannot
    have an entropy near the bits of a code, however random the codes are.

    Which integers are counted is listed in `jaxquant.formats.symbols.symbols`. Two formats need
    care. The codes of a trellis are the bits of its path, which an order-0 coder cannot compress if
    the trellis is good. Those of `EntropyCoded` are what its arithmetic coder receives, and the
    classes into which the coder sorts weights are the groups, so `given_group` is the entropy to
    compare `codes` with; `codes` is the stream without an estimate of its side information.

    Args:
      params: a `QTensor` or a tree of such, with concrete arrays; other leaves are ignored.
    Returns:
      The entropies by path, "" for a lone `QTensor`; print them for a table.
    Raises:
      ValueError: the tree has no quantized weights, a format has no known codes (floats: see
        `jaxquant.theory.float_entropy`), or arrays are traced by `jit` or mere shapes.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (256, 64))
    >>> found = code_entropy(jq.quantize_array(w, jq.rtn(bits=4, group_size=-1, symmetric=True)))
    >>> print(found)
    weight  stored  codes  entropy  given group  adaptive  by group
             4.062  4.000    3.293        3.243     3.298     3.409
    (all)    4.062  4.000    3.293        3.243     3.298     3.409
    """
    check_arguments(code_entropy, locals())
    leaves = [(path, w) for path, w in path_leaves(params) if isinstance(w, QTensor)]
    if not leaves:
        raise ValueError(
            "expected a QTensor or a tree with some, got none; quantize the tree first"
        )
    return CodeEntropies({path: _of(path, w) for path, w in leaves})


def _of(path: str, w: QTensor) -> CodeEntropy:
    if any(not isinstance(a, np.ndarray | jax.Array) for a in w.data.values()) or any(
        isinstance(a, jax.core.Tracer) for a in w.data.values()
    ):
        raise ValueError(
            f"{path or 'the weight'}: expected concrete arrays; the codes are counted on the host, "
            "so call this outside of jit, on a tree from quantize or a checkpoint"
        )
    totals = np.zeros(5)
    for index in np.ndindex(*w.data["codes"].shape[: w.leading()]):
        data = {name: a[index] for name, a in w.data.items()}
        try:
            kinds = symbols(w.format, data, w.stored_rows)
        except ValueError as error:
            raise ValueError(f"{path or 'the weight'}: {error}") from None
        totals += sum((_bits(kind) for kind in kinds), np.zeros(5))
    return CodeEntropy(w.size, w.bits_per_weight, *(totals / w.size).tolist())


def _bits(kind: Symbols) -> np.ndarray:
    """Return the bits of all codes of a kind: stored, coded by tables, and adaptively."""
    codes, groups = kind.codes, kind.groups
    each = (kind.bits, symbol_entropy(codes), symbol_entropy(codes, groups))
    adaptive = (adaptive_bits(codes, kind.alphabet, of) for of in (None, groups))
    return np.array([*(len(codes) * bits for bits in each), *adaptive])
