"""Allocation of methods to the weights of a model of which one layer is in memory at a time.

Every kind of weight (queries, keys, ...) is a stack of matrices that get one method. Three things
are measured: the loss of the methods on a matrix in the middle of the stack, in a visit of that
layer; each stack rounded by itself, in a visit of all layers; and, in a pass forward, the distance
between the outputs of the model and those of the model with one stack rounded.
"""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, PyTree

import jaxquant as jq
from jaxquant.core.paths import replace_leaves
from jaxquant.durable.store import Folder
from jaxquant.evaluation import ByChunk, evaluate
from jaxquant.ptq.allocation import sampled
from jaxquant.ptq.quantize import importance
from jaxquant.ptq.round_stacked import Sums, planned
from jaxquant.recipes.recipe import WeightEntry
from jaxquant.storage.checkpoint import load
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers.checkpoint import layer_is_saved, save_layer
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.layerwise import LayerwiseJob
from jaxquant_models.runs.measuring import return_freed_memory_at_once
from jaxquant_models.runs.needs import needs_of
from jaxquant_models.runs.passes import embedded, functions, pushed, read_ahead
from jaxquant_models.runs.quantization import Quantized, plan_model
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter, Step
from jaxquant_models.runs.visits import LAYERS, Known, Visits, by_input

ALONE = "alone"  # directory of the layers in which each stack is rounded by itself
ORIGINAL = "original"  # stands for the model in which nothing is rounded
# Names of what is kept.
RATES, DISTANCES, STATES = (
    f"allocation: {what}" for what in ("rates", "distances", "states before layer")
)


@dataclasses.dataclass(eq=False)
class AllocatingJob:
    """Allocation, and then quantization by the recipe that it found; both can be resumed.

    Attributes:
      request: the request, which has no recipe but choices.
      visits: the layers of the model to quantize, and their statistics.
      judged: the sequences on which models are compared, int [N, t].
      finished: what has been done, including by earlier runs of the same job.
      reporter: receives reports of the work.
      training: as in `LayerwiseJob`.
    """

    request: QuantizationRequest
    visits: Visits
    judged: np.ndarray
    finished: Folder
    reporter: Reporter
    training: np.ndarray

    def __post_init__(self) -> None:
        outline, request = self.visits.source.outline, self.request
        self._choices = choices_of(request, outline)
        self._nearest = {e.path: e.method for e in self._choices.nearest(request.target_bits)}
        self._layers = range(outline.config.n_layers)
        self._place = self.finished.directory(ALONE)
        self._run = functions(outline.config, jnp.dtype(outline.dtype))

    def run(self) -> Quantized:
        """Run what is not finished, and return the model, its layers being in directories."""
        return_freed_memory_at_once()
        losses = self._losses()
        self._plan_rates()
        self._round_alone()
        distances = self._distances()
        with self.reporter.stage("allocating", sum(map(len, self._choices.weights))) as step:
            allocation = self._choices.allocated(
                self.request.target_bits,
                lambda entry: losses[_name(entry)],
                lambda entry: distances[entry.path],
                step,
            )
        self.reporter.tell(str(allocation))
        recipe = allocation.recipe
        needs = needs_of(dataclasses.replace(self.request, recipe=recipe))
        plan = plan_model(self.visits.source.outline, recipe)
        visits = self.visits.narrowed(needs)
        return LayerwiseJob(
            self.request, visits, plan, recipe, self.finished, self.reporter, self.training
        ).run()

    def _losses(self) -> dict[str, float]:
        """Return the losses of the methods that are measured, by entry."""
        entries = [*self._choices.measured(), *self._choices.nearest(self.request.target_bits)]
        names = {_name(entry): entry for entry in entries}
        todo = {name: entry for name, entry in names.items() if name not in self.finished}
        if todo:
            self.visits.begin(self.reporter)
            outputs = dict.fromkeys(e.path for e in todo.values() if e.method.needs_output)
            with self.reporter.stage("measuring", len(todo)) as step:
                middle = sampled(len(self._layers))
                for i, layer, stats in self.visits.layers(middle, list(outputs)):
                    self._measure(i, layer, stats, list(todo.values()), step)
            self._forget_gradients()
        return {name: float(self.finished[name]["loss"]) for name in names}

    def _measure(
        self, i: int, layer: PyTree, stats: jq.Stats | None, todo: list[WeightEntry], step: Step
    ) -> None:
        """Measure the losses of methods on the weights of one layer, for all layers."""
        for path, tree, known in self._alone(layer, stats, [entry.path for entry in todo]):
            for entry in todo:
                if entry.path != path:
                    continue
                rule = jq.Recipe([(path, entry.method)])
                packed = jq.quantize(tree, rule, known, key=self.request.key, first=i)
                w, q = (dict(jq.core.path_leaves(of))[path] for of in (tree, packed))
                of_layer = dataclasses.replace(entry, shape=(1, *entry.shape[1:]))
                sums = Sums.measured(path, known).matrices(of_layer)
                loss = float(_energy(w, q, sums)) * len(self._layers)
                self.finished[_name(entry)] = {"loss": np.float64(loss)}
                step(entry)

    def _plan_rates(self) -> None:
        """Plan the rates of formats that do so over all layers, in a visit of its own."""
        plans = [path for path, method in self._nearest.items() if method.format.plans]
        if not plans:
            return
        if RATES not in self.finished:
            found = dict[str, Any].fromkeys(plans, 0)
            self.visits.begin(self.reporter)
            with self.reporter.stage("planning", len(self._layers)) as step:
                for i, layer, stats in self.visits.layers(self._layers, self._outputs):
                    one = self._importance(i, layer, stats, plans)
                    found |= {path: found[path] + blocks for path, blocks in one.items()}
                    del layer, stats  # before the next ones
                    step(i)
            self._forget_gradients()
            self.finished[RATES] = found
        for path, blocks in self.finished[RATES].items():
            self._nearest[path] = planned(self._nearest[path], blocks)

    def _importance(
        self, i: int, layer: PyTree, stats: jq.Stats | None, plans: list[str]
    ) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for path, tree, known in self._alone(layer, stats, plans):
            rule = jq.Recipe([(path, self._nearest[path])])
            found |= importance(tree, rule, known, key=self.request.key, first=i)
        return found

    def _round_alone(self) -> None:
        """Round every stack by its method nearest to the target, and keep the result."""
        todo = [i for i in self._layers if not layer_is_saved(self._place / str(i))]
        if DISTANCES in self.finished or not todo:
            return
        self.visits.begin(self.reporter)
        total = len(self._layers) * len(self._nearest)
        count = itertools.count(1 + total - len(todo) * len(self._nearest))
        with self.reporter.stage("rounding alone", total) as step:
            told = lambda done: step(dataclasses.replace(done, index=next(count), total=total))
            for i, layer, stats in self.visits.layers(todo, self._outputs):
                self._round(i, layer, stats, told)
                del layer, stats  # before the next ones
        self._forget_gradients()

    def _round(self, i: int, layer: PyTree, stats: jq.Stats | None, told: Step) -> None:
        """Round every weight of a layer by itself, and write them."""
        packed: dict[str, Any] = {}
        for path, tree, known in self._alone(layer, stats, list(self._nearest)):
            rule = jq.Recipe([(path, self._nearest[path])])
            done = jq.quantize(
                tree, rule, known, key=self.request.key, progress=told, first=i
            )  # fmt: skip
            packed |= jq.core.path_leaves(done[LAYERS])
        layer = traverse_util.unflatten_dict(packed, sep="/")
        save_layer(self._place / str(i), layer, self.request.lossless)

    def _alone(
        self, layer: dict[str, PyTree], stats: jq.Stats | None, paths: list[str]
    ) -> Iterator[tuple[str, PyTree, jq.Stats]]:
        """Yield (path, tree, statistics) of each of these weights of a layer by itself.

        Layer and statistics are emptied; weights of wide inputs come last.
        """
        for module, known in self.visits.modules(layer, stats):
            held = [{LAYERS: module}]
            keep = jq.Recipe([(path, jq.KEEP) for path, _ in jq.core.path_leaves(held[0])])
            del module
            for part, _, its in by_input(held.pop(), keep, known or {}):
                leaves = dict(jq.core.path_leaves(part))
                del part
                for path in [path for path in leaves if path in paths]:
                    tree = traverse_util.unflatten_dict({path: leaves.pop(path)}, sep="/")
                    yield path, tree, _of(its, path)

    def _distances(self) -> dict[str, float]:
        """Return the distance of the model with one stack rounded, by its path."""
        if DISTANCES not in self.finished:
            states, outer = self._states(), self.visits.source.outer()
            logits = lambda params, _: self._run.head(params["outer"], params["h"])

            def ran(name: str) -> tuple[Callable, ByChunk]:
                return logits, ByChunk(lambda i: {"outer": outer, "h": states[name][i][None]})

            found = {}
            with self.reporter.stage("comparing", len(self._nearest)) as step:
                for path in self._nearest:
                    score = evaluate(*ran(path), self.judged, against=ran(ORIGINAL))
                    found[path] = np.float64(score.kl)
                    step(path)
            self.finished[DISTANCES] = found
        for i in range(len(self._layers) + 1):
            with contextlib.suppress(KeyError):
                del self.finished[f"{STATES} {i}"]
        shutil.rmtree(self._place, ignore_errors=True)
        return {path: float(kl) for path, kl in self.finished[DISTANCES].items()}

    def _states(self) -> dict[str, np.ndarray]:
        """Return the outputs [N, t, d] of the last layer: of the model, and with a stack rounded.

        They are kept after every layer, so that a run that was killed goes on there.
        """
        names, place = [ORIGINAL, *self._nearest], lambda i: f"{STATES} {i}"
        begin = next((i for i in reversed(self._layers) if place(i + 1) in self.finished), -1) + 1
        if begin:
            states = dict(self.finished[place(begin)])
        else:
            outer = self.visits.source.outer()
            tokens = [jnp.asarray(sequence)[None] for sequence in self.judged]
            first = np.concatenate([embedded(self._run, outer, t) for t in tokens])
            states = dict.fromkeys(names, first)
            del outer
        with self.reporter.stage("running each", len(self._layers) - begin) as step:
            for i, layer in read_ahead(self.visits.source, self._layers[begin:]):
                rounded = dict(jq.core.path_leaves(load(self._place / str(i))))
                for name in names:
                    states[name] = self._through(layer, rounded, name, states[name])
                self.finished.put(place(i + 1), states, sync=False)
                with contextlib.suppress(KeyError):
                    del self.finished[place(i)]
                del layer  # before the next one is read
                step(i)
        return states

    def _through(
        self, layer: PyTree, rounded: dict[str, Any], name: str, states: np.ndarray
    ) -> np.ndarray:
        """Return the hidden states after a layer, with one of its weights rounded if so named."""
        if name != ORIGINAL:
            path = name.removeprefix(f"{LAYERS}/")
            layer = replace_leaves(layer, {path: rounded[path].dequantize()})
        return np.concatenate([pushed(self._run, layer, jnp.asarray(h)[None]) for h in states])

    @property
    def _outputs(self) -> list[str]:
        """The weights that need output-side statistics."""
        return [path for path, method in self._nearest.items() if method.needs_output]

    def _forget_gradients(self) -> None:
        """Drop the gradients of a visit, so that the next one begins at the last layer again."""
        if self.visits.passes is not None:
            self.visits.passes.forget("gradient", range(len(self._layers) + 1))


def choices_of(request: QuantizationRequest, outline: Model) -> jq.ptq.Choices:
    """Return the methods that the weights of the layers can get.

    Args:
      request: the request.
      outline: the model, with shapes in place of arrays.
    """
    return jq.ptq.Choices.of(
        outline.params, request.choices, outline.sites(), paths=[LAYER_MATRICES],
        healed=request.heals,
    )  # fmt: skip


def _name(entry: WeightEntry) -> str:
    """Return the name under which the loss of a weight by a method is kept."""
    return f"allocation: loss of {entry.path} by {entry.method}"


def _of(known: Known, path: str) -> jq.Stats:
    """Return the statistics of one weight."""
    if not isinstance(known, jq.Stats):
        raise ValueError("an allocation needs calibration sequences")
    holder = known.holder[path]
    return jq.Stats({path: known.sites[path]}, {holder: known.sums[holder]}, {path: holder})


@jax.jit  # one program, which holds no more than it needs at a time
def _energy(w: Array, q: jq.QTensor, sums: Sums) -> Array:
    """Return tr(E^T H E) / n, summed over the experts of a layer; see `jaxquant.ptq.allocate`."""
    errors = (w - q.dequantize()).reshape(-1, *w.shape[-2:])

    def of(i: Array) -> Array:
        error, gram = errors[i], sums.moments(i).input
        return jnp.sum(error * (error.T @ gram).T) / error.shape[1]

    return jnp.sum(jax.lax.map(of, jnp.arange(len(errors))))
