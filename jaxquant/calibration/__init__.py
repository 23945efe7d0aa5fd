"""Calibration: statistics of the inputs of every matmul, collected in a backward pass."""
