"""The driver: params, recipe, statistics -> params."""

import dataclasses
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxquant.calibration.statistics import Stats, seen
from jaxquant.core.activations import Activations
from jaxquant.core.arguments import check_arguments, differentiated
from jaxquant.core.keys import Draw
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.sites import Site, is_weight
from jaxquant.core.standin import is_standin
from jaxquant.core.tensor import Arrays, QTensor, by_kind, flat_names
from jaxquant.durable.store import Finished
from jaxquant.methods.registry import Method
from jaxquant.ptq.round_matrix import Keys, Report, block_importance, round_matrix
from jaxquant.ptq.shared_transforms import Inputs, Inspection, Member
from jaxquant.recipes.recipe import Entry, Recipe, leaf_bytes, resolve
from jaxquant.rounding import Moments

MARK = "report.of"  # the digest among what is finished


@dataclasses.dataclass(frozen=True)
class Done:
    """Report on one quantized matrix.

    Attributes:
      path: of the leaf, and of a matrix in a stack its index: "layers/up/kernel[3]".
      index, total: which of how many matrices.
      loss: share of the output's energy that the error took, tr(E^T H E) / tr(W^T H W); NaN where
        feedback knew of no input.
      damping: fraction of mean(diag H) that was added; 0 without feedback.
      dead: input channels that calibration never saw active.
      seconds: it took; 0 if an earlier run had done it.
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


def quantize(
    params: Any,
    recipe: Recipe | Method,
    stats: Stats | Mapping[str, Site] | None = None,
    *,
    key: Array | None = None,
    inspect: Inspection | None = None,
    transforms: Mapping[tuple[str, int], dict[str, Array]] | None = None,
    progress: Callable[[Done], None] | None = None,
    finished: Finished | None = None,
) -> Any:
    """The same tree with `QTensor` leaves where the recipe says so.

    Args:
      params: tree of floating arrays.
      recipe: a `Recipe`, or one method for every weight the function contracts.
      stats: `calibrate`'s result; or `sites`' result; or None (the last axis is the output).
      key: randomness of methods that need it (rotations, k-means), a `jax.random.key`, no number;
        default `jax.random.key(0)`.
      inspect: what judges the candidates of a transform that is searched for, in place of the
        products' error; see `inputs.Inspection`.
      transforms: arrays of input transforms that are known already: from `learn`, `learn_blocks`.
      progress: called with `Done` after each matrix.
      finished: by matrix, its packed arrays and those of its `Report`, "report.loss" and so on,
        and a digest of its weights, second moments, method and key: of others it is not taken.
        What is in it is not done again, what is done is put in it. A mapping that lives on disk
        (`resume.Folder`) makes a long run resumable.
    Raises:
      ValueError: the recipe does not resolve, weights are not finite, or a method needs
        statistics that are missing. Before any compute, but for the check of the weights. And if
        the result for a matrix is not finite.
    Warns:
      where the damping had to be raised.

    Under `jax.jit` and `jax.vmap` there are no values to look at: weights or statistics that are
    not finite give NaN, and so do rates planned from values (`trellis`), which need a call outside.
    `jax.eval_shape` gives the shapes of all.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize({"w": jnp.ones((64, 32)), "b": jnp.zeros(8)}, jq.rtn(bits=4))
    >>> q["w"].bits_per_weight, q["b"].shape
    (4.3125, (8,))
    """
    check_arguments(quantize, locals())
    _check_not_differentiated(params)
    found = stats.sites if isinstance(stats, Stats) else stats
    plan = resolve(recipe, params, found)
    todo = [Member(e, e.method) for e in plan.entries if isinstance(e.method, Method)]
    for entry, method in todo:
        _check_statistics(entry.path, method, stats)
    draw = Draw.of(key)
    report = _Progress(sum(math.prod(e.matrix[:-2]) for e, _ in todo), progress)
    leaves = dict(path_leaves(params))
    known = stats if isinstance(stats, Stats) else None
    inputs = Inputs.of(todo, found, leaves, known, inspect, transforms)
    new = {}
    for entry, method in todo:
        moments = _moments(entry.path, method, stats)
        job = _Job(entry, method, draw, inputs, finished)
        new[entry.path] = job.run(leaves[entry.path], moments, report)
    return replace_leaves(params, new)


def quantize_array(
    w: Float[Array, "k n"],
    method: Method,
    gram: Float[Array, "k k"] | None = None,
    *,
    output_gram: Float[Array, "n n"] | None = None,
    inputs: Float[Array, "t k"] | None = None,
    key: Array | None = None,
) -> QTensor:
    """One matrix, y = x @ w.

    Args:
      w: [k, n], floating.
      method: from `rtn`, `gptq`, ...
      gram: [k, k] mean of x x^T; required by methods with feedback. By default that of `inputs`.
      output_gram: [n, n] mean of g g^T, g the loss gradient at y; required by two-sided ones.
      inputs: rows x; required by methods that fit transforms or scales to activations.
      key: randomness of methods that need it; default `jax.random.key(0)`.
    Raises:
      ValueError: shapes disagree, values are not finite, the group size does not divide k.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> jq.quantize_array(jnp.ones((64, 32)), jq.rtn(bits=2, group_size=32)).bits_per_weight
    2.5625
    """
    check_arguments(quantize_array, locals())
    if w.ndim != 2:
        raise ValueError(f"expected a matrix [k, n], got shape {w.shape}")
    _check_not_differentiated(w)
    stats = None
    if inputs is not None:
        if inputs.ndim != 2 or inputs.shape[1] != w.shape[0]:
            raise ValueError(f"inputs must be [t, {w.shape[0]}], got {list(inputs.shape)}")
        stats = seen(inputs.astype(jnp.float32), w.shape[1])
        gram = stats.gram("w") if gram is None else gram
    elif method.needs_channels or method.needs_sample:
        raise ValueError(f"method {method.name!r} needs inputs=, [t, {w.shape[0]}]")
    needs = {"gram": method.needs_gram, "output_gram": method.needs_output}
    for name, given, size in (("gram", gram, w.shape[0]), ("output_gram", output_gram, w.shape[1])):
        if needs[name] and given is None:
            raise ValueError(f"method {method.name!r} needs {name}=, [{size}] squared")
        if given is not None and given.shape != (size, size):
            raise ValueError(f"{name} must be [{size}, {size}], got {list(given.shape)}")
    (entry,) = resolve(method, {"w": w}).entries
    moments = Moments(gram, output_gram)
    shared = Inputs.of([Member(entry, method)], None, {"w": w}, stats)
    job = _Job(entry, method, Draw.of(key), shared, {})
    return job.run(w, moments, _Progress(1, None))


def _check_not_differentiated(params: Any) -> None:
    if any(differentiated(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "quantizing has no gradient: train with jaxquant.qat or jaxquant.latent, which round "
            "in every step, or differentiate jaxquant.quantized(fn) in its other arguments"
        )


def _check_statistics(path: str, method: Method, stats: Stats | Mapping[str, Site] | None) -> None:
    needs = {
        "gram": method.needs_gram,
        "output": method.needs_output,
        "magnitude": method.needs_channels,
        "extreme": method.needs_sample,
    }
    if not any(needs.values()):
        return
    if not isinstance(stats, Stats):
        raise ValueError(
            f"method {method.name!r} for {path!r} needs statistics: pass the result of "
            f"calibrate(fn, params, batches)"
        )
    for name, needed in needs.items():
        if needed:
            stats.kept(path, name)


def _moments(path: str, method: Method, stats: Stats | Mapping[str, Site] | None) -> Moments:
    """What the rounder needs to know; made here, for one leaf at a time."""
    if not isinstance(stats, Stats):
        return Moments()
    return Moments(
        stats.gram(path) if method.needs_gram else None,
        stats.output_gram(path) if method.needs_output else None,
    )


class _Progress:
    """Counts matrices; tells the user's function."""

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
class _Job:
    """One leaf: its matrices, one after another through one compiled program."""

    entry: Entry
    method: Method
    draw: Draw
    inputs: Inputs
    finished: Finished | None

    def run(self, w: Array, moments: Moments, progress: _Progress) -> QTensor:
        entry, method = self.entry, self.method
        *batch, k, n = entry.matrix
        moments = self._matrices(moments)
        # Under eval_shape there are no values to judge; what is asked of jnp tells, not w's type.
        abstract = isinstance(jnp.isfinite(w), jax.core.Tracer)
        if not abstract:
            _check_values(w, entry.path, moments)
        matrices = entry.matrices(w)
        if not abstract:
            self._check_range(matrices)
        method = self._planned(matrices, moments, abstract)
        parts, reports = [], []
        for i, name in enumerate(self._names()):
            start, one = time.monotonic(), jax.tree.map(lambda a, i=i: a[i], moments)
            arrays, report, before = self._one(i, name, matrices[i], one, method, abstract)
            # Of an input that calibration never saw, nobody knows what is lost.
            report = report._replace(loss=jnp.where(report.dead == k, jnp.nan, report.loss))
            parts.append(arrays)
            reports.append(report)
            if not abstract:
                bits = 8 * sum(a.nbytes for a in jax.tree.leaves(arrays)) / (k * n)
                seconds = 0.0 if before else time.monotonic() - start
                progress.done(name, method.name, report, bits, seconds)
        if not abstract:
            self._warn(reports)
        stacked = lambda *a: jnp.stack(a).reshape(*batch, *a[0].shape)
        arrays = jax.tree.map(stacked, *parts)
        return QTensor(
            data=arrays.data,
            format=method.format,
            view=entry.form[0],
            logical_dtype=jnp.dtype(w.dtype).name,
            method=method.name,
            input=method.input,
            output=method.output,
            shared=self._shared(),
            activations=method.activations,
            input_data=arrays.input,
            output_data=arrays.output,
            activations_data=arrays.activations,
        )

    def _check_range(self, matrices: Array) -> None:
        """ValueError where the format cannot hold such weights; a warning where it loses some."""
        for name, w in zip(self._names(), matrices, strict=True):
            try:
                found = self.method.format.check(self.method.magnitudes(w))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if found:
                warnings.warn(f"{name}: {found}", stacklevel=5)

    def _planned(self, matrices: Array, moments: Moments, abstract: bool) -> Method:
        """The method, its format's rates (if it has any to give) chosen for these matrices."""
        format = self.method.format
        if not format.plans:
            return self.method
        k = self.method.stored(*matrices.shape[1:])[0]
        importance = np.full(k // format.block, float(abstract))
        for i, w in enumerate(() if abstract else matrices):
            one = jax.tree.map(lambda a, i=i: a[i], moments)
            keys, known = self._keys(i), self._known(i).input or None
            one, e = block_importance(w, one, keys, self.method, format.block, known)
            importance += np.ldexp(np.asarray(one, np.float64), int(e))
        return dataclasses.replace(self.method, format=format.planned(importance))

    def _one(
        self, i: int, name: str, w: Array, moments: Moments, method: Method, abstract: bool
    ) -> tuple[Arrays, Report, bool]:
        """Arrays, report, and whether these were finished before."""
        finished = None if abstract else self.finished
        mark = b"" if finished is None else self._mark(w, moments, method)
        kept = dict(finished.get(name, {})) if finished is not None else {}
        if kept and np.asarray(kept.pop(MARK, ())).tobytes() == mark:
            stored = {key: jnp.asarray(a) for key, a in kept.items()}
            report = Report(*(stored.pop(f"report.{f}") for f in Report._fields))
            return by_kind(stored), report, True
        known = self._known(i)
        arrays, report = round_matrix(w, moments, self._keys(i), method, known.input or None)
        arrays = arrays._replace(activations=known.activations)
        if abstract:
            # What was planned without values is no result, and nobody has looked at the weights.
            planned = method is not self.method
            sound = jnp.logical_and(not planned, _finite((w, moments, known)))
            return _nan_unless(sound, arrays), report, False
        arrays, report = jax.block_until_ready((arrays, report))
        self._check_result(name, arrays, report)
        if finished is not None:
            reports = {f"report.{field}": a for field, a in report._asdict().items()}
            named = flat_names(arrays)
            if taken := sorted(named.keys() & {*reports, MARK}):
                raise ValueError(f"{name}: the format names an array {taken[0]!r}, which is taken")
            finished[name] = {**named, **reports, MARK: np.frombuffer(mark, np.uint8)}
        return arrays, report, False

    def _mark(self, w: Array, moments: Moments, method: Method) -> bytes:
        """A digest of what decides the result: what is finished of another matrix is not taken."""
        digest = hashlib.blake2b(f"{method}{self.draw.name}".encode(), digest_size=16)
        for a in (w, *jax.tree.leaves(moments)):
            digest.update(np.asarray(a).tobytes())
        return digest.digest()

    def _check_result(self, name: str, arrays: Arrays, report: Report) -> None:
        """ValueError if the matrix holds NaN or infinity; the loss tells, and where it may not."""
        stored = self.method.stored(*self.entry.matrix[-2:])[0]
        if bool(_finite((arrays, report.loss))):
            return
        decoded = self.method.format.dequantize(arrays.data, stored)
        if not bool(_finite((arrays, decoded))):
            raise ValueError(
                f"{name}: {self.method.name} made a matrix of finite weights into one that is not "
                f"finite (NaN or infinity); use another method or more bits, or rescale the weights"
            )

    def _known(self, i: int) -> Arrays:
        """Arrays that the weights of this input share."""
        return by_kind(self.inputs.arrays(self.entry.path, i, self._keys(i).input) or {})

    def _names(self) -> Iterator[str]:
        batch = self.entry.matrix[:-2]
        for index in np.ndindex(*batch):
            yield f"{self.entry.path}[{', '.join(map(str, index))}]" if batch else self.entry.path

    def _keys(self, i: int) -> Keys:
        return Keys(self.draw.of_input(self._input, i), self.draw.of_matrix(self.entry.path, i))

    @property
    def _input(self) -> str:
        return self.inputs.leader[self.entry.path]

    def _shared(self) -> str:
        """A name that two weights have in common only if they read one input, transformed alike."""
        side = self.method.input
        if side is not None and (side.fitted or not self.draw.name):
            return ""
        return f"{self._input} {list(self.entry.matrix[:-2])} {self.draw.name}"

    def _matrices(self, moments: Moments) -> Moments:
        """Moments with the batch axes as one; ValueError if they are of another tree."""
        *batch, k, n = self.entry.matrix
        for gram, size in zip(moments, (k, n), strict=True):
            if gram is not None and gram.shape != (*batch, size, size):
                raise ValueError(
                    f"{self.entry.path}: statistics of shape {list(gram.shape)}, expected "
                    f"{[*batch, size, size]}; calibrate the function that uses this tree"
                )
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), moments)

    def _warn(self, reports: list[Report]) -> None:
        path, k = self.entry.path, self.entry.matrix[-2]
        starved = [name for name, r in zip(self._names(), reports, strict=True) if int(r.dead) == k]
        if starved:
            named = path if len(starved) == len(reports) else ", ".join(starved)
            warnings.warn(
                f"{named}: the statistics are zero throughout; rounded to nearest", stacklevel=4
            )
        wanted = self.method.rounder.damping
        damping = max(float(r.damping) for r in reports)
        if damping > 1.5 * wanted:
            warnings.warn(
                f"{path}: the second moment is not positive definite; damping was raised from "
                f"{wanted:g} to {damping:g} of its mean diagonal",
                stacklevel=4,
            )


def _check_values(w: Array, path: str, moments: Moments) -> None:
    mesh = getattr(w.sharding, "mesh", None) if isinstance(w, jax.Array) else None
    if jax.sharding.AxisType.Explicit in getattr(mesh, "axis_types", ()):
        raise ValueError(
            f"{path} lies on a mesh with Explicit axes; quantize on one with Auto axes: "
            f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))"
        )
    if not bool(jnp.all(jnp.isfinite(w))):
        raise ValueError(f"{path}: weights are not finite (NaN or infinity)")
    if not all(bool(jnp.all(jnp.isfinite(m))) for m in moments if m is not None):
        raise ValueError(
            f"{path}: statistics are not finite; check the calibration data (NaN, or numbers whose "
            f"squares float32 cannot hold)"
        )


@jax.jit
def _finite(arrays: Any) -> Bool[Array, ""]:
    """Whether all floating numbers of a tree are finite."""
    floats = [a for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a.astype(jnp.float32))) for a in floats]))


def _nan_unless(sound: Bool[Array, ""], arrays: Arrays) -> Arrays:
    """The arrays, or NaN for floating numbers and zeros for codes: then all weights are NaN."""
    nothing = lambda a: jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 0
    return jax.tree.map(lambda a: jnp.where(sound, a, jnp.asarray(nothing(a), a.dtype)), arrays)


def bits_per_weight(params: Any) -> float:
    """Bits per weight over the quantized leaves, every byte counted.

    Of a tree with none, over the leaves that could be quantized (0 if there are none of them).

    >>> import jax.numpy as jnp
    >>> bits_per_weight({"w": jnp.ones((4, 4), jnp.bfloat16), "b": jnp.ones(4)})
    16.0
    """
    leaves = [w for _, w in path_leaves(params)]
    chosen = [w for w in leaves if is_standin(w)] or [w for w in leaves if is_weight(w)]
    size = sum(w.size for w in chosen)
    return 8 * sum(map(leaf_bytes, chosen)) / max(1, size)


def dequantize(params: Any) -> Any:
    """The same tree with plain arrays."""
    return jax.tree.map(
        lambda w: w.dequantize() if is_standin(w) else w, params, is_leaf=is_standin
    )


def with_activations(params: Any, activations: Activations | str | None) -> Any:
    """The same tree, its packed weights meeting inputs in another form; the weights are the same.

    Args:
      activations: an `Activations` or its text: "int8" (a scale per token), "int4,asymmetric", ...;
        None or "float": inputs as they are.
    Raises:
      ValueError: an unknown form; or static scales, which calibration finds: name these in the
        method, and `quantize` with statistics.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = with_activations({"w": jq.quantize_array(jnp.eye(64), jq.rtn())}, "int8")
    >>> str(q["w"].activations)
    'int8'
    """
    check_arguments(with_activations, locals())
    form = Activations.of(activations)

    def change(w: Any) -> Any:
        if not isinstance(w, QTensor):
            return w
        if form is not None and set(form.shapes()) - set(w.activations_data):
            raise ValueError(
                f"{form}: static scales come from calibration; give activations={str(form)!r} to "
                f"the method, and statistics to quantize"
            )
        return dataclasses.replace(w, activations=form)

    return jax.tree.map(change, params, is_leaf=is_standin)
