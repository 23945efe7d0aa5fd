"""Post-training quantization: statistics in, packed weights out."""
