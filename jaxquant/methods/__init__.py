"""Named compositions of a transform, a rounder and a format."""

from jaxquant.methods.registry import named_method

__all__ = ["named_method"]
