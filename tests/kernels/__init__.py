"""Kernels against the references that define them."""
