"""Training after rounding: healing, recoding, and learned transforms and rotations."""
