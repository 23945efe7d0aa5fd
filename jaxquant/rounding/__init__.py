"""Rounders: algorithms that choose the codes of a matrix for a given format."""

from jaxquant.core.protocols import Moments, Rounder
from jaxquant.rounding.beam import Beam
from jaxquant.rounding.clipped import Clipped
from jaxquant.rounding.ldlq import LDLQ
from jaxquant.rounding.nearest import Nearest
from jaxquant.rounding.two_sided import TwoSided
from jaxquant.rounding.waterfill import Waterfill

__all__ = ["LDLQ", "Beam", "Clipped", "Moments", "Nearest", "Rounder", "TwoSided", "Waterfill"]
