"""Formats: a codebook and its storage."""

from jaxquant.codebooks.integer import Grid, Integer
from jaxquant.codebooks.ternary import Ternary

__all__ = ["Grid", "Integer", "Ternary"]
