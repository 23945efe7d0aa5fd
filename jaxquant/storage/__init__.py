"""Checkpoints: saving and loading quantized parameter trees."""
