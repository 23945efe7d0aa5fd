"""Language models whose residual stream is rotated offline, by a random or a learned rotation."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxquant as jq
from jaxquant.durable.store import Finished
from jaxquant.rounding import Nearest
from jaxquant.transforms import Channels
from jaxquant.tuning.trainer import Progress
from jaxquant_models.architectures.invariances import residual, untied, untied_config
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.source import Source


def untie_model(model: Model) -> Model:
    """Return the model with untied embeddings; its function is unchanged.

    Args:
      model: the model.
    """
    config, params = untied(model.config, model.params)
    return dataclasses.replace(model, config=config, params=params)


def rotate_model(model: Model, rotation: Float[Array, "d d"]) -> Model:
    """Return the model with its residual stream rotated and its embeddings untied.

    Its function is unchanged.

    Args:
      model: the model.
      rotation: orthonormal matrix [d, d].
    """
    model = untie_model(model)
    params = jq.ptq.rotate_residual(model.params, residual(model.config), rotation)
    return dataclasses.replace(model, params=params)


def untied_source(source: Source) -> Source:
    """Return the source of a model with untied embeddings; its function is unchanged.

    Args:
      source: the model.
    """
    outline, config = source.outline, source.outline.config
    changed = lambda params: untied(config, params)
    params = jax.eval_shape(lambda p: changed(p)[1], outline.params)
    new = dataclasses.replace(outline, config=untied_config(config), params=params)
    return source.changed(new, lambda layer: layer, lambda outer: changed(outer)[1])


def rotated(source: Source, rotation: Float[Array, "d d"]) -> Source:
    """Return the source of a model with its residual stream rotated; its function is unchanged.

    Args:
      source: the model, with untied embeddings.
      rotation: orthonormal matrix [d, d].
    """
    of_layers, others = residual(source.outline.config).split("layers")
    return source.changed(
        source.outline,
        lambda layer: jq.ptq.rotate_residual({"layers": layer}, of_layers, rotation)["layers"],
        lambda outer: jq.ptq.rotate_residual(outer, others, rotation),
    )


def random_rotation(model: Model, key: jax.Array) -> Float[Array, "d d"]:
    """Return a Hadamard transform of the residual stream after random signs, [d, d].

    Args:
      model: the model.
      key: PRNG key of the signs.
    Raises:
      ValueError: the width of the stream has no Hadamard transform.
    """
    d, rotation = model.config.d_model, jq.transforms.Rotation()
    if rotation.size(d) != d:
        raise ValueError(
            f"the residual stream cannot be rotated: no Hadamard transform of its {d} "
            "channels is known"
        )
    one = jnp.eye(d)
    return rotation.apply(one, rotation.fit(Channels(one), key))


def learned_rotation(
    model: Model,
    recipe: jq.Recipe,
    sequences: np.ndarray,
    healing: jq.tuning.Healing,
    *,
    start: Float[Array, "d d"],
    stats: jq.Stats | None = None,
    key: jax.Array | None = None,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Float[Array, "d d"]:
    """Return the rotation [d, d] of the residual stream that suits a recipe best.

    Weights are rounded during learning too, unless the recipe rounds them with error feedback.

    Args:
      model: the model, with untied embeddings.
      recipe: the recipe by which the rotated model is to be quantized.
      sequences: training token sequences, int [N, length].
      healing: settings of the training.
      start: the initial rotation [d, d].
      stats: input statistics of the model rotated by `start`; None if the recipe needs none.
      key, progress, finished: as in `jaxquant.tuning.learn_rotation`.
      validation: token sequences on which the best rotation is selected; None returns the last one.
    """
    rounders = [m.rounder for _, m in recipe.rules if isinstance(m, jq.Method)]
    return jq.tuning.learn_rotation(
        model.apply_training(), model.params, residual(model.config), recipe, sequences, healing,
        start=start, stats=stats or model.sites(),
        round_weights=all(isinstance(rounder, Nearest) for rounder in rounders), key=key,
        validation=validation, progress=progress, finished=finished,
    )  # fmt: skip
