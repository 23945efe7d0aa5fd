"""Selection of training data by how little of it is redundant: compression ratios, ZIP."""

from jaxquant.selection.baselines import random_draw
from jaxquant.selection.compression import compression_ratio
from jaxquant.selection.json_lines import JsonLines
from jaxquant.selection.law import Correlation, EntropyLaw, entropy_law
from jaxquant.selection.zip_selection import Selection, zip_select

__all__ = [
    "Correlation",
    "EntropyLaw",
    "JsonLines",
    "Selection",
    "compression_ratio",
    "entropy_law",
    "random_draw",
    "zip_select",
]
