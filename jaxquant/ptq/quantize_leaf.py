"""Quantization of one leaf, whose matrices go one by one through a single compiled program."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxquant.core.hosts import on_host
from jaxquant.core.random_keys import Draw
from jaxquant.core.tensor import Arrays, QTensor, by_kind, flat_names
from jaxquant.durable.states import mark
from jaxquant.durable.store import Finished
from jaxquant.formats.exact_format import bits_of
from jaxquant.lossless.tensors import settled
from jaxquant.methods.method import Method
from jaxquant.ptq.round_matrix import Keys, Report, finite
from jaxquant.ptq.round_over_mesh import Split, interleaved, round_each, split_of, together
from jaxquant.ptq.round_stacked import Sums, importance_at, planned, round_at
from jaxquant.ptq.shared_transforms import Inputs, passed
from jaxquant.recipes.recipe import WeightEntry

MARK = "report.of"  # name of the digest in a stored entry
# Indices of matrices that were rounded together, their arrays, and of each its name, its report and
# whether it came from the store.
Step = tuple[list[int], Arrays, list[tuple[str, Report, bool]]]


@dataclasses.dataclass(frozen=True)
class Done:
    """Progress report on one quantized matrix.

    Attributes:
      path: path of the leaf, with the index for a matrix of a stack: "layers/up/kernel[3]".
      method: name of the method.
      index, total: position of the matrix, from 1, and number of matrices to quantize.
      bits_per_weight: bits of all arrays of the matrix, per weight.
      loss: relative loss, tr(E^T H E) / tr(W^T H W) for the error E: the share of the output's
        energy that is lost. NaN if error feedback saw no active input channel.
      damping: damping added to H, as a fraction of mean(diag H); 0 without error feedback.
      dead: number of input channels that were never active in calibration.
      seconds: time taken; 0 if the matrix came from an earlier run.
    """

    path: str
    method: str
    index: int
    total: int
    bits_per_weight: float
    loss: float
    damping: float
    dead: int
    seconds: float


class Counter:
    """Counts finished matrices and reports each to the user's callback.

    Args:
      total: number of matrices.
      tell: callback, or None.
    """

    def __init__(self, total: int, tell: Callable[[Done], None] | None) -> None:
        self.total, self.count, self.tell = total, 0, tell

    def done(self, name: str, method: str, report: Report, bits: float, seconds: float) -> None:
        self.count += 1
        if self.tell is not None:
            loss, damping, dead = map(float, report)
            self.tell(
                Done(name, method, self.count, self.total, bits, loss, damping, int(dead), seconds)
            )


@dataclasses.dataclass(frozen=True)
class LeafJob:
    """Quantizes the matrices of one leaf in turn, with one compiled program.

    Attributes:
      entry: the plan's entry for the leaf.
      draw: source of randomness.
      inputs: transforms shared by the weights that read the same input.
      finished: store of finished matrices, or None; see `quantize`.
      first: index of the leaf's first matrix along the leading axis of its stack; see `quantize`.
    """

    entry: WeightEntry
    draw: Draw
    inputs: Inputs
    finished: Finished | None
    first: int = 0

    def run(self, w: Array, sums: Sums, progress: Counter) -> QTensor:
        entry = self.entry
        *batch, k, n = entry.matrix
        sums = sums.matrices(entry)
        # Under tracing there are no values to check. Tracing shows in the result of a jnp call,
        # not in the type of w: eval_shape may close over a concrete array.
        sound = finite(w)
        abstract = isinstance(sound, jax.core.Tracer)
        exact = entry.method.format.exact
        if not abstract and not exact:
            _check_values(w, sound, entry.path, sums)
        matrices = entry.matrices(bits_of(w) if exact else w)  # slices of floats could quiet NaN
        if not abstract and not exact:
            self._check_range(matrices)
        method = self._planned(matrices, sums, abstract, w.dtype.name)
        split = None if abstract or exact else split_of(w, entry)
        steps = (
            self._over_mesh(split, matrices, sums, method)
            if split
            else self._in_turn(matrices, sums, method, abstract)
        )
        parts: list[Arrays] = []
        reports: dict[int, Report] = {}
        start = time.monotonic()
        for indices, arrays, found in steps:
            parts.append(arrays)
            bits = 8 * sum(a.nbytes for a in jax.tree.leaves(arrays)) / (k * n * len(indices))
            seconds = time.monotonic() - start
            for i, (name, report, before) in zip(indices, found, strict=True):
                # If calibration saw no active channel, the loss is unknown.
                loss = jnp.where(report.dead == k, jnp.nan, report.loss)
                reports[i] = report._replace(loss=loss)
                if not abstract:
                    taken = 0.0 if before else seconds
                    progress.done(name, method.name, reports[i], bits, taken)
            start = time.monotonic()
        if not abstract:
            self._warn([reports[i] for i in sorted(reports)])
            self._warn_of_few(sums)
        arrays = interleaved(split, *parts) if split else _stacked(tuple(batch), *parts)
        return QTensor(
            data=arrays.data,
            format=method.format,
            view=entry.view,
            logical_dtype=jnp.dtype(w.dtype).name,
            method=method.name,
            input=method.input,
            output=method.output,
            shared=self._shared(arrays, abstract),
            activations=method.activations,
            input_data=arrays.input,
            output_data=arrays.output,
            activations_data=arrays.activations,
        )

    def _check_range(self, matrices: Array) -> None:
        """Raise ValueError if the format cannot hold the weights; warn if it loses some."""
        for i, name in enumerate(self._names()):
            try:
                found = self.entry.method.format.check(
                    self.entry.method.magnitudes(_at(matrices, i))
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if found:
                warnings.warn(f"{name}: {found}", stacklevel=5)

    def importance(self, w: Array, sums: Sums) -> Float[np.ndarray, "blocks"]:
        """Return what a format that plans rates is told of the leaf: the sum over its matrices.

        Args:
          w: the leaf.
          sums: its second moments.
        """
        return self._importance(self.entry.matrices(w), sums.matrices(self.entry))

    def _importance(self, matrices: Array, sums: Sums) -> Float[np.ndarray, "blocks"]:
        method = self.entry.method
        k, block = method.stored(*matrices.shape[1:])[0], method.format.block
        found = np.zeros(k // block)
        for i in range(len(matrices)):
            keys, known = self._keys(i), self._known(i).input or None
            one, e = importance_at(matrices, sums, i, keys, method, block, known)
            found += np.ldexp(on_host(one).astype(np.float64), int(e))
        return found

    def _planned(self, matrices: Array, sums: Sums, abstract: bool, dtype: str) -> Method:
        """Return the method, with its format planned or settled for these matrices."""
        method = self.entry.method
        if method.format.exact:
            return settled(method, dtype, matrices, self.entry.path)
        if not method.format.plans:
            return method
        if abstract:
            blocks = method.stored(*matrices.shape[1:])[0] // method.format.block
            return planned(method, np.ones(blocks))
        return planned(method, self._importance(matrices, sums))

    def _in_turn(
        self, matrices: Array, sums: Sums, method: Method, abstract: bool
    ) -> Iterator[Step]:
        """Yield the index, the arrays and the report of each matrix."""
        for i, name in enumerate(self._names()):
            kept, made_of = ({}, None) if abstract else self._kept(i, name, matrices, sums, method)
            if kept:
                arrays, report = _restored(kept)
                yield [i], arrays, [(name, report, True)]
                continue
            known, keys = self._known(i), self._keys(i)
            if method.format.exact:
                data, zero = method.format.encode_bits(matrices[i]), jnp.float32(0)
                arrays, report = Arrays(data, {}, {}, known.activations), Report(zero, zero, zero)
                if not abstract:
                    self._keep(name, arrays, report, made_of)
                yield [i], arrays, [(name, report, False)]
                continue
            arrays, report, sound = round_at(matrices, sums, i, keys, method, known.input or None)
            arrays = arrays._replace(activations=known.activations)
            if abstract:
                # Rates planned without values are not a result, and the weights were not checked.
                rated = method is not self.entry.method
                sound = jnp.logical_and(not rated, finite((matrices[i], sums.moments(i), known)))
                yield [i], _nan_unless(sound, arrays), [(name, report, False)]
                continue
            arrays, report, sound = jax.block_until_ready((arrays, report, sound))
            self._check_result(name, arrays, bool(sound))
            self._keep(name, arrays, report, made_of)
            yield [i], arrays, [(name, report, False)]

    def _over_mesh(
        self, split: Split, matrices: Array, sums: Sums, method: Method
    ) -> Iterator[Step]:
        """Yield what `_in_turn` does for one matrix of every part of the stack at a time."""
        names = list(self._names())
        for j in range(len(matrices) // split.parts):
            indices = split.indices(j)
            stored = [self._kept(i, names[i], matrices, sums, method) for i in indices]
            if all(kept for kept, _ in stored):
                before = [_restored(kept) for kept, _ in stored]
                told = [(names[i], r, True) for i, (_, r) in zip(indices, before, strict=True)]
                yield indices, together([arrays for arrays, _ in before], split), told
                continue
            keys = together([self._keys(i) for i in indices], split)
            known = together([self._known(i) for i in indices], split)
            arrays, report, sound = jax.block_until_ready(
                round_each(matrices, sums, j, keys, method, known.input or None, split)
            )
            arrays = arrays._replace(activations=known.activations)
            report, sound = jax.tree.map(on_host, (report, sound))
            found = [Report(*(a[d] for a in report)) for d in range(split.parts)]
            for d, i in enumerate(indices):
                one = jax.tree.map(lambda a, d=d: a[d], arrays)
                self._check_result(names[i], one, bool(sound[d]))
                self._keep(names[i], one, found[d], stored[d][1])
            told = [(names[i], r, False) for i, r in zip(indices, found, strict=True)]
            yield indices, arrays, told

    def _kept(
        self, i: int, name: str, matrices: Array, sums: Sums, method: Method
    ) -> tuple[dict[str, Array], np.ndarray | None]:
        """Return what the store holds of matrix i, and a digest of what it has to be made of."""
        if self.finished is None:
            return {}, None
        kept = dict(self.finished.get(name, {}))
        made_of = mark(f"{method}{self.draw.name}", (on_host(matrices[i]), sums.own(i)))
        if not kept or not np.array_equal(kept.pop(MARK, ()), made_of):
            return {}, made_of  # an entry for another matrix, method or key is ignored
        return {key: jnp.asarray(a) for key, a in kept.items()}, made_of

    def _keep(self, name: str, arrays: Arrays, report: Report, made_of: np.ndarray | None) -> None:
        """Store a matrix; ValueError if its format uses a name that is taken."""
        if self.finished is None:
            return
        reports = {f"report.{field}": a for field, a in report._asdict().items()}
        named = flat_names(arrays)
        if taken := sorted(named.keys() & {*reports, MARK}):
            raise ValueError(
                f"{name}: the format must not name an array {taken[0]!r}, which jaxquant "
                "reserves; rename it"
            )
        self.finished[name] = {**named, **reports, MARK: made_of}

    def _check_result(self, name: str, arrays: Arrays, sound: bool) -> None:
        """Raise ValueError if the packed matrix is not finite.

        The matrix is decoded for the check only if its arrays and its loss are not all finite.
        """
        stored = self.entry.method.stored(*self.entry.matrix[-2:])[0]
        if sound and (not arrays.activations or bool(finite(arrays.activations))):
            return
        decoded = self.entry.method.format.dequantize(arrays.data, stored)
        if not bool(finite((arrays, decoded))):
            raise ValueError(
                f"{name}: {self.entry.method.name} turned finite weights into values that "
                "are not finite (NaN or infinity); use another method or more bits, or "
                "rescale the weights"
            )

    def _known(self, i: int) -> Arrays:
        """Return the arrays that all weights reading this input share."""
        return by_kind(self.inputs.arrays(self.entry.path, i, self._keys(i).input) or {})

    def _names(self) -> Iterator[str]:
        batch = self.entry.matrix[:-2]
        for index in np.ndindex(*batch):
            if not batch:
                yield self.entry.path
                continue
            place = (self.first + index[0], *index[1:])
            yield f"{self.entry.path}[{', '.join(map(str, place))}]"

    def _keys(self, i: int) -> Keys:
        place = i + passed(self.entry, self.first)
        own = self.draw.of_matrix(self.entry.path, place)
        return Keys(self.draw.of_input(self._input, place), own)

    @property
    def _input(self) -> str:
        return self.inputs.leader[self.entry.path]

    def _shared(self, arrays: Arrays, abstract: bool) -> str:
        """Return a name that weights share only if they read one input through one transform."""
        side = self.entry.method.input
        if side is not None and (side.fitted or not self.draw.name):
            return ""
        count = len(self.inputs.members[self._input])
        name = f"{count} of {self._input} {self.draw.name}"
        if not self.inputs.common(self.entry.path):  # the draw's name identifies drawn arrays
            return name
        made = arrays.input, arrays.activations
        return "" if abstract else f"{name} {mark('', made).tobytes().hex()}"

    def _warn(self, reports: list[Report]) -> None:
        path, k = self.entry.path, self.entry.matrix[-2]
        starved = [name for name, r in zip(self._names(), reports, strict=True) if int(r.dead) == k]
        if starved:
            named = path if len(starved) == len(reports) else ", ".join(starved)
            warnings.warn(
                f"{named}: the statistics are zero throughout, so it was rounded to nearest",
                stacklevel=4,
            )
        wanted = self.entry.method.rounder.damping
        damping = max(float(r.damping) for r in reports)
        if damping > 1.5 * wanted:
            warnings.warn(
                f"{path}: the second moment is not positive definite; damping was raised from "
                f"{wanted:g} to {damping:g} of its mean diagonal",
                stacklevel=4,
            )

    def _warn_of_few(self, sums: Sums) -> None:
        """Warn about experts that so few tokens reached that their statistics are completed."""
        if sums.pools is None or sums.rows is None:
            return
        least, rows = int(sums.pools.least), on_host(sums.rows)
        few = [(float(n), name) for name, n in zip(self._names(), rows, strict=True) if n < least]
        if few:
            named = ", ".join(f"{name} ({n:,.0f})" for n, name in sorted(few)[:_NAMED])
            warnings.warn(
                f"{named}{', ...' * (len(few) > _NAMED)}: fewer than {least} tokens reached "
                f"{len(few)} of {len(rows)} experts, so that their statistics are completed with "
                "those of all experts; calibrate on more tokens",
                stacklevel=4,
            )


_NAMED = 4  # experts that a warning names, those with the fewest tokens


def _check_values(w: Array, sound: Bool[Array, ""], path: str, sums: Sums) -> None:
    if not bool(sound):
        raise ValueError(f"{path}: weights are not finite (NaN or infinity)")
    if not bool(finite(sums)):
        raise ValueError(
            f"{path}: statistics are not finite; check the calibration data (NaN, or numbers whose "
            f"squares float32 cannot hold)"
        )


def _restored(kept: dict[str, Array]) -> tuple[Arrays, Report]:
    """Return the arrays of a stored matrix, and its report."""
    report = Report(*(kept.pop(f"report.{f}") for f in Report._fields))
    return by_kind(kept), report


@jax.jit
def _at(matrices: Array, i: int) -> Array:
    """Return matrix i, by one program for all of them."""
    return matrices[i]


@partial(jax.jit, static_argnums=0)
def _stacked(batch: tuple[int, ...], *parts: Arrays) -> Arrays:
    """Return the arrays of all matrices. They are copies: weights of a tree share no buffers."""
    stacked = lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape)
    return jax.tree.map(stacked, *parts)


def _nan_unless(sound: Bool[Array, ""], arrays: Arrays) -> Arrays:
    """Return the arrays, or if not `sound`, NaN for floats and 0 for codes, which decode to NaN."""
    nothing = lambda a: jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 0
    return jax.tree.map(lambda a: jnp.where(sound, a, jnp.asarray(nothing(a), a.dtype)), arrays)
