"""Checkpoints: saving and loading trees, quantized or not."""

from jaxquant.storage.checkpoint import check_target, nbytes
from jaxquant.storage.description import is_checkpoint, stored_metadata, stored_recipe

__all__ = [
    "check_target",
    "is_checkpoint",
    "nbytes",
    "stored_metadata",
    "stored_recipe",
]
