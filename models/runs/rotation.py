"""A language model whose residual stream is rotated, offline: at random, or as learned."""

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
from jaxquant_models.architectures.invariances import residual, untied
from jaxquant_models.readers.model import Model


def untie_model(model: Model) -> Model:
    """The same function, a head apart."""
    config, params = untied(model.config, model.params)
    return dataclasses.replace(model, config=config, params=params)


def rotate_model(model: Model, rotation: Float[Array, "d d"]) -> Model:
    """The same function, its residual stream turned by an orthonormal matrix, a head apart."""
    model = untie_model(model)
    params = jq.rotate_residual(model.params, residual(model.config), rotation)
    return dataclasses.replace(model, params=params)


def random_rotation(model: Model, key: jax.Array) -> Float[Array, "d d"]:
    """A Hadamard transform of the residual stream behind random signs.

    Raises:
      ValueError: its width has no Hadamard transform.
    """
    d, rotation = model.config.d_model, jq.Rotation()
    if rotation.size(d) != d:
        raise ValueError(f"{d} channels have no Hadamard transform to rotate by")
    one = jnp.eye(d)
    return rotation.apply(one, rotation.fit(Channels(one), key))


def learned_rotation(
    model: Model,
    recipe: jq.Recipe,
    sequences: np.ndarray,
    healing: jq.Healing,
    *,
    start: Float[Array, "d d"],
    stats: jq.Stats | None = None,
    key: jax.Array | None = None,
    validation: np.ndarray | None = None,
    progress: Callable[[Progress], None] | None = None,
    finished: Finished | None = None,
) -> Float[Array, "d d"]:
    """The rotation of the residual stream of a model with a head apart that suits a recipe best.

    Weights are rounded in learning too, but where error feedback is to round them. Arguments are
    those of `jaxquant.learn_rotation`.
    """
    rounders = [m.rounder for _, m in recipe.rules if isinstance(m, jq.Method)]
    return jq.learn_rotation(
        model.apply_training(), model.params, residual(model.config), recipe, sequences, healing,
        start=start, stats=stats or model.sites(),
        round_weights=all(isinstance(rounder, Nearest) for rounder in rounders), key=key,
        validation=validation, progress=progress, finished=finished,
    )  # fmt: skip
