"""Readers of models, tokenizers and texts, from files and installed packages."""
