"""jaxquant: a functional quantization stack for JAX."""

from jaxquant.blockwise import quantize_blocks
from jaxquant.calibrate import Stats, calibrate
from jaxquant.codebooks import Integer, Ternary
from jaxquant.dispatch import Explanation, explain, quantized
from jaxquant.methods import KEEP, METHODS, Method, gptq, named_method, rtn, ternary
from jaxquant.paths import path_leaves
from jaxquant.quantize import bits_per_weight, dequantize, quantize, quantize_array
from jaxquant.recipe import Plan, Recipe, resolve
from jaxquant.sites import Site, sites
from jaxquant.tensor import QTensor

__version__ = "0.1.0"

__all__ = [
    "KEEP",
    "METHODS",
    "Explanation",
    "Integer",
    "Method",
    "Plan",
    "QTensor",
    "Recipe",
    "Site",
    "Stats",
    "Ternary",
    "bits_per_weight",
    "calibrate",
    "dequantize",
    "explain",
    "gptq",
    "named_method",
    "path_leaves",
    "quantize",
    "quantize_array",
    "quantize_blocks",
    "quantized",
    "resolve",
    "rtn",
    "sites",
    "ternary",
]
