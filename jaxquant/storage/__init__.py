"""Checkpoints: saving and loading trees, quantized or not; weights of bitsandbytes."""

from jaxquant.storage.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from jaxquant.storage.checkpoint import check_target, nbytes
from jaxquant.storage.description import is_checkpoint, stored_metadata, stored_recipe
from jaxquant.storage.outlines import outline

__all__ = [
    "check_target",
    "from_bitsandbytes",
    "is_checkpoint",
    "nbytes",
    "outline",
    "stored_metadata",
    "stored_recipe",
    "to_bitsandbytes",
]
