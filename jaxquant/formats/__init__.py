"""Formats: how a matrix is encoded as packed codes, scales and codebooks, and decoded again."""

from jaxquant.core.protocols import Format, GridFormat
from jaxquant.formats.additive import Additive
from jaxquant.formats.dense import Dense
from jaxquant.formats.dual_scale import DualScale
from jaxquant.formats.e8p import E8P
from jaxquant.formats.entropy_coded import EntropyCoded
from jaxquant.formats.float8 import Float8
from jaxquant.formats.float_planes import FloatPlanes
from jaxquant.formats.integer import Grid, Integer
from jaxquant.formats.kv_cache import KVFormat
from jaxquant.formats.microscaling import MXFP4, NVFP4
from jaxquant.formats.normal_float import NormalFloat
from jaxquant.formats.offset import Offset
from jaxquant.formats.stretched import Stretched
from jaxquant.formats.ternary import Ternary
from jaxquant.formats.transcoding import transcoded
from jaxquant.formats.trellis import Trellis, TrellisBudget
from jaxquant.formats.vector import Vector

__all__ = [
    "E8P",
    "MXFP4",
    "NVFP4",
    "Additive",
    "Dense",
    "DualScale",
    "EntropyCoded",
    "Float8",
    "FloatPlanes",
    "Format",
    "Grid",
    "GridFormat",
    "Integer",
    "KVFormat",
    "NormalFloat",
    "Offset",
    "Stretched",
    "Ternary",
    "Trellis",
    "TrellisBudget",
    "Vector",
    "transcoded",
]
