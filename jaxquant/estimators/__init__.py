"""Rounded values of weights that train, their surrogate gradients, and learned ranges."""
