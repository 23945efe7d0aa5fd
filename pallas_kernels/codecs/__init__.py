"""Definitions of every packed layout and code."""
