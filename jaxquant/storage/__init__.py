"""Checkpoints: saving and loading quantized parameter trees."""

from jaxquant.storage.checkpoint import is_checkpoint, nbytes, stored_metadata, stored_recipe

__all__ = ["is_checkpoint", "nbytes", "stored_metadata", "stored_recipe"]
