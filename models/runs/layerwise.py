"""Quantization of a model one layer at a time, each written when it is done.

Peak memory is at most

    max(two layers in float32 + twice the statistics of one layer,
        3/2 of embedding and output matrix in float32) + a constant below 1 GB,

whatever the number of layers. The statistics of a layer with gradient weighting are a float32
matrix [k, k] for each matrix [k, n] of it, and [n, n] more for methods that need the output side;
while those of a sequence are added to the sum, both are in memory. The constant holds the
libraries, the hidden states that are kept in memory (`passes.IN_MEMORY`; more go to files) and the
work on the largest matrix.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.ptq.quantize import importance
from jaxquant.ptq.round_stacked import planned
from jaxquant.tuning.heal import BLOCKS
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.invariances import folds
from jaxquant_models.readers.checkpoint import layer_is_saved, save_layer, storable
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.healing import heal_layers
from jaxquant_models.runs.measuring import return_freed_memory_at_once
from jaxquant_models.runs.module_loss import ModuleLoss
from jaxquant_models.runs.quantization import Quantized
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter, Step
from jaxquant_models.runs.visits import LAYERS, Known, Visits, by_input, stacked

RATES = "rates of"  # begins the keys under which the importance of blocks of rows is stored


@dataclasses.dataclass(eq=False)
class LayerwiseJob:
    """Quantization of a model one layer at a time; it can be killed at any moment and resumed.

    Attributes:
      request: the request; none of its steps needs the whole model.
      visits: the layers of the model to quantize, and their statistics.
      plan: what is made of every leaf.
      recipe: the recipe.
      finished: what has been done, including by earlier runs of the same job.
      reporter: receives reports of the work.
      training: the sequences on which layers are healed, int [N, t]; empty for no healing.
      place: name of the directory, in the store, that gets the quantized layers.
    """

    request: QuantizationRequest
    visits: Visits
    plan: jq.recipes.Plan
    recipe: jq.Recipe
    finished: Folder
    reporter: Reporter
    training: np.ndarray
    place: str = LAYERS

    def __post_init__(self) -> None:
        outline = self.visits.source.outline
        self._config, self._place = outline.config, self.finished.directory(self.place)
        resolved = jq.recipes.resolve(self.recipe, outline.params, outline.sites())
        self._methods = {e.path: e.method for e in resolved.entries}
        self._count = 0  # of matrices

    def run(self) -> Quantized:
        """Run what is not finished, and return the model, its layers being in directories."""
        return_freed_memory_at_once()
        layers = range(self._config.n_layers)
        todo = [i for i in layers if not layer_is_saved(self._place / str(i))]
        if len(todo) < len(layers):
            self.reporter.tell(
                f"{len(layers) - len(todo)} of {len(layers)} layers were done before"
            )
        if todo:
            self.visits.begin(self.reporter)
        if todo and any(e.method.format.plans for e in self.plan.weights if stacked(e.path)):
            self._plan_rates()
        with self.reporter.stage("quantizing", self.plan.matrices) as step:
            self._count = (len(layers) - len(todo)) * self._of_layer
            passes = self.visits.passes
            for i, layer, stats in self._visited(todo):
                self.quantize_layer(i, layer, stats, step)
                if passes is not None:
                    passes.forget("state", [i])
                    passes.forget("gradient", [i + 1])
            outer = self.outer(step)
        places = [self._place / str(i) for i in layers]
        return Quantized(outer, self.recipe, self._healed(outer, places))

    def _healed(self, outer: Model, places: list[Path]) -> list[Path]:
        """Return the directories of the layers, after healing them if requested."""
        if not len(self.training):
            return places
        with self.reporter.stage("healing", BLOCKS.steps * len(places)) as step:
            return heal_layers(
                self.visits.source, outer.params, places, self.training,
                self.finished.directory("healed"), progress=step, finished=self.finished,
                lossless=self.request.lossless,
            )  # fmt: skip

    @property
    def _of_layer(self) -> int:
        """The number of matrices of one layer."""
        return sum(e.count for e in self.plan.weights if stacked(e.path)) // self._config.n_layers

    def _outputs(self, of_layers: bool) -> list[str]:
        """Return the weights of the layers, or the others, that need output-side statistics."""
        methods = {p: m for p, m in self._methods.items() if isinstance(m, jq.Method)}
        return [p for p, m in methods.items() if m.needs_output and stacked(p) is of_layers]

    def _visited(self, todo: Sequence[int]) -> Iterator[tuple[int, PyTree, jq.Stats | None]]:
        """Yield (number, layer, statistics) of the layers to do, in the order of the visits."""
        yield from self.visits.layers(todo, self._outputs(True))

    def _folded(
        self, i: int, module: PyTree, stats: jq.Stats | None, inspect: ModuleLoss | None
    ) -> tuple[PyTree, jq.Recipe, Known]:
        """Return tree, recipe and statistics of a module after folding its input factors."""
        params = {LAYERS: module}
        paths = [path for path, _ in jq.core.path_leaves(params)]
        recipe = jq.Recipe(tuple((path, self._methods[path]) for path in paths))
        if stats is None or not _weights(recipe):
            return params, recipe, self.visits.sites
        return jq.ptq.fold(
            params, recipe, stats, folds(self._config),
            key=self.request.key, inspect=inspect, first=i,
        )  # fmt: skip

    def quantize_layer(
        self, i: int, layer: dict[str, PyTree], stats: jq.Stats | None, step: Step
    ) -> None:
        """Quantize a layer and write it; layer and statistics are emptied.

        Args:
          i: number of the layer.
          layer: its parameters.
          stats: its statistics, or None if the methods need none.
          step: called after each matrix.
        """
        inspect = self.visits.inspection(i, layer)
        names: list[str] = []

        def told(done: jq.ptq.Done) -> None:
            names.append(done.path)
            self._told(step, done)

        packed: dict[str, Any] = {}
        for module, its_stats in self.visits.modules(layer, stats):
            params, recipe, known = self._folded(i, module, its_stats, inspect)
            held = [params]  # emptied by the call, so that weights are freed input by input
            del module, its_stats, params
            for part, rules, its_known in by_input(held.pop(), recipe, known):
                if _weights(rules):
                    # Without statistics, rounding takes less time than to recognize what is done.
                    part = jq.quantize(
                        part, rules, its_known, key=self.request.key, inspect=inspect,
                        progress=told, finished=None if stats is None else self.finished, first=i,
                    )  # fmt: skip
                packed |= dict(jq.core.path_leaves(part[LAYERS]))
        whole = traverse_util.unflatten_dict(packed, sep="/")
        save_layer(self._place / str(i), whole, self.request.lossless)
        for name in names:
            self.finished.pop(name, None)

    def _told(self, step: Step, done: jq.ptq.Done) -> None:
        """Report a matrix as one of the whole model."""
        self._count += 1
        step(dataclasses.replace(done, index=self._count, total=self.plan.matrices))

    def _plan_rates(self) -> None:
        """Plan the rates of formats that do so over all layers, in a pass of its own."""
        found: dict[str, np.ndarray] = {}
        layers = range(self._config.n_layers)
        if f"{RATES} all" not in self.finished:
            with self.reporter.stage("planning", len(layers)) as step:
                for i, layer, stats in self._visited(layers):
                    one = self._importance(i, layer, stats)
                    found |= {path: found.get(path, 0) + a for path, a in one.items()}
                    del layer, stats  # before the next ones
                    step(i)
            if self.visits.passes is not None:
                self.visits.passes.forget("gradient", layers)
            self.finished[f"{RATES} all"] = found
        for path, blocks in self.finished[f"{RATES} all"].items():
            self._methods[path] = planned(self._methods[path], blocks)

    def _importance(
        self, i: int, layer: dict[str, PyTree], stats: jq.Stats | None
    ) -> dict[str, np.ndarray]:
        """Return what formats that plan their rates need to know of the weights of a layer."""
        inspect, found = self.visits.inspection(i, layer), {}
        for module, its_stats in self.visits.modules(layer, stats):
            params, recipe, known = self._folded(i, module, its_stats, inspect)
            found |= importance(
                params, recipe, known, key=self.request.key, inspect=inspect, first=i
            )
        return found

    def outer(self, step: Step) -> Model:
        """Return the model without its layers, as stored, with what the recipe quantizes of it.

        Args:
          step: called after each matrix.
        """
        params = self.visits.source.outer()
        rules = tuple((p, m) for p, m in self._methods.items() if not stacked(p))
        known: Known = self.visits.sites
        methods = [m for _, m in rules if isinstance(m, jq.Method)]
        if any(m.needs_gram or m.needs_channels or m.needs_output for m in methods):
            known = self._outer_statistics(params)
        if methods:
            params = jq.quantize(
                params, jq.Recipe(rules), known, key=self.request.key,
                progress=partial(self._told, step), finished=self.finished,
            )  # fmt: skip
        left, stored = dict(params), {}
        del params
        for name in list(left):
            stored |= storable({name: left.pop(name)})
        return dataclasses.replace(self.visits.source.outline, params=stored)

    def _outer_statistics(self, params: PyTree) -> jq.Stats:
        """Return statistics of the input of the output matrix."""
        passes, needs = self.visits.passes, self.visits.needs
        if passes is None:
            raise ValueError("statistics of the output matrix need calibration sequences")
        passes.forward(self._config.n_layers)
        stats = jq.calibrate(
            passes.head, params, passes.last(),
            loss=lambda logits, batch: next_token_loss(logits, batch[1]),
            weighting=self.request.weighting, gram=needs.gram, sample=needs.sample,
            output=self._outputs(False),
        )  # fmt: skip
        outer = {path: site for path, site in self.visits.sites.items() if not stacked(path)}
        return dataclasses.replace(stats, sites=outer)


def _weights(recipe: jq.Recipe) -> bool:
    """Return whether a recipe quantizes anything."""
    return any(isinstance(method, jq.Method) for _, method in recipe.rules)
