"""Architectures in Flax linen, with their configurations and caches."""
