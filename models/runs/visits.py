"""Visits of the layers of a model: one is in memory at a time, with its input statistics."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.one_block import calibrate_block
from jaxquant.calibration.statistics import Weighting
from jaxquant.durable.store import Folder
from jaxquant_models.readers.source import Source
from jaxquant_models.runs.module_loss import JUDGED, ModuleLoss
from jaxquant_models.runs.needs import Needs
from jaxquant_models.runs.passes import Passes, read_ahead
from jaxquant_models.runs.reporting import Reporter

LAYERS = "layers"


class Visits:
    """Visits of the layers of a model.

    Args:
      source: the model.
      needs: what the methods require of the statistics.
      weighting: the weighting of tokens, as in `jaxquant.calibrate`.
      sequences: the calibration sequences, int [N, t]; not looked at if no statistics are needed.
      files: store for hidden states and gradients that are too large for memory.
    """

    def __init__(
        self,
        source: Source,
        needs: Needs,
        weighting: Weighting,
        sequences: np.ndarray,
        files: Folder,
    ) -> None:
        self.source, self.needs, self.weighting = source, needs, weighting
        self.sequences, self.config = sequences, source.outline.config
        self.passes = Passes(source, sequences, files) if needs.statistics else None
        self.sites = {
            path: dataclasses.replace(site, shape=(1, *site.shape[1:])) if stacked(path) else site
            for path, site in source.outline.sites().items()
        }

    @property
    def backward(self) -> bool:
        """Whether the statistics need gradients of the loss."""
        return self.needs.statistics and self.weighting == "gradient"

    def begin(self, reporter: Reporter) -> None:
        """Compute the hidden states at all layers, where gradients need them.

        Args:
          reporter: receives reports of the work.
        """
        last = self.config.n_layers
        if self.passes is not None and self.backward and not self.passes.holds("state", last):
            with reporter.stage("calibrating", last) as step:
                self.passes.forward(last, step)

    def narrowed(self, needs: Needs) -> "Visits":
        """Return visits that collect less, of the same hidden states.

        Args:
          needs: what the methods require now.
        """
        new = copy.copy(self)
        new.needs = needs
        if not needs.statistics and self.passes is not None:
            self.passes.forget("state", range(self.config.n_layers + 1))
            new.passes = None
        return new

    def layers(
        self, todo: Sequence[int], outputs: Sequence[str] = ()
    ) -> Iterator[tuple[int, PyTree, jq.Stats | None]]:
        """Yield (number, layer, statistics) of layers, from the last to the first with gradients.

        The statistics are those of the layer by itself; see `modules`.

        Args:
          todo: numbers of the layers, in order.
          outputs: paths of the weights that need output-side statistics.
        """
        if not todo:
            return
        passes = self.passes
        if passes is None:
            for i, layer in read_ahead(self.source, todo):
                yield i, layer, None
            return
        order = range(todo[0], todo[-1] + 1)
        if self.backward:
            passes.backward(order[-1])
            order = order[::-1]
        for i, layer in read_ahead(self.source, order):
            passes.forward(i)
            if i in todo:
                stats = calibrate_block(
                    passes.block, layer, passes.batches(i, layer, self.backward),
                    weighting=self.weighting, gram=self.needs.gram,
                    output=tuple(path.removeprefix(f"{LAYERS}/") for path in outputs),
                    sample=self.needs.sample,
                    passed=None if passes.prefix else partial(passes.took, i),
                )  # fmt: skip
            if i not in todo or passes.prefix:  # whose states calibration has not passed on
                move = passes.pull if self.backward else passes.push
                move(i, layer)
            if i in todo:
                yield i, layer, stats
                del stats
            del layer  # before the next one is read

    def inspection(self, i: int, layer: dict[str, PyTree]) -> ModuleLoss | None:
        """Return the loss by which the scales of a layer are searched for, or None if none are.

        Args:
          i: number of the layer.
          layer: its parameters.
        """
        passes = self.passes
        if passes is None or not self.needs.module_loss:
            return None
        judged = range(min(JUDGED, len(self.sequences)))
        hidden = jnp.concatenate([passes.state(i, j) for j in judged])
        whole = dict(layer)  # which may be emptied
        return ModuleLoss(self.config, lambda _: whole, lambda _: hidden)

    def modules(
        self, layer: dict[str, PyTree], stats: jq.Stats | None
    ) -> Iterator[tuple[PyTree, jq.Stats | None]]:
        """Yield the modules of a layer, each with its norm, and their statistics by whole paths.

        The layer and the statistics are emptied, so that memory is freed module by module.

        Args:
          layer: the parameters of the layer.
          stats: its statistics, as `layers` yields them.
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
        sites = {path: self.sites[path] for path, _ in jq.core.path_leaves({LAYERS: part})}
        sums: dict[str, Any] = {
            name(path): stats.sums.pop(path) for path in dict.fromkeys(held.values())
        }
        return part, jq.Stats(sites, sums, {name(p): name(holder) for p, holder in held.items()})


Known = jq.Stats | dict[str, jq.core.Site]


def by_input(
    params: PyTree, recipe: jq.Recipe, known: Known
) -> Iterator[tuple[PyTree, jq.Recipe, Known]]:
    """Yield the weights that read one input, with rules and statistics; those of wide inputs last.

    The statistics are emptied, so that memory is freed input by input.

    Args:
      params: the parameters of a module, which the caller should not hold.
      recipe: a rule for every path.
      known: their statistics or sites.
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


def stacked(path: str) -> bool:
    """Return whether the path of a parameter is that of one in the stack of layers.

    Args:
      path: the path.
    """
    return path.startswith(f"{LAYERS}/")
