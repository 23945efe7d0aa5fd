"""The recipe of a single method for a whole language model."""

import dataclasses

import jaxquant as jq
from jaxquant.rounding import Clipped
from jaxquant_models.architectures.llama import (
    LAYER_MATRICES,
    QUERIES_AND_KEYS,
    RESIDUAL_READERS,
)


def recipe_of(method: jq.Method, rotated: bool = False) -> jq.Recipe:
    """Return the recipe that applies one method to the matrices of all layers.

    Embedding, output matrix and norms are kept. Queries and keys are not clipped, because their
    errors multiply.

    Args:
      method: the method.
      rotated: whether the residual stream of the model is rotated. The weights that read the stream
        then need no rotation of their own inputs. Other inputs keep the method's rotation, if it
        has one (QuaRot, SpinQuant "had").
    """
    rules = [(LAYER_MATRICES, method)]
    if rotated:
        rules[:0] = [(glob, _without_rotations(method)) for glob in RESIDUAL_READERS]
    if isinstance(method.rounder, Clipped):
        unclipped = dataclasses.replace(method, rounder=method.rounder.rounder)
        rules.insert(0, (QUERIES_AND_KEYS, unclipped))
    return jq.Recipe([*rules, ("*", jq.KEEP)])


def _without_rotations(method: jq.Method) -> jq.Method:
    """Return the method without input rotations, except sorting ones, which the format requires."""
    side = method.input
    parts = side.parts if isinstance(side, jq.transforms.Chain) else () if side is None else (side,)
    left = tuple(p for p in parts if not isinstance(p, jq.transforms.Rotation) or p.sort)
    if left == parts:
        return method
    if len(left) > 1:
        return dataclasses.replace(method, input=jq.transforms.Chain(left))
    return dataclasses.replace(method, input=left[0] if left else None)
