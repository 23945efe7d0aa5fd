"""What a version leaves in floating point, and the version whose outer matrices are rounded too."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.core.tree import leaf_bytes
from jaxquant_models.runs.analysis.rounding import Rounded
from jaxquant_models.runs.analysis.variants import GROUPS
from jaxquant_models.runs.quantization import plan_model

HEAVY = 0.25  # least share of the bytes of a version
BITS = 8  # of the outer matrices


class Heavy(NamedTuple):
    """The largest matrix that a version leaves in floating point.

    Attributes:
      path: its path.
      bytes: its bytes.
      total: bytes of the version.
      version: name of the version.
    """

    path: str
    bytes: int
    total: int
    version: str

    @property
    def share(self) -> float:
        """Its share of the bytes."""
        return self.bytes / max(self.total, 1)


def heaviest(params: PyTree, total: int, version: str) -> Heavy | None:
    """Return the largest matrix that is not quantized; None if there is none.

    Args:
      params: tree of arrays and quantized weights.
      total: bytes of the version.
      version: name of the version.
    """
    left = [
        Heavy(path, leaf_bytes(w), total, version)
        for path, w in jq.core.path_leaves(params)
        if not isinstance(w, jq.QTensor) and w.ndim >= 2
    ]
    return max(left, key=lambda one: one.bytes, default=None)


@dataclasses.dataclass(frozen=True)
class Outer:
    """The parameters outside of the layers, with their matrices rounded.

    Attributes:
      params: the parameters.
      recipe: the recipe of the whole version.
    """

    params: PyTree
    recipe: jq.Recipe

    @property
    def name(self) -> str:
        """What is added to the name of the version, such as "embed 8 bits"."""
        return f"{', '.join(path.partition('/')[0] for path in self._packed)} {BITS} bits"

    @property
    def bytes(self) -> int:
        """Bytes of all of these parameters."""
        return sum(leaf_bytes(w) for _, w in jq.core.path_leaves(self.params))

    @property
    def packed_bytes(self) -> int:
        """Bytes of those that are rounded."""
        return sum(map(leaf_bytes, self._packed.values()))

    @property
    def packed_size(self) -> int:
        """Number of weights of those that are rounded."""
        return sum(int(np.prod(w.shape)) for w in self._packed.values())

    @property
    def _packed(self) -> Mapping[str, Any]:
        leaves = jq.core.path_leaves(self.params)
        return {path: w for path, w in leaves if isinstance(w, jq.QTensor)}


def rounded_outer(rounded: Rounded, recipe: jq.Recipe) -> Outer | None:
    """Return the outer parameters with matrices of `BITS` bits; None if no group size divides.

    Args:
      rounded: the versions.
      recipe: the recipe of the layers.
    """
    paths = [path for path, w in jq.core.path_leaves(rounded.outer) if w.ndim >= 2]
    for options in ({}, *({"group_size": size} for size in GROUPS)):
        rules = [(path, jq.rtn(bits=BITS, **options)) for path in paths]
        whole = jq.Recipe([*rules, *recipe.rules])
        job = rounded.jobs[0]
        try:
            plan = plan_model(job.visits.source.outline, whole)
        except ValueError:  # the group size does not divide
            continue
        made = dataclasses.replace(job, plan=plan, recipe=whole).outer(lambda _: None)
        return Outer(made.params, whole)
    return None
