"""Measurements that show why quantization is hard, and how far it can go."""

from jaxquant.theory.roofline import Roofline

__all__ = ["Roofline"]
