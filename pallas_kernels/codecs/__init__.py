"""The one definition of every packed layout and code."""
