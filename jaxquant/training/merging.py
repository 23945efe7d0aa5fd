"""Merging adapters into the weights that they are on: `merge`."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.adapters.adapted import Adapted, is_adapted
from jaxquant.adapters.lora import base_of
from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import brief
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.protocols import Data, Format, Rounder
from jaxquant.core.random_keys import Draw
from jaxquant.core.tensor import QTensor
from jaxquant.estimators.latent_format import Latent, batched
from jaxquant.formats.dense import Dense
from jaxquant.formats.offset import Offset
from jaxquant.rounding import Moments, Nearest
from jaxquant.training.adaptation import each_matrix, stored_gram
from pallas_kernels.context import compiled


class Merged(NamedTuple):
    """What became of one adapter.

    Attributes:
      path: path of the weight.
      exact: whether the merged weight computes what was trained.
      kept: share of the energy of the adapter's outputs that survives, 1 - |X E|^2 / |X D|^2, where
        D is the change by the adapter and E the error of the merged weight. The inputs X have the
        second moment of `stats`; without it, they are uncorrelated and of unit variance. 1 if the
        merge is exact, else at most 1, and negative if the error is larger than the change. NaN if
        an adapter that does not merge exactly changed nothing.
      energy: |X D|^2 per input vector, the weight of `kept` in an average over matrices; 0 for
        adapters that always merge exactly, for which it is not computed.
      bits_per_weight: of the merged weight.
    """

    path: str
    exact: bool
    kept: float
    energy: float
    bits_per_weight: float


def merge(
    params: PyTree,
    *,
    rounder: Rounder | None = None,
    bits: int | None = None,
    stats: Stats | None = None,
    key: Array | None = None,
    progress: Callable[[Merged], None] | None = None,
) -> PyTree:
    """Merge adapters into the weights they are on.

    `QALoRA`, `L4Q`, `LoTA` and `PEQA` merge exactly: the result is packed and computes what was
    trained.
    `LoRA` on a packed weight does not: the sum is rounded again, to the format of the weight, and
    `progress` reports how much survives. `LoRA` on floating-point weights gives floats, and on
    latent weights it is added to their floats.

    Args:
      params: tree with adapted weights.
      rounder: how sums are rounded again. Default: to nearest; `jaxquant.rounding.LDLQ()` loses
        less, and needs `stats`. Exact merges round nothing.
      bits: number of bits per code of sums that are rounded again. Default: that of the weight.
      stats: the result of `calibrate`, for the rounder and to weigh errors by the inputs.
      key: PRNG key for rounders that draw random numbers. Default: `jax.random.key(0)`.
      progress: called with a `jaxquant.training.Merged` after every weight.
    Returns:
      The tree, with plain `QTensor`s and arrays.
    Raises:
      ValueError: no weight has an adapter; a rounder, or another number of bits than the weights
        have, is given though all merges are exact; the format does not have `bits`; statistics
        that the rounder needs are missing; a weight holds several adapters
        (`jaxquant.training.together`); or a sum is not finite or outside the range of its format.
    Warns:
      If scales lose precision when a sum is rounded.

    >>> import jaxquant as jq
    >>> q = jq.quantize({"w": jnp.eye(64)}, jq.Method("q", jq.rounding.Nearest(),
    ...     jq.formats.Offset(jq.formats.Integer(4, 16, symmetric=True))))
    >>> merge(jq.adapt(q, jq.adapters.QALoRA(rank=2)))["w"].format == q["w"].format
    True
    """
    check_arguments(merge, locals())
    leaves = {path: w for path, w in path_leaves(params) if is_adapted(w)}
    if not leaves:
        raise ValueError("nothing to merge: no weight of the tree has an adapter")
    inexact = [path for path, w in leaves.items() if _rounds_again(w.format)]
    if not inexact:
        _check_exact(leaves, rounder, bits)
    rounder, draw, new = rounder or Nearest(), Draw.of(key), {}
    for path, w in leaves.items():
        gram = stats.gram(path) if stats is not None else None
        latent = isinstance(w.format.format, Latent)  # whose floats are not rounded here
        if path in inexact and not latent and rounder.needs_gram and gram is None:
            raise ValueError(
                f"{path}: {brief(rounder)} needs statistics: pass stats=calibrate(...)"
            )
        format = with_bits(path, w.format.format, bits) if path in inexact else w.format.format
        new[path] = _merged(path, w, format, rounder, gram, draw)
        if progress is not None:
            progress(_report(path, w, new[path], gram))
    return replace_leaves(params, new)


def _check_exact(leaves: Mapping[str, Any], rounder: Rounder | None, bits: int | None) -> None:
    """Raise ValueError for options of rounding, if nothing is rounded."""
    if rounder is not None:
        raise ValueError(
            "all adapters of the tree merge exactly, so nothing is rounded again: leave the "
            "rounder out"
        )
    for path, w in leaves.items():
        held = bits_of(w.format.format)
        if bits is not None and held != bits:
            what = "floats" if held is None else f"codes of {held} bits"
            raise ValueError(
                f"{path}: the merge is exact and keeps {what}, so bits={bits} cannot be met: "
                "leave bits out"
            )


def bits_of(format: Format) -> int | None:
    """Return the number of bits of a format's codes, or None if it has no such number.

    Args:
      format: the format; of an `Offset`, the levels count.
    """
    inner = format.format if isinstance(format, Offset) else format
    return getattr(inner, "bits", None)


def with_bits(path: str, format: Any, bits: int | None) -> Format:
    """Return a format with another number of bits per code.

    Args:
      path: path of the weight, for the error.
      format: the format.
      bits: the number; None leaves the format as it is.
    Raises:
      ValueError: the format has no such number, or does not have it at that.
    """
    if bits is None or bits == bits_of(format):
        return format
    if bits_of(format) is None:
        raise ValueError(f"{path}: {brief(format)} has no other number of bits: leave bits out")
    try:
        if isinstance(format, Offset):
            inner: Any = dataclasses.replace(format.format, bits=bits)  # type: ignore[type-var]
            return dataclasses.replace(format, format=inner)
        return dataclasses.replace(format, bits=bits)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _rounds_again(format: Adapted) -> bool:
    return not (format.adapter.exact or format.format == Dense())


def _merged(
    path: str, w: QTensor, format: Format, rounder: Rounder, gram: Array | None, draw: Draw
) -> PyTree:
    form: Adapted = w.format  # type: ignore[assignment]
    k, lead = w.stored_rows, w.leading()
    if form.adapter.exact:
        data = _packed(form, k, lead, w.data)
        return dataclasses.replace(w, data=data, format=form.format)
    if form.format == Dense():
        return _dense(w)
    if isinstance(form.format, Latent):
        change = w.stored() - form.format.dequantize(base_of(w.data), k)
        codes = w.data["codes"] + change.astype(w.data["codes"].dtype)
        return dataclasses.replace(w, data={**base_of(w.data), "codes": codes}, format=form.format)
    grams = None if gram is None else stored_gram(w, gram)

    def one(i: int, value: Array, gram: Array | None) -> Data:
        _check_sum(f"{path}: the sum of weight and adapter", format, value)
        return _rounded(rounder, format, value, gram, draw.of_matrix(f"merge {path}", i))

    return dataclasses.replace(w, data=each_matrix(one, lead, w.stored(), grams), format=format)


def _dense(w: QTensor) -> PyTree:
    """Return the merged floats: an array, or a `QTensor` if inputs are rounded or transformed."""
    if w.activations is None and w.input is None and w.output is None:
        return w.dequantize()
    codes = w.stored().astype(w.data["codes"].dtype)
    return dataclasses.replace(w, data={"codes": codes}, format=Dense())


def _check_sum(what: str, format: Format, w: Array) -> None:
    """Raise ValueError if a matrix cannot be rounded to a format; warn if it loses precision."""
    if isinstance(jnp.isfinite(w), jax.core.Tracer):
        return
    if not bool(jnp.all(jnp.isfinite(w))):
        raise ValueError(f"{what} is not finite (NaN or infinity); was the training stable?")
    try:
        found = format.check(w)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if found:
        warnings.warn(f"{what}: {found}", stacklevel=6)


@partial(compiled, static_argnums=(0, 1, 2))
def _packed(form: Adapted, k: int, lead: int, data: Data) -> Data:
    return batched(lambda d: form.adapter.merged(form.format, d, k), lead)(data)


@partial(compiled, static_argnums=(0, 1))
def _rounded(rounder: Rounder, format: Format, w: Array, gram: Array | None, key: Array) -> Data:
    return rounder(w, format, Moments(gram), key)[0]


def _report(path: str, w: QTensor, new: PyTree, gram: Array | None) -> Merged:
    form: Adapted = w.format  # type: ignore[assignment]
    exact = not _rounds_again(form)
    if form.adapter.floating or form.adapter.exact:  # the change cannot be told from the base
        return Merged(path, True, 1.0, 0.0, new.bits_per_weight)
    k = w.stored_rows
    value, base = w.stored(), form.format.dequantize(base_of(w.data), k)
    if gram is not None:
        gram = stored_gram(w, gram)
    energy = float(_energy(value - base, gram))
    if exact:
        bits = new.bits_per_weight if isinstance(new, QTensor) else 8.0 * new.dtype.itemsize
        return Merged(path, True, 1.0, energy, bits)
    error = float(_energy(new.stored() - value, gram))
    kept = 1 - error / energy if energy else math.nan
    return Merged(path, False, kept, energy, new.bits_per_weight)


@jax.jit
def _energy(d: Float[Array, "... k n"], gram: Float[Array, "... k k"] | None) -> Float[Array, ""]:
    return jnp.sum(d * (d if gram is None else gram @ d))
