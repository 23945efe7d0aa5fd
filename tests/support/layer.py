"""A layer as hard as real ones: heavy tails, spread channels, outliers, correlated inputs."""

import numpy as np


def made_layer(seed=0, n=512, k=1024, tokens=4096):
    """(W [k, n], H [k, k]) in float32, H the undamped mean of x x^T.

    The yardstick on which the peers' figures of tests/benchmarks/layer_task.py were measured is
    the default. Weights are Student-t with log-normal rows and columns and 8 outlier columns;
    inputs have a power-law spectrum, a mean, gains, and 8 large channels, 4 of them the weights'.
    """
    rng = np.random.default_rng(seed)
    w = 0.02 * rng.standard_t(5, (n, k))
    w = w * np.exp(0.25 * rng.normal(size=(n, 1))) * np.exp(0.2 * rng.normal(size=(1, k)))
    outliers = rng.choice(k, 8, replace=False)
    w[:, outliers] *= 6
    spectrum = np.arange(1, k + 1) ** -0.8
    basis = np.linalg.qr(rng.normal(size=(k, k)))[0]
    x = (rng.normal(size=(tokens, k)) * np.sqrt(spectrum / spectrum.mean())) @ basis.T
    x = (x + 0.3 * rng.normal(size=(1, k))) * np.exp(0.4 * rng.normal(size=(1, k)))
    large = np.union1d(outliers[:4], rng.choice(k, 4, replace=False))
    x[:, large] *= 8
    x, w = x.astype(np.float32), w.astype(np.float32)
    return w.T.copy(), (x.T @ x / tokens).astype(np.float32)


def relative_loss(w, q, h):
    """tr(E^T H E) / tr(W^T H W), E = W - Q, in float64."""
    w, h = np.asarray(w, np.float64), np.asarray(h, np.float64)
    e = w - np.asarray(q, np.float64)
    return float(np.sum(e * (h @ e)) / np.sum(w * (h @ w)))


def problem(k=48, n=20, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, k)) @ rng.normal(size=(k, k)) + rng.normal(size=k)
    return rng.normal(size=(k, n)).astype(np.float32), (x.T @ x / 300).astype(np.float32)
