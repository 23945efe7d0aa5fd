"""Post-training quantization: from weights and statistics to packed weights."""
