"""What trains after rounding: healing, recoding, learned transforms and rotations."""
