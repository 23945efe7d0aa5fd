"""Sets of points whose intrinsic dimension is known."""

import numpy as np


def rotated(x, into, rng):
    """The points, in a random subspace of a space of `into` dimensions."""
    return x @ np.linalg.qr(rng.normal(size=(into, x.shape[1])))[0].T


def gaussian(rng):
    return rotated(rng.normal(size=(400, 4)), 12, rng)


def sphere(rng):
    x = rng.normal(size=(400, 6))
    return rotated(x / np.linalg.norm(x, axis=1, keepdims=True), 40, rng)


def spiral(rng):
    t, h = 3 * np.pi * (0.5 + rng.uniform(size=400)), 20 * rng.uniform(size=400)
    return np.stack([t * np.cos(t), h, t * np.sin(t)], axis=1)
