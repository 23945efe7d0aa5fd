"""Estimators of weights in training: rounded values, surrogate gradients and learned ranges."""
