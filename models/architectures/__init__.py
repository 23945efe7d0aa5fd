"""Architectures in Flax linen, their configurations and caches."""
