"""Quantization of a model one layer at a time, each written when it is done.

Peak memory is at most

    max(two layers in float32 + the statistics of one layer,
        3/2 of embedding and output matrix in float32) + a constant below 1 GB,

whatever the number of layers. The statistics of a
layer with gradient weighting are a float32 matrix [k, k] for each matrix [k, n] of it, and [n, n]
more for methods that need the output side. The constant holds the libraries, the hidden states that
are kept in memory (`passes.IN_MEMORY`; more go to files) and the work on the largest matrix.
"""

import dataclasses
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.one_block import calibrate_block
from jaxquant.durable.store import Folder
from jaxquant.ptq.quantize import importance
from jaxquant.ptq.round_stacked import planned
from jaxquant.storage.checkpoint import check_files
from jaxquant.tuning.trainer import next_token_loss
from jaxquant_models.architectures.invariances import folds
from jaxquant_models.readers.checkpoint import save_layer
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.source import Source
from jaxquant_models.runs.measuring import return_freed_memory_at_once
from jaxquant_models.runs.module_loss import JUDGED, ModuleLoss
from jaxquant_models.runs.needs import Needs
from jaxquant_models.runs.passes import Passes, read_ahead
from jaxquant_models.runs.quantization import Quantized
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter, Step

LAYERS = "layers"
RATES = "rates of"  # begins the keys under which the importance of blocks of rows is stored


@dataclasses.dataclass(eq=False)
class LayerwiseJob:
    """Quantization of a model one layer at a time; it can be killed at any moment and resumed.

    Attributes:
      request: the request; none of its steps needs the whole model.
      source: the model to quantize.
      needs: what the methods of the request require.
      sequences: the calibration sequences, int [N, t]; empty if none are needed.
      plan: what is made of every leaf.
      recipe: the recipe.
      finished: what has been done, including by earlier runs of the same job.
      reporter: receives reports of the work.
    """

    request: QuantizationRequest
    source: Source
    needs: Needs
    sequences: np.ndarray
    plan: jq.recipes.Plan
    recipe: jq.Recipe
    finished: Folder
    reporter: Reporter

    def __post_init__(self) -> None:
        self._config = self.source.outline.config
        self._place = self.finished.directory(LAYERS)
        params, sites = self.source.outline.params, self.source.outline.sites()
        resolved = jq.recipes.resolve(self.recipe, params, sites)
        self._methods = {e.path: e.method for e in resolved.entries}
        self._sites = {
            path: dataclasses.replace(site, shape=(1, *site.shape[1:])) if _stacked(path) else site
            for path, site in sites.items()
        }
        self._count = 0  # of matrices

    def run(self) -> Quantized:
        """Run what is not finished, and return the model, its layers being in directories."""
        return_freed_memory_at_once()
        layers = range(self._config.n_layers)
        todo = [i for i in layers if not self._is_done(i)]
        if len(todo) < len(layers):
            self.reporter.tell(
                f"{len(layers) - len(todo)} of {len(layers)} layers were done before"
            )
        passes = None
        if self.needs.statistics:
            passes = Passes(self.source, self.sequences, self.finished)
            if self._backward and todo:
                with self.reporter.stage("calibrating", len(layers)) as step:
                    passes.forward(len(layers), step)
        if todo and any(e.method.format.plans for e in self.plan.weights if _stacked(e.path)):
            self._plan_rates(passes)
        with self.reporter.stage("quantizing", self.plan.matrices) as step:
            self._count = (len(layers) - len(todo)) * self._of_layer
            for i, layer, stats in self._visited(passes, todo):
                self._quantize(i, layer, stats, self._inspection(i, layer, passes), step)
                if passes is not None:
                    passes.forget("state", [i])
                    passes.forget("gradient", [i + 1])
            outer = self._outer(passes, step)
        return Quantized(outer, self.recipe, [self._place / str(i) for i in layers])

    @property
    def _backward(self) -> bool:
        """Whether the statistics need gradients of the loss."""
        return bool(self.request.weighting == "gradient" or self.needs.output)

    @property
    def _of_layer(self) -> int:
        """The number of matrices of one layer."""
        return sum(e.count for e in self.plan.weights if _stacked(e.path)) // self._config.n_layers

    def _outputs(self, stacked: bool) -> list[str]:
        """Return the weights of the layers, or the others, that need output-side statistics."""
        methods = {p: m for p, m in self._methods.items() if isinstance(m, jq.Method)}
        return [p for p, m in methods.items() if m.needs_output and _stacked(p) is stacked]

    def _is_done(self, i: int) -> bool:
        place = self._place / str(i)
        if not place.exists():
            return False
        try:
            check_files(place)
            return True
        except ValueError as error:
            warnings.warn(f"{error}; the layer is quantized again", stacklevel=2)
            shutil.rmtree(place)
            return False

    def _inspection(
        self, i: int, layer: dict[str, PyTree], passes: Passes | None
    ) -> ModuleLoss | None:
        """Return the loss by which the scales of a layer are searched for, or None if none are."""
        if passes is None or not self.needs.module_loss:
            return None
        judged = range(min(JUDGED, len(self.sequences)))
        hidden = jnp.concatenate([passes.state(i, j) for j in judged])
        whole = dict(layer)  # which is emptied
        return ModuleLoss(self._config, lambda _: whole, lambda _: hidden)

    def _visited(
        self, passes: Passes | None, todo: Sequence[int]
    ) -> Iterator[tuple[int, PyTree, jq.Stats | None]]:
        """Yield (number, layer, statistics) of the layers to do, in the order of the passes."""
        if not todo:
            return
        if passes is None:
            for i, layer in read_ahead(self.source, todo):
                yield i, layer, None
            return
        backward, order = self._backward, range(todo[0], todo[-1] + 1)
        if backward:
            passes.backward(order[-1])
            order = order[::-1]
        for i, layer in read_ahead(self.source, order):
            passes.forward(i)
            if i in todo:
                stats = calibrate_block(
                    passes.block, layer, passes.batches(i, backward),
                    weighting=self.request.weighting, gram=self.needs.gram,
                    output=tuple(p.removeprefix(f"{LAYERS}/") for p in self._outputs(True)),
                    sample=self.needs.sample, passed=partial(passes.took, i),
                )  # fmt: skip
                yield i, layer, stats
                del stats
            elif backward:
                passes.pull(i, layer)
            else:
                passes.push(i, layer)
            del layer  # before the next one is read

    def _folded(
        self, i: int, module: PyTree, stats: jq.Stats | None, inspect: ModuleLoss | None
    ) -> tuple[PyTree, jq.Recipe, "Known"]:
        """Return tree, recipe and statistics of a module after folding its input factors."""
        params = {LAYERS: module}
        paths = [path for path, _ in jq.core.path_leaves(params)]
        recipe = jq.Recipe(tuple((path, self._methods[path]) for path in paths))
        if stats is None or not _weights(recipe):
            return params, recipe, self._sites
        return jq.ptq.fold(
            params, recipe, stats, folds(self._config),
            key=self.request.key, inspect=inspect, first=i,
        )  # fmt: skip

    def _quantize(
        self,
        i: int,
        layer: dict[str, PyTree],
        stats: jq.Stats | None,
        inspect: ModuleLoss | None,
        step: Step,
    ) -> None:
        """Quantize a layer and write it."""
        names: list[str] = []

        def told(done: jq.ptq.Done) -> None:
            names.append(done.path)
            self._told(step, done)

        packed: dict[str, Any] = {}
        for module, its_stats in self._modules(layer, stats):
            params, recipe, known = self._folded(i, module, its_stats, inspect)
            held = [params]  # emptied by the call, so that weights are freed input by input
            del module, its_stats, params
            for part, rules, its_known in _by_input(held.pop(), recipe, known):
                if _weights(rules):
                    # Without statistics, rounding takes less time than to recognize what is done.
                    part = jq.quantize(
                        part, rules, its_known, key=self.request.key, inspect=inspect,
                        progress=told, finished=None if stats is None else self.finished, first=i,
                    )  # fmt: skip
                packed |= dict(jq.core.path_leaves(part[LAYERS]))
        save_layer(self._place / str(i), traverse_util.unflatten_dict(packed, sep="/"))
        for name in names:
            self.finished.pop(name, None)

    def _modules(
        self, layer: dict[str, PyTree], stats: jq.Stats | None
    ) -> Iterator[tuple[PyTree, jq.Stats | None]]:
        """Yield the modules of a layer, each with its norm and statistics.

        The layer and the statistics are emptied, so that memory is freed module by module.
        """
        for module in dict.fromkeys(name.removesuffix("_norm") for name in sorted(layer)):
            yield self._module(module, layer, stats)

    def _module(
        self, module: str, layer: dict[str, PyTree], stats: jq.Stats | None
    ) -> tuple[PyTree, jq.Stats | None]:
        """Take a module, with its norm, and its statistics."""
        part = {name: layer.pop(name) for name in (module, f"{module}_norm") if name in layer}
        if stats is None:
            return part, None
        mine = [path for path in stats.holder if path.startswith(f"{module}/")]
        held = {path: stats.holder[path] for path in mine}
        name = lambda path: f"{LAYERS}/{path}"
        sites = {path: self._sites[path] for path, _ in jq.core.path_leaves({LAYERS: part})}
        sums = {name(path): stats.sums.pop(path) for path in dict.fromkeys(held.values())}
        return part, jq.Stats(sites, sums, {name(p): name(holder) for p, holder in held.items()})

    def _told(self, step: Step, done: jq.ptq.Done) -> None:
        """Report a matrix as one of the whole model."""
        self._count += 1
        step(dataclasses.replace(done, index=self._count, total=self.plan.matrices))

    def _plan_rates(self, passes: Passes | None) -> None:
        """Plan the rates of formats that do so over all layers, in a pass of its own."""
        found: dict[str, np.ndarray] = {}
        layers = range(self._config.n_layers)
        if f"{RATES} all" not in self.finished:
            with self.reporter.stage("planning", len(layers)) as step:
                for i, layer, stats in self._visited(passes, layers):
                    inspect = self._inspection(i, layer, passes)
                    for module, its_stats in self._modules(layer, stats):
                        params, recipe, known = self._folded(i, module, its_stats, inspect)
                        one = importance(
                            params, recipe, known, key=self.request.key, inspect=inspect, first=i
                        )
                        found |= {path: found.get(path, 0) + a for path, a in one.items()}
                    step(i)
            if passes is not None:
                passes.forget("gradient", layers)
            self.finished[f"{RATES} all"] = found
        for path, blocks in self.finished[f"{RATES} all"].items():
            self._methods[path] = planned(self._methods[path], blocks)

    def _outer(self, passes: Passes | None, step: Step) -> Model:
        """Return the model without its layers, with what the recipe quantizes of the rest."""
        params = self.source.outer()
        rules = tuple((p, m) for p, m in self._methods.items() if not _stacked(p))
        known: jq.Stats | dict[str, jq.core.Site] = self._sites
        methods = [m for _, m in rules if isinstance(m, jq.Method)]
        if any(m.needs_gram or m.needs_channels or m.needs_output for m in methods):
            known = self._outer_statistics(passes, params)
        if methods:
            params = jq.quantize(
                params, jq.Recipe(rules), known, key=self.request.key,
                progress=partial(self._told, step), finished=self.finished,
            )  # fmt: skip
        return dataclasses.replace(self.source.outline, params=params)

    def _outer_statistics(self, passes: Passes, params: PyTree) -> jq.Stats:
        """Return statistics of the input of the output matrix."""
        passes.forward(self._config.n_layers)
        stats = jq.calibrate(
            passes.head, params, passes.last(),
            loss=lambda logits, batch: next_token_loss(logits, batch[1]),
            weighting=self.request.weighting, gram=self.needs.gram, sample=self.needs.sample,
            output=self._outputs(False),
        )  # fmt: skip
        outer = {path: site for path, site in self._sites.items() if not _stacked(path)}
        return dataclasses.replace(stats, sites=outer)


Known = jq.Stats | dict[str, jq.core.Site]


def _by_input(
    params: PyTree, recipe: jq.Recipe, known: Known
) -> Iterator[tuple[PyTree, jq.Recipe, Known]]:
    """Yield the weights that read one input, with rules and statistics; those of wide inputs last.

    The statistics are emptied, so that memory is freed input by input.
    """
    sites = known.sites if isinstance(known, jq.Stats) else known
    leaves, methods = dict(jq.core.path_leaves(params)), dict(recipe.rules)
    del params
    groups: dict[str, list[str]] = {}
    for path in leaves:
        groups.setdefault(sites[path].input or "" if path in sites else "", []).append(path)
    width = lambda paths: max((leaves[path].shape[-2:][0] for path in paths), default=0)
    for paths in sorted(groups.values(), key=width):
        part = traverse_util.unflatten_dict({path: leaves.pop(path) for path in paths}, sep="/")
        rules = jq.Recipe(tuple((path, methods[path]) for path in paths))
        if not isinstance(known, jq.Stats):
            yield part, rules, known
            continue
        held = {path: known.holder[path] for path in paths if path in known.holder}
        sums = {path: known.sums.pop(path) for path in dict.fromkeys(held.values())}
        yield part, rules, jq.Stats({path: sites[path] for path in paths}, sums, held)


def _weights(recipe: jq.Recipe) -> bool:
    """Return whether a recipe quantizes anything."""
    return any(isinstance(method, jq.Method) for _, method in recipe.rules)


def _stacked(path: str) -> bool:
    return path.startswith(f"{LAYERS}/")
