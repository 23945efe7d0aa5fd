"""Stages: outliers of the inputs of weights, and the dimension of hidden states by layer."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxquant.theory.layer_dimension import ESTIMATORS, dimension_by_layer
from jaxquant_models.architectures.hidden_states import FIRST_QUERY
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.outliers import hidden_program, outliers_of
from jaxquant_models.runs.reporting import Step
from jaxquant_models.schemas.report import Dimensions

NEIGHBORS = 64  # that the estimators need


def outliers(subjects: Subjects) -> dict[str, Any]:
    """Return the outliers of MODEL on the first sequence of the text.

    Args:
      subjects: the models and the text.
    Returns:
      "kinds": kinds of outliers by path of the weight; "findings": sentences; "massive": layer,
      channel, value and ratio of the largest massive activation, or None.
    Raises:
      ValueError: activations are not finite.
    """
    tokens = subjects.chunks[0]
    if len(tokens) <= FIRST_QUERY:
        return {"kinds": {}, "findings": [], "massive": None}
    model = dataclasses.replace(subjects.model, params=subjects.dense[0])
    found = outliers_of(model, tokens)
    kinds: dict[str, list[str]] = {}
    for profile in found.inputs:
        for path in profile.weights:
            mine = kinds.setdefault(path, [])
            mine += [kind for kind in profile.kinds if kind not in mine]
    top = max(found.massive, key=lambda m: abs(m.value), default=None)
    massive = None
    if top is not None:
        layers = sorted({m.layer for m in found.massive})
        ratio = top.ratio if math.isfinite(top.ratio) else None  # of a median of 0
        massive = {
            **top._asdict(),
            "ratio": ratio,
            "layers": layers,
            "text": found.token(top.token),
        }
    return {"kinds": kinds, "findings": list(found.findings()), "massive": massive}


def dimensions(subjects: Subjects, step: Step) -> Dimensions | str:
    """Return the dimension of hidden states of MODEL and its reference, or why there is none.

    Args:
      subjects: the models and the text.
      step: called after each layer.
    """
    own, reference = subjects.dense
    size = subjects.request.size
    sequences = subjects.chunks[: size.sequences]
    if sequences.size <= NEIGHBORS or sequences.shape[1] <= FIRST_QUERY:
        return f"dimension by layer: left out, since {sequences.size} tokens are too few"
    try:
        mine = _profile(subjects.model, own, sequences, subjects.request.seed, size.points, step)
        other = None
        if subjects.against is not None:
            other = _profile(
                subjects.against, reference, sequences, subjects.request.seed, size.points, step
            )
    except ValueError as error:
        return f"dimension by layer: left out, since {error}"
    return Dimensions(
        estimators=list(ESTIMATORS),
        layers=mine[0],
        reference=None if other is None else other[0],
        points=mine[1],
    )


def _profile(
    model: Model, params: PyTree, sequences: np.ndarray, seed: int, points: int, step: Step
) -> tuple[list[list[float]], int]:
    run = hidden_program(model.config, jnp.dtype(model.dtype))
    states = [np.asarray(run(params, jnp.asarray(s)).residual) for s in sequences]
    hidden = np.stack(states, axis=1)
    found = dimension_by_layer(hidden, jax.random.key(seed), points=points, progress=step)
    values = [[float(one.value) for one in layer] for layer in found.layers]
    return values, int(found.layers[0][0].points)
