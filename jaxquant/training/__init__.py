"""Training with low-bit weights: latent weights, optimizers, stability, zeroth-order gradients."""
