"""Weights as replaceable values: stand-ins, packed tensors, and how traced functions use them."""

from jaxquant.core.activations import exact_activations
from jaxquant.core.dispatch import Explanation
from jaxquant.core.paths import path_leaves
from jaxquant.core.shardings import packed_sharding
from jaxquant.core.sites import Site

__all__ = ["Explanation", "Site", "exact_activations", "packed_sharding", "path_leaves"]
