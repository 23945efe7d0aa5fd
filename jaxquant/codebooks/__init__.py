"""Formats: a codebook and its storage."""

from jaxquant.codebooks.additive import Additive
from jaxquant.codebooks.dense import Dense
from jaxquant.codebooks.dual_scale import DualScale
from jaxquant.codebooks.entropy_coded import EntropyCoded
from jaxquant.codebooks.float8 import Float8
from jaxquant.codebooks.integer import Grid, Integer
from jaxquant.codebooks.lattice import E8P
from jaxquant.codebooks.microscaling import MXFP4, NVFP4
from jaxquant.codebooks.normal_float import NormalFloat
from jaxquant.codebooks.stretched import Stretched
from jaxquant.codebooks.ternary import Ternary
from jaxquant.codebooks.trellis import Trellis, TrellisBudget
from jaxquant.codebooks.vector import Vector

__all__ = [
    "E8P",
    "MXFP4",
    "NVFP4",
    "Additive",
    "Dense",
    "DualScale",
    "EntropyCoded",
    "Float8",
    "Grid",
    "Integer",
    "NormalFloat",
    "Stretched",
    "Ternary",
    "Trellis",
    "TrellisBudget",
    "Vector",
]
