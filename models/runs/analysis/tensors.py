"""Stage: a row for every matrix or stack, and exponent histograms by kind of weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

import jaxquant as jq
from jaxquant.core.tree import leaf_bytes
from jaxquant.theory.entropy import entropy
from jaxquant.theory.rate_distortion import gap_in_bits, gap_in_decibels, gaussian_rate
from jaxquant_models.readers.stored_tensors import stored_tensors
from jaxquant_models.runs.analysis.names import kind_of, parameter_path
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.runs.stored_entropy import TensorEntropy, stored_entropy
from jaxquant_models.schemas.report import Histogram, TensorRow

MEANS = ("stored", "value", "ideal")  # fields of `TensorEntropy` that rows have
Matrices = Float[np.ndarray, "m k n"]


def matrix_paths(params: Any) -> list[str]:
    """Return the paths of the leaves that have a row: matrices and stacks of them.

    Args:
      params: a tree with stacked layers.
    """
    leaves = jq.core.path_leaves(params)
    return [path for path, w in leaves if w.ndim >= 2 and path.endswith(("kernel", "embedding"))]


def stored_rows(spec: str, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Return what the files of a model say of each parameter, by its path.

    Args:
      spec: the model.
      reporter: receives reports of the work.
    Returns:
      For each path the means of `MEANS` over the weights, and "dtype".
    """
    named = [(t, parameter_path(t.name)) for t in stored_tensors(spec)]
    wanted = [t for t, path in named if path is not None]
    if not wanted:
        return {}
    groups: dict[str, list[TensorEntropy]] = {}
    with reporter.stage("entropy of tensors", len(wanted)) as step:
        rows = stored_entropy(wanted, step).tensors
    for row in rows:
        groups.setdefault(parameter_path(row.name) or "", []).append(row)
    return {path: _means(rows) for path, rows in groups.items()}


def _means(rows: Sequence[TensorEntropy]) -> dict[str, Any]:
    weights = [row.weights for row in rows]
    mean = lambda name: float(np.average([_field(r, name) for r in rows], weights=weights))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    return {"dtype": " ".join(dtypes), **{name: mean(name) for name in MEANS}}


def _field(row: TensorEntropy, name: str) -> float:
    """Return a field; the ideal code of floats may code their mantissas too."""
    value: float = getattr(row, name)
    return min(value, row.value) if name == "ideal" and row.mantissa is not None else value


def tensor_rows(
    subjects: Subjects,
    stored: dict[str, dict[str, Any]],
    outliers: dict[str, list[str]],
    relative: dict[str, float],
    temperatures: dict[str, float],
) -> tuple[list[TensorRow], list[Histogram]]:
    """Return the rows of all matrices, and the histograms of the exponents by kind.

    Args:
      subjects: the models and the text.
      stored: the result of `stored_rows`.
      outliers: kinds of outliers by path.
      relative: by path, the error of the outputs relative to their energy.
      temperatures: by path, -d loss / d (bits per weight).
    """
    own, reference = (dict(jq.core.path_leaves(t)) if t else {} for t in subjects.dense)
    compared = subjects.against is not None
    held = _held(subjects.model.params)
    rows, histograms = [], []
    for path in matrix_paths(subjects.dense[0]):
        w = np.asarray(own[path], np.float32)
        counts = exponent_counts(w)
        histograms.append(_histogram(kind_of(path), *counts))
        distortion = _distortion(w, np.asarray(reference[path])) if compared else 0.0
        about, leaves = stored.get(path, {}), held[path]
        bits = about.get("stored", 8 * sum(map(leaf_bytes, leaves)) / w.size)
        rows.append(
            TensorRow(
                path=path,
                kind=kind_of(path),
                shape=list(w.shape),
                method=about.get("dtype", _method(leaves[0])),
                format=_format(leaves[0]),
                bytes=sum(map(leaf_bytes, leaves)),
                stored=bits,
                entropy=about.get("value"),
                ideal=about.get("ideal"),
                exponent=histograms[-1].entropy,
                **_gaps(bits, distortion),
                output_distortion=relative.get(path),
                temperature=_per_megabit(temperatures.get(path), w.size),
                outliers=outliers.get(path, []),
                **_shape_of(w),
            )
        )
    return rows, [_pooled(histograms), *histograms]


def _per_megabit(temperature: float | None, weights: int) -> float | None:
    """Return a temperature in nats per 10^6 stored bits, so that those of all stacks compare."""
    return None if temperature is None else 1e6 * temperature / weights


def _held(params: Any) -> dict[str, list[Any]]:
    """Return the leaves that hold each parameter: one, or one for each unstacked layer."""
    found: dict[str, list[Any]] = {}
    for path, w in jq.core.path_leaves(params):
        found.setdefault(parameter_path(path) or path, []).append(w)
    return found


def _method(w: Any) -> str:
    return (w.method or "quantized") if isinstance(w, jq.QTensor) else str(w.dtype)


def _format(w: Any) -> str:
    return repr(w.format) if isinstance(w, jq.QTensor) else str(w.dtype)


def _gaps(bits: float, distortion: float) -> dict[str, float | None]:
    """Return distortion and gaps; None where nothing is lost, since R(0) is infinite."""
    if distortion <= 0:
        names = ("distortion", "shannon", "gap", "gap_decibels")
        return dict.fromkeys(names)
    return {
        "distortion": distortion,
        "shannon": float(gaussian_rate(distortion)),
        "gap": float(gap_in_bits(bits, distortion)),
        "gap_decibels": float(gap_in_decibels(bits, distortion)),
    }


def _distortion(w: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean over matrices of |w - reference|^2 / variance; 0 for constant ones."""
    error, truth = _matrices(w - reference), _matrices(reference)
    variance = np.var(truth, axis=(1, 2), dtype=np.float64)
    squares = np.mean(np.square(error, dtype=np.float64), axis=(1, 2))
    return float(np.mean(squares[variance > 0] / variance[variance > 0])) if variance.any() else 0.0


def _shape_of(w: np.ndarray) -> dict[str, float]:
    """Return largest |w| over the root mean square, and excess kurtosis: means over matrices."""
    largest, kurtosis = [], []
    for matrix in _matrices(w):
        square = np.mean(np.square(matrix, dtype=np.float64))
        centered = matrix - np.mean(matrix, dtype=np.float64)
        squares = np.square(centered)
        second = np.mean(squares)
        if second > 0:
            largest.append(np.max(np.abs(matrix)) / np.sqrt(square))
            kurtosis.append(np.mean(np.square(squares)) / second**2 - 3)
    mean = lambda values: float(np.mean(values)) if values else 0.0
    return {"largest": mean(largest), "kurtosis": mean(kurtosis)}


def _matrices(w: np.ndarray) -> Matrices:
    return w.reshape(-1, *w.shape[-2:])


def exponent_counts(w: Float[np.ndarray, "..."] | Array) -> tuple[int, np.ndarray]:
    """Return the smallest binary exponent of nonzero numbers, and counts from there on.

    Args:
      w: numbers; an exponent e means 2^e <= |w| < 2^(e + 1). Zeros are not counted.

    >>> exponent_counts(np.array([1.0, 1.5, -4.0, 0.0]))
    (0, array([2, 0, 1]))
    """
    flat = np.asarray(w).reshape(-1)
    exponents = np.frexp(flat[flat != 0])[1] - 1
    if not exponents.size:
        return 0, np.zeros(1, np.int64)
    first = int(exponents.min())
    return first, np.bincount(exponents - first)


def _histogram(kind: str, first: int, counts: np.ndarray) -> Histogram:
    bits = float(entropy(counts)) if counts.any() else 0.0
    return Histogram(kind=kind, first=first, counts=counts.tolist(), entropy=bits)


def _pooled(histograms: Sequence[Histogram]) -> Histogram:
    first = min(h.first for h in histograms)
    counts = np.zeros(max(h.first + len(h.counts) for h in histograms) - first, np.int64)
    for h in histograms:
        counts[h.first - first :][: len(h.counts)] += np.asarray(h.counts)
    return _histogram("all", first, counts)
