"""Whole runs: quantize, train, generate, measure, resumable."""
