"""Rounders: how codes are chosen for a given format."""

from jaxquant.rounding.ldlq import LDLQ
from jaxquant.rounding.nearest import Nearest

__all__ = ["LDLQ", "Nearest"]
