"""Complete, resumable runs: quantization, training, generation and evaluation."""
