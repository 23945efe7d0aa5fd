"""Weights as replaceable values: stand-ins, packed tensors, and how traced functions use them."""
