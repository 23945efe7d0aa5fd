"""Weights as replaceable values: stand-ins, what traced functions do with them, packed tensors."""
