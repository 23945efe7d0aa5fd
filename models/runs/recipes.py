"""The recipe of one method for a whole language model."""

import dataclasses

import jaxquant as jq
from jaxquant.rounding import Clipped
from jaxquant_models.architectures.llama import (
    LAYER_MATRICES,
    QUERIES_AND_KEYS,
    RESIDUAL_READERS,
)


def recipe_of(method: jq.Method, rotated: bool = False) -> jq.Recipe:
    """The matrices of every layer by one method; embedding, head and norms as they are.

    Queries and keys are not clipped: what they lose is multiplied.

    Args:
      rotated: for a model whose residual stream is rotated: what reads the stream needs no rotation
        of its own. Other inputs have the method's (QuaRot, SpinQuant "had") or none.
    """
    rules = [(LAYER_MATRICES, method)]
    if rotated:
        rules[:0] = [(glob, _without_rotations(method)) for glob in RESIDUAL_READERS]
    if isinstance(method.rounder, Clipped):
        unclipped = dataclasses.replace(method, rounder=method.rounder.rounder)
        rules.insert(0, (QUERIES_AND_KEYS, unclipped))
    return jq.Recipe([*rules, ("*", jq.KEEP)])


def _without_rotations(method: jq.Method) -> jq.Method:
    """The method without rotations of inputs, except for those that sort, as the format needs."""
    side = method.input
    parts = side.parts if isinstance(side, jq.Chain) else () if side is None else (side,)
    left = tuple(p for p in parts if not isinstance(p, jq.Rotation) or p.sort)
    if left == parts:
        return method
    if len(left) > 1:
        return dataclasses.replace(method, input=jq.Chain(left))
    return dataclasses.replace(method, input=left[0] if left else None)
