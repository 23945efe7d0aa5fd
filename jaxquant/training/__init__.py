"""Training while weights are low-bit: estimators, latent weights, BitNet, zeroth order."""
