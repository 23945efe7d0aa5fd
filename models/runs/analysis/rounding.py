"""All quantized versions of a model in one visit of its layers, which share their statistics."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import jaxquant as jq
from jaxquant.core.tree import leaf_bytes
from jaxquant.durable.store import Folder
from jaxquant.storage import outline
from jaxquant.storage.checkpoint import load
from jaxquant_models.readers.checkpoint import layer_is_saved
from jaxquant_models.runs.analysis.names import kind_of
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.analysis.variants import Variant
from jaxquant_models.runs.layerwise import LayerwiseJob
from jaxquant_models.runs.needs import Needs, needs_of
from jaxquant_models.runs.quantization import plan_model
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.runs.sequences import context_length, first_tokens, token_sequences
from jaxquant_models.runs.visits import LAYERS, Visits

Stats = jq.Stats | None


@dataclasses.dataclass(eq=False)
class Rounded:
    """The versions of a model, whose layers are in directories.

    Attributes:
      subjects: the models and the text.
      variants: the versions.
      jobs: the job of each version.
      outer: the parameters outside of the layers, as checkpoints store them.
      finished: the store.
    """

    subjects: Subjects
    variants: Sequence[Variant]
    jobs: Sequence[LayerwiseJob]
    outer: PyTree
    finished: Folder

    def layer(self, n: int, i: int) -> dict[str, Any]:
        """Return the leaves of layer i of version n by path within the layer."""
        return dict(jq.core.path_leaves(load(self._place(n, i))))

    def _place(self, n: int, i: int) -> Path:
        return self.finished.directory(self.jobs[n].place) / str(i)

    def bytes(self, n: int) -> dict[str, int]:
        """Return the bytes of every stack of version n, by path."""
        found: dict[str, int] = {}
        for i in range(self._layers):
            for path, w in jq.core.path_leaves(outline(self._place(n, i))):
                name = f"{LAYERS}/{path}"
                found[name] = found.get(name, 0) + leaf_bytes(w)
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each stack that is quantized, by path."""
        return {e.path: e.size for e in self.jobs[0].plan.weights}

    @property
    def outer_bytes(self) -> int:
        """Bytes of the parameters outside of the layers."""
        return sum(leaf_bytes(w) for _, w in jq.core.path_leaves(self.outer))

    def dense(self, choice: Callable[[str], int], outer: PyTree = None) -> PyTree:
        """Return dequantized parameters in which each stack comes from one of the versions.

        Args:
          choice: function from the path of a stack to the number of a version.
          outer: the parameters outside of the layers. Default: those that are not quantized.
        """
        reference = self.subjects.dense[1]
        dtype = self.subjects.model.dtype
        shapes = dict(jq.core.path_leaves(reference[LAYERS]))
        stacks = {p: np.empty(w.shape, jnp.dtype(dtype)) for p, w in shapes.items()}
        chosen = {path: choice(f"{LAYERS}/{path}") for path in stacks}
        for n in sorted(set(chosen.values())):
            for i in range(self._layers):
                for path, w in self.layer(n, i).items():
                    if chosen[path] == n:
                        stacks[path][i] = np.asarray(jq.dequantize({"w": w})["w"])[0]
        # As in a checkpoint, what is outside of the layers has been rounded to float16.
        plain = jq.dequantize(self.outer if outer is None else outer)
        outer = jax.tree.map(lambda w: w.astype(dtype), plain)
        layers = jax.tree.map(lambda w: w, reference[LAYERS])
        flat = jax.tree_util.tree_flatten_with_path(layers)
        names = ["/".join(str(k.key) for k in path) for path, _ in flat[0]]
        filled = jax.tree.unflatten(flat[1], [jnp.asarray(stacks.pop(name)) for name in names])
        return {**outer, LAYERS: filled}

    @property
    def _layers(self) -> int:
        return self.subjects.model.config.n_layers


def round_all(
    subjects: Subjects, variants: Sequence[Variant], finished: Folder, reporter: Reporter
) -> Rounded:
    """Make all versions; layers that earlier runs have made are not made again.

    Args:
      subjects: the models and the text; there is a reference.
      variants: the versions.
      finished: the store, which gets the layers and the errors (`errors_of`).
      reporter: receives reports of the work.
    """
    source, model = subjects.source, subjects.source.outline
    needs = _together([needs_of(v.request) for v in variants])
    cut = token_sequences(model, subjects.calibration, context_length(model))
    tokens = first_tokens(cut, subjects.request.size.calibration_tokens)
    visits = Visits(source, needs, "gradient", tokens, finished)
    jobs = [_job(visits, variant, n, finished, reporter) for n, variant in enumerate(variants)]
    layers = range(model.config.n_layers)
    left = {i: [job for job in jobs if not _is_done(job, i, finished)] for i in layers}
    todo = [i for i in layers if left[i] or _key(i) not in finished]
    if todo:
        visits.begin(reporter)
    with reporter.stage("quantizing", len(layers) * len(jobs)) as step:
        for _ in range(len(layers) * len(jobs) - sum(map(len, left.values()))):
            step(None)
        for i, layer, stats in visits.layers(todo):
            finished[_key(i)] = _errors(subjects, i, layer, stats)
            for job in left[i]:
                _one(job, i, layer, stats, finished)
                step(None)
    return Rounded(subjects, variants, jobs, jobs[0].outer(lambda _: None).params, finished)


def _one(job: LayerwiseJob, i: int, layer: PyTree, stats: Stats, finished: Folder) -> None:
    """Quantize a layer for one version, and keep the losses of its matrices."""
    lost: dict[str, np.float64] = {}

    def told(done: jq.ptq.Done) -> None:
        lost[done.path.partition("[")[0]] = np.float64(done.loss)

    needs = needs_of(job.request)
    own = None
    if needs.statistics and stats is not None:  # which the job empties
        own = dataclasses.replace(stats, sums=dict(stats.sums))
    job.quantize_layer(i, dict(layer), own, told)
    finished[_lost(job, i)] = lost


def _is_done(job: LayerwiseJob, i: int, finished: Folder) -> bool:
    return layer_is_saved(finished.directory(job.place) / str(i)) and _lost(job, i) in finished


def _lost(job: LayerwiseJob, i: int) -> str:
    return f"{job.place} losses of layer {i}"


def _job(
    visits: Visits, variant: Variant, n: int, finished: Folder, reporter: Reporter
) -> LayerwiseJob:
    recipe = variant.request.recipe
    if recipe is None:
        raise ValueError(f"{variant.name} has no recipe")
    plan = plan_model(visits.source.outline, recipe)
    none = np.empty((0, 0), np.int32)
    place = f"version-{n}"
    return LayerwiseJob(variant.request, visits, plan, recipe, finished, reporter, none, place)


def _together(needs: Sequence[Needs]) -> Needs:
    """Return what all of them require."""
    return Needs(
        statistics=True,
        gram=True,  # by which the errors of outputs are measured
        channels=any(n.channels for n in needs),
        output=tuple(dict.fromkeys(path for n in needs for path in n.output)),
        sample=max(n.sample for n in needs),
        module_loss=any(n.module_loss for n in needs),
    )


def _key(i: int) -> str:
    return f"analysis: errors of layer {i}"


def _errors(subjects: Subjects, i: int, layer: PyTree, stats: Stats) -> dict[str, Any]:
    """Return, for each matrix of a layer, the energy of its outputs, and that of MODEL's error."""
    own = dict(jq.core.path_leaves(subjects.dense[0][LAYERS]))
    found: dict[str, Any] = {}
    for path, w in jq.core.path_leaves(layer):
        if stats is None or path not in stats.holder:
            continue
        gram = stats.gram(path)
        energy = _energy(w, gram)
        error = _energy(w - own[path][i : i + 1], gram) if subjects.against is not None else 0.0
        found[f"{LAYERS}/{path}"] = np.array([energy, error], np.float64)
    return found


@jax.jit
def _energy(w: Float[Array, "... k n"], gram: Float[Array, "... k k"]) -> Float[Array, ""]:
    """Return tr(W^T H W) / n, summed over the matrices."""
    return jnp.sum(w * jnp.matmul(gram, w)) / w.shape[-1]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of outputs, by path of the stack.

    Attributes:
      energy: tr(W^T H W) / n, summed over the stack.
      relative: of MODEL, the mean of tr(E^T H E) / tr(W^T H W).
      losses: for each version, tr(E^T H E) / n summed over the stack. Since H is weighted by
        gradients, it estimates the increase of the loss, up to a factor.
    """

    energy: Mapping[str, float]
    relative: Mapping[str, float]
    losses: Sequence[Mapping[str, float]]

    def kinds(self) -> list[str]:
        """Return the kinds of weights that have errors."""
        return [kind_of(path) for path in self.energy]


def errors_of(rounded: Rounded) -> Errors:
    """Return the errors that `round_all` has measured.

    Args:
      rounded: its result.
    """
    layers, finished = range(rounded.subjects.model.config.n_layers), rounded.finished
    by_layer = [finished[_key(i)] for i in layers]
    paths = list(by_layer[0])
    energy = {p: float(sum(of[p][0] for of in by_layer)) for p in paths}
    ratio = lambda pair: float(pair[1] / pair[0]) if pair[0] > 0 else 0.0
    relative = {p: float(np.mean([ratio(of[p]) for of in by_layer])) for p in paths}
    losses = []
    for job in rounded.jobs:
        lost = [finished[_lost(job, i)] for i in layers]
        of_path = lambda p, lost=lost: sum(
            float(np.nan_to_num(lost[i][p])) * float(by_layer[i][p][0]) for i in layers
        )
        losses.append({p: of_path(p) for p in paths if p in lost[0]})
    return Errors(energy, relative if rounded.subjects.against is not None else {}, losses)
