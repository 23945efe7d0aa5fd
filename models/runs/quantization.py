"""Quantization of a language model by a recipe: the plan, the rounding, and learned transforms."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jaxquant as jq
from jaxquant.durable.store import Finished
from jaxquant.ptq.folding import Folded, unfolded
from jaxquant.ptq.layer_stacks import is_apart
from jaxquant.ptq.shared_transforms import Inspection
from jaxquant.tuning.learned_transforms import Transforms
from jaxquant.tuning.trainer import Progress
from jaxquant_models.architectures.invariances import folds
from jaxquant_models.readers.checkpoint import as_stored
from jaxquant_models.readers.model import Model


class Quantized(NamedTuple):
    """The result of a quantization job.

    Attributes:
      model: the quantized model.
      recipe: the recipe that made it.
      layers: the directories that hold its layers (`readers.checkpoint.save_layer`), if its
        parameters lack them.
    """

    model: Model
    recipe: jq.Recipe
    layers: Sequence[Path] = ()


def plan_model(model: Model, recipe: jq.Recipe) -> jq.recipes.Plan:
    """Return the resolved recipe, with the bytes that `save_model` stores.

    All errors of the recipe are raised here.

    Args:
      model: the model.
      recipe: the recipe.
    Raises:
      ValueError: the recipe does not fit the model.
    """
    shape = lambda w, dtype: jax.ShapeDtypeStruct(w.shape, dtype)
    params, sites = as_stored(model.params, shape), model.sites()
    if not is_apart(model.params, "layers"):
        recipe = unfolded(params, recipe, sites, folds(model.config))
    return jq.recipes.resolve(recipe, params, sites)


def quantize_model(
    model: Model,
    recipe: jq.Recipe,
    stats: jq.Stats | None,
    *,
    key: jax.Array | None = None,
    inspect: Inspection | None = None,
    transforms: Transforms | None = None,
    progress: Callable[[jq.ptq.Done], None] | None = None,
    finished: Finished | None = None,
) -> Model:
    """Return the model with packed parameters; those that the recipe keeps are unchanged.

    Input factors are folded into the preceding operations where that is exact
    (`invariances.folds`).

    Args:
      model: the model.
      recipe: the recipe.
      stats: input statistics, or None if the recipe needs none.
      key, inspect, transforms, progress, finished: as in `jaxquant.quantize`.
    """
    known: jq.Stats | dict[str, jq.core.Site] = model.sites()
    params = model.params
    if stats is not None:
        params, recipe, known = _folded(model, recipe, stats, key, inspect, finished)
    packed = jq.quantize(
        params, recipe, known, key=key, inspect=inspect, transforms=transforms,
        progress=progress, finished=finished,
    )  # fmt: skip
    return dataclasses.replace(model, params=packed)


def learn_transforms(
    model: Model,
    recipe: jq.Recipe,
    stats: jq.Stats,
    sequences: np.ndarray,
    healing: jq.tuning.Healing,
    *,
    validation: np.ndarray,
    key: jax.Array | None = None,
    inspect: Inspection | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Transforms:
    """Return input transforms learned end to end by `jaxquant.tuning.learn`, for `quantize_model`.

    Args:
      model: the model.
      recipe: the recipe.
      stats: input statistics.
      sequences: training token sequences, int [N, length].
      healing: settings of the training.
      validation: token sequences for validation, int [M, length].
      key, inspect, progress, finished: as in `jaxquant.quantize`.
    """
    params, recipe, stats = _folded(model, recipe, stats, key, inspect, finished)
    return jq.tuning.learn(
        model.apply_training(), params, recipe, stats, sequences, healing,
        validation=validation, key=key, progress=progress, finished=finished,
    )  # fmt: skip


def _folded(
    model: Model,
    recipe: jq.Recipe,
    stats: jq.Stats,
    key: jax.Array | None,
    inspect: Inspection | None,
    finished: Finished | None,
) -> Folded:
    if is_apart(model.params, "layers"):
        return Folded(model.params, recipe, stats)
    places = folds(model.config)
    return jq.ptq.fold(
        model.params, recipe, stats, places, key=key, inspect=inspect, finished=finished
    )
