"""jaxquant: a functional quantization stack for JAX."""

from jaxquant.activations import Activations, exact_activations
from jaxquant.allocate import Allocation, Choices, Option, allocate
from jaxquant.blockwise import quantize_blocks
from jaxquant.calibrate import Stats, calibrate
from jaxquant.codebooks import (
    E8P,
    MXFP4,
    NVFP4,
    Additive,
    Dense,
    EntropyCoded,
    Float8,
    Integer,
    NormalFloat,
    Ternary,
    Trellis,
    TrellisBudget,
    Vector,
)
from jaxquant.dispatch import Explanation, explain, quantized
from jaxquant.finetune import Healing, heal, heal_blocks, recode
from jaxquant.folding import fold
from jaxquant.kv_cache import KVFormat
from jaxquant.layers import restack, unstack, unstack_stats
from jaxquant.learned import learn, learn_blocks
from jaxquant.learned_rotation import learn_rotation
from jaxquant.methods import (
    KEEP,
    METHODS,
    Method,
    aqlm,
    awq,
    duquant,
    entropy_coded,
    flatquant,
    float8,
    gptq,
    mxfp4,
    named_method,
    normal_float,
    nvfp4,
    qtip,
    quarot,
    quip_sharp,
    rtn,
    smoothquant,
    ternary,
    trellis,
    vptq,
)
from jaxquant.observe import Observation, observe
from jaxquant.opened import decoded, rejoined
from jaxquant.paths import path_leaves
from jaxquant.quantize import (
    Done,
    bits_per_weight,
    dequantize,
    quantize,
    quantize_array,
    with_activations,
)
from jaxquant.recipe import Plan, Recipe, resolve
from jaxquant.residual import Residual, rotate_residual
from jaxquant.roofline import Roofline, roofline
from jaxquant.shares import shares
from jaxquant.sites import Site, sites
from jaxquant.tensor import QTensor
from jaxquant.transforms import (
    ActivationAware,
    Chain,
    Greedy,
    Kronecker,
    Rotation,
    Scaling,
    Smooth,
    Zigzag,
)

__version__ = "0.1.0"

__all__ = [
    "E8P",
    "KEEP",
    "METHODS",
    "MXFP4",
    "NVFP4",
    "ActivationAware",
    "Activations",
    "Additive",
    "Allocation",
    "Chain",
    "Choices",
    "Dense",
    "Done",
    "EntropyCoded",
    "Explanation",
    "Float8",
    "Greedy",
    "Healing",
    "Integer",
    "KVFormat",
    "Kronecker",
    "Method",
    "NormalFloat",
    "Observation",
    "Option",
    "Plan",
    "QTensor",
    "Recipe",
    "Residual",
    "Roofline",
    "Rotation",
    "Scaling",
    "Site",
    "Smooth",
    "Stats",
    "Ternary",
    "Trellis",
    "TrellisBudget",
    "Vector",
    "Zigzag",
    "allocate",
    "aqlm",
    "awq",
    "bits_per_weight",
    "calibrate",
    "decoded",
    "dequantize",
    "duquant",
    "entropy_coded",
    "exact_activations",
    "explain",
    "flatquant",
    "float8",
    "fold",
    "gptq",
    "heal",
    "heal_blocks",
    "learn",
    "learn_blocks",
    "learn_rotation",
    "mxfp4",
    "named_method",
    "normal_float",
    "nvfp4",
    "observe",
    "path_leaves",
    "qtip",
    "quantize",
    "quantize_array",
    "quantize_blocks",
    "quantized",
    "quarot",
    "quip_sharp",
    "recode",
    "rejoined",
    "resolve",
    "restack",
    "roofline",
    "rotate_residual",
    "rtn",
    "shares",
    "sites",
    "smoothquant",
    "ternary",
    "trellis",
    "unstack",
    "unstack_stats",
    "vptq",
    "with_activations",
]
