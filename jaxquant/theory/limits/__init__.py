"""What no amount of training or quantization can exceed, and what quantization can break."""
