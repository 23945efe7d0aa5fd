"""What lossless coding can save on the tensors of a model: entropies, and bits of real codes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.core.tensor import QTensor
from jaxquant.formats.symbols import Symbols, symbols
from jaxquant.theory.coded_size import coded_bits, plane_bits
from jaxquant.theory.entropy import entropy
from jaxquant.theory.field_counts import FieldCounts, count_fields
from jaxquant.theory.float_entropy import DTYPES, patterns
from jaxquant.theory.stable_fit import fit_stable_counts
from jaxquant_models.readers import gguf_codes
from jaxquant_models.readers.gguf_file import Tensor
from jaxquant_models.readers.stored_tensors import StoredTensor

CHUNK = 1 << 22  # bytes that are counted at a time
FITTED = 1000  # least number of weights of a matrix for a stable distribution


@dataclasses.dataclass(frozen=True)
class TensorEntropy:
    """The bits of a stored tensor, per weight: stored, ideal and of real codes.

    A field is None where it does not apply: there are no exponents in codes, no serving form and no
    stable distribution of vectors. Entropies are of order 0, with one table for the tensor (of
    quantized weights: for each matrix); those of float32 are sums over bytes, as
    `jaxquant.theory.field_counts.FieldCounts` says.

    Attributes:
      name: its name in the file.
      dtype: float dtype, GGUF type, or method of a `QTensor`; "bytes" of what is none of these.
      shape: its shape.
      weights: number of weights.
      stored: bits in which it is stored, scales included.
      sign, exponent, exponent_given_row, mantissa: entropies of the fields of floats.
      value: entropy of whole floats, codes or bytes.
      value_bias: what `value` lacks on average as an estimate of the source's entropy, by Miller
        and Madow's formula.
      ideal: of floats, sign and mantissa as they are and the entropy of the exponent, which a coder
        of the mantissa can undercut (see `value`); of codes, their entropy and that of the bytes of
        their scales (one table for each byte of a scale); of bytes, their entropy.
      planes: fixed-length planes, the form for serving.
      huffman, rans: byte planes or codes by these coders, each plane stored raw where that is less.
      alpha, alpha_error: index of the symmetric stable distribution that fits best, and its
        standard error.
      exponent_of_alpha: entropy of the exponents of that distribution.
      misfit: bits by which that distribution misses the counted magnitudes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    stored: float
    value: float
    value_bias: float
    ideal: float
    huffman: float
    rans: float
    sign: float | None = None
    exponent: float | None = None
    exponent_given_row: float | None = None
    mantissa: float | None = None
    planes: float | None = None
    alpha: float | None = None
    alpha_error: float | None = None
    exponent_of_alpha: float | None = None
    misfit: float | None = None

    @property
    def saved(self) -> float:
        """Bits of the tensor that the best of the codes saves; 0 if none does."""
        best = min(self.huffman, self.rans, self.planes or math.inf)
        return max(0.0, self.weights * (self.stored - best))


@dataclasses.dataclass(frozen=True)
class StoredEntropy:
    """The entropies of all tensors of a model.

    Attributes:
      tensors: those that are not empty, in the order of the file.
      pooled: by float dtype, the counts of all its tensors together: one table for all.
    """

    tensors: Sequence[TensorEntropy]
    pooled: dict[str, FieldCounts]

    def total(self, dtype: str | None = None) -> TensorEntropy:
        """Return the means over the weights of all tensors, or of those of a dtype.

        Tensors without planes count in `planes` as they are stored; the means of other fields are
        over the tensors that have them.

        Args:
          dtype: which tensors; None for all.
        """
        chosen = [t for t in self.tensors if dtype in (None, t.dtype)]
        names = [f.name for f in dataclasses.fields(TensorEntropy)][4:]
        means = {name: _mean(chosen, name) for name in names}
        if means["planes"] is not None:
            served = [t.stored if t.planes is None else t.planes for t in chosen]
            means["planes"] = float(np.average(served, weights=[t.weights for t in chosen]))
        weights = sum(t.weights for t in chosen)
        values: dict[str, Any] = means
        return TensorEntropy("(all)", dtype or "(all)", (), weights, **values)

    def dtypes(self) -> list[str]:
        """Return the dtypes in the order of their bits, the most first."""
        sizes: dict[str, float] = {}
        for t in self.tensors:
            sizes[t.dtype] = sizes.get(t.dtype, 0) + t.weights * t.stored
        return sorted(sizes, key=lambda name: -sizes[name])

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values: total, the dtypes with pooled entropies, tensors."""
        pooled = {
            name: {
                **dataclasses.asdict(c.entropies),
                "ideal": c.entropies.ideal,
                "weights": c.number,
            }
            for name, c in self.pooled.items()
        }
        totals = {name: dataclasses.asdict(self.total(name)) for name in self.dtypes()}
        return {
            "total": dataclasses.asdict(self.total()),
            "dtypes": totals,
            "pooled": pooled,
            "tensors": [dataclasses.asdict(t) for t in self.tensors],
        }


def _mean(tensors: Sequence[TensorEntropy], name: str) -> float | None:
    known = [(getattr(t, name), t.weights) for t in tensors if getattr(t, name) is not None]
    if not known:
        return None
    values, weights = zip(*known, strict=True)
    return float(np.average(values, weights=weights))


def stored_entropy(
    tensors: Iterable[StoredTensor], done: Callable[[object], object] = lambda _: None
) -> StoredEntropy:
    """Measure tensors one after another; memory holds one tensor, and of files a part of it.

    Args:
      tensors: the tensors; empty ones are left out.
      done: called with the name of each that is done.
    Raises:
      ValueError: no tensor has weights, or one cannot be read.
    """
    found: list[TensorEntropy] = []
    pooled: dict[str, FieldCounts] = {}
    for stored in tensors:
        content = stored.read()
        if math.prod(content.shape):
            row, counts = _measured(content, stored)
            found.append(row)
            if counts is not None:
                name = counts.dtype
                pooled[name] = pooled[name] + counts if name in pooled else counts
        done(stored.name)
    if not found:
        raise ValueError("all tensors are empty, so there is nothing to measure")
    return StoredEntropy(found, pooled)


@functools.singledispatch
def _measured(content: Any, stored: StoredTensor) -> tuple[TensorEntropy, FieldCounts | None]:
    """Return the entropies of a tensor that was read, and the counts of its fields."""
    array = np.asarray(content)
    if array.dtype.name in DTYPES:
        return _of_floats(array, stored)
    planes = _byte_counts(array.reshape(-1).view(np.uint8), array.dtype.itemsize)
    return _of_bytes(stored.name, array.dtype.name, array.shape, array.size, planes), None


@_measured.register
def _(content: Tensor, stored: StoredTensor) -> tuple[TensorEntropy, None]:
    size, kind = math.prod(content.shape), content.kind.name
    if not gguf_codes.has_codes(content):
        planes = _byte_counts(content.data.reshape(-1), 1)
        return _of_bytes(stored.name, kind, content.shape, size, planes), None
    counts = np.zeros(256, np.int64)
    for codes in gguf_codes.codes(content):
        counts += np.bincount(codes + 128, minlength=256)
    bits = 8 * content.data.nbytes
    width = gguf_codes.code_bits(content)
    scales = _byte_counts(*gguf_codes.scales(content))
    return _of_codes(stored.name, kind, content.shape, bits, size, [(counts, width)], scales), None


@_measured.register
def _(content: QTensor, stored: StoredTensor) -> tuple[TensorEntropy, None]:
    """Every matrix of a stack has tables of its own; codes beyond 256 are two bytes."""
    tables: list[tuple[np.ndarray, float]] = []
    for index in np.ndindex(*content.data["codes"].shape[: content.leading()]):
        data = {name: a[index] for name, a in content.data.items()}
        try:
            kinds = symbols(content.format, data, content.stored_rows)
        except ValueError as error:
            raise ValueError(f"{stored.name}: {error}") from None
        tables += [table for kind in kinds for table in _tables(kind)]
    name, shape = content.method or type(content.format).__name__, tuple(content.shape)
    bits = 8 * sum(a.nbytes for a in content.named.values())
    scales = [plane for a in _scales(content) for plane in _planes(a)]
    return _of_codes(stored.name, name, shape, bits, content.size, tables, scales), None


def _scales(w: QTensor) -> list[np.ndarray]:
    """Return the arrays beside the codes: zero points and floats. Other integers may be codes."""
    arrays = {name: np.asarray(a) for name, a in w.named.items()}
    floats = {name for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    return [a for name, a in arrays.items() if name in floats | {"zero"}]


def _planes(array: np.ndarray) -> np.ndarray:
    return _byte_counts(array.reshape(-1).view(np.uint8), array.dtype.itemsize)


def _tables(kind: Symbols) -> list[tuple[np.ndarray, float]]:
    """Return counts of the codes, or of their bytes, each with the bits that one takes."""
    codes = np.asarray(kind.codes, np.int64)
    codes = codes - codes.min()
    count = max(1, -(-int(codes.max()).bit_length() // 8))
    parts = [(codes >> (8 * i)) & 255 for i in range(count)]
    return [(np.bincount(part, minlength=256), kind.bits / count) for part in parts]


def _of_floats(array: np.ndarray, stored: StoredTensor) -> tuple[TensorEntropy, FieldCounts]:
    whole = array.ndim >= 2 and array.shape[stored.inputs] > 0
    counts = count_fields(np.moveaxis(array, stored.inputs, -1) if whole else array)
    each, number = counts.entropies, counts.number
    coded = {
        coding: sum(coded_bits(plane, coding) for plane in counts.planes) / number
        for coding in ("huffman", "rans")
    }
    row = TensorEntropy(
        stored.name, array.dtype.name, array.shape, number, 8.0 * array.dtype.itemsize, each.value,
        counts.value_bias, each.ideal, **coded, sign=each.sign, exponent=each.exponent,
        exponent_given_row=counts.exponent_given_group, mantissa=each.mantissa,
    )  # fmt: skip
    if array.ndim < 2 or number < FITTED:
        return row, counts
    matrices = np.moveaxis(array, stored.inputs, -1)
    k = matrices.shape[-1]
    each_matrix = matrices.reshape(-1, *matrices.shape[-2:])
    bits = sum(plane_bits(patterns(m)[0], array.dtype) for m in each_matrix)
    row = dataclasses.replace(row, planes=bits / number if k else None)
    try:
        fit = fit_stable_counts(counts)
    except ValueError:  # too few magnitudes
        return row, counts
    return dataclasses.replace(
        row, alpha=fit.law.alpha, alpha_error=fit.alpha_error, misfit=fit.misfit,
        exponent_of_alpha=fit.law.exponent_entropy,
    ), counts  # fmt: skip


def _of_codes(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    bits: int,
    weights: int,
    tables: Sequence[tuple[np.ndarray, float]],
    scales: Sequence[np.ndarray] = (),
) -> TensorEntropy:
    """Return the entropies of codes of which each table counts some.

    Bytes of scales are coded by tables of their own; what is neither stays as it is.
    """
    side = bits - sum(float(counts.sum()) * width for counts, width in tables)
    side -= 8 * sum(float(counts.sum()) for counts in scales)
    of = lambda counts: float(counts.sum()) * float(entropy(counts))
    ideal, beside = sum(of(counts) for counts, _ in tables), sum(map(of, scales))
    coded_side = lambda coding: side + sum(coded_bits(c, coding) for c in scales)
    bias = sum(np.count_nonzero(counts) - 1 for counts, _ in tables) / (2 * math.log(2))
    coded = {
        coding: (coded_side(coding) + sum(coded_bits(c, coding, w) for c, w in tables)) / weights
        for coding in ("huffman", "rans")
    }
    return TensorEntropy(
        name, dtype, shape, weights, bits / weights, ideal / weights, bias / weights,
        (side + beside + ideal) / weights, **coded,
    )  # fmt: skip


def _of_bytes(
    name: str, dtype: str, shape: tuple[int, ...], weights: int, planes: np.ndarray
) -> TensorEntropy:
    tables = [(plane, 8.0) for plane in planes]
    return _of_codes(name, dtype, shape, 8 * int(planes.sum()), weights, tables)


def _byte_counts(flat: np.ndarray, size: int) -> np.ndarray:
    """Return the counts of each byte of elements of this many bytes [size, 256]."""
    counts = np.zeros((size, 256), np.int64)
    for at in range(0, flat.size, step := max(size, CHUNK // size * size)):
        for i, column in enumerate(flat[at : at + step].reshape(-1, size).T):
            counts[i] += np.bincount(column, minlength=256)
    return counts
