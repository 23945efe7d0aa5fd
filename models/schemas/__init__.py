"""Schemas of external files, and strict readers that report an error in one line."""
