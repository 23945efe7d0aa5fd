"""Named compositions of a transform, a rounder and a format."""
