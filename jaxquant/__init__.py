"""jaxquant: a functional quantization library for JAX.

Names used for training are imported on first access, because they need Optax. Quantizing and
serving do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant.calibration.calibrate import calibrate
from jaxquant.calibration.observe import Observation, observe
from jaxquant.calibration.statistics import Stats
from jaxquant.core.activations import Activations, exact_activations
from jaxquant.core.dispatch import Explanation, explain, quantized
from jaxquant.core.paths import path_leaves
from jaxquant.core.protocols import Estimator, Format, GridFormat, Rounder, Transform
from jaxquant.core.sites import Site, sites
from jaxquant.core.tensor import QTensor
from jaxquant.core.tree import bits_per_weight, dequantize, with_activations
from jaxquant.estimators.input_ranges import PACT, LSQRange
from jaxquant.estimators.kurtosis import flattened
from jaxquant.estimators.latent_format import Drawing, Latent
from jaxquant.estimators.learned_clipping import LearnedClipping
from jaxquant.estimators.weight_estimators import (
    LSQ,
    AbsMean,
    StraightThrough,
    StretchedElastic,
    randomness,
)
from jaxquant.formats import (
    E8P,
    MXFP4,
    NVFP4,
    Additive,
    Dense,
    DualScale,
    EntropyCoded,
    Float8,
    Integer,
    NormalFloat,
    Stretched,
    Ternary,
    Trellis,
    TrellisBudget,
    Vector,
)
from jaxquant.formats.kv_cache import KVFormat
from jaxquant.formats.transcoding import transcoded
from jaxquant.methods.method import KEEP, Method
from jaxquant.methods.outliers import awq, duquant, flatquant, quarot, smoothquant
from jaxquant.methods.registry import METHODS, named_method
from jaxquant.methods.training import bitnet, lsq, pact, ste, stretched_elastic, zeroqat
from jaxquant.methods.weights import (
    aqlm,
    entropy_coded,
    float8,
    gptq,
    mxfp4,
    normal_float,
    nvfp4,
    qtip,
    quip_sharp,
    rtn,
    ternary,
    trellis,
    vptq,
)
from jaxquant.ptq.allocate import Allocation, Choices, Option, allocate
from jaxquant.ptq.bit_shares import shares
from jaxquant.ptq.blockwise import quantize_blocks
from jaxquant.ptq.folding import fold
from jaxquant.ptq.layer_stacks import restack, unstack, unstack_stats
from jaxquant.ptq.quantize import quantize, quantize_array
from jaxquant.ptq.quantize_leaf import Done
from jaxquant.ptq.residual_rotation import Residual, rotate_residual
from jaxquant.recipes.recipe import Plan, Recipe, resolve
from jaxquant.recipes.serialize import register
from jaxquant.recipes.size import Size, size
from jaxquant.theory.roofline import Roofline, roofline
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

if TYPE_CHECKING:
    from jaxquant.training.latent import freeze, labels, latent, thaw, trained
    from jaxquant.training.optimizers import optimizer, relative
    from jaxquant.training.qat import QAT, qat, qat_blocks
    from jaxquant.training.zeroqat import ZeroQAT
    from jaxquant.training.zeroth import Zeroth, zo_step, zo_value_and_grad
    from jaxquant.tuning.heal import heal, heal_blocks
    from jaxquant.tuning.learned_rotation import learn_rotation
    from jaxquant.tuning.learned_transforms import learn, learn_blocks
    from jaxquant.tuning.recoding import recode
    from jaxquant.tuning.trainable import decoded, rejoined
    from jaxquant.tuning.trainer import Healing

__version__ = "0.1.0"

__all__ = [
    "E8P",
    "KEEP",
    "LSQ",
    "METHODS",
    "MXFP4",
    "NVFP4",
    "PACT",
    "QAT",
    "AbsMean",
    "ActivationAware",
    "Activations",
    "Additive",
    "Allocation",
    "Chain",
    "Choices",
    "Dense",
    "Done",
    "Drawing",
    "DualScale",
    "EntropyCoded",
    "Estimator",
    "Explanation",
    "Float8",
    "Format",
    "Greedy",
    "GridFormat",
    "Healing",
    "Integer",
    "KVFormat",
    "Kronecker",
    "LSQRange",
    "Latent",
    "LearnedClipping",
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
    "Rounder",
    "Scaling",
    "Site",
    "Size",
    "Smooth",
    "Stats",
    "StraightThrough",
    "Stretched",
    "StretchedElastic",
    "Ternary",
    "Transform",
    "Trellis",
    "TrellisBudget",
    "Vector",
    "ZeroQAT",
    "Zeroth",
    "Zigzag",
    "allocate",
    "aqlm",
    "awq",
    "bitnet",
    "bits_per_weight",
    "calibrate",
    "decoded",
    "dequantize",
    "duquant",
    "entropy_coded",
    "exact_activations",
    "explain",
    "flatquant",
    "flattened",
    "float8",
    "fold",
    "freeze",
    "gptq",
    "heal",
    "heal_blocks",
    "labels",
    "latent",
    "learn",
    "learn_blocks",
    "learn_rotation",
    "lsq",
    "mxfp4",
    "named_method",
    "normal_float",
    "nvfp4",
    "observe",
    "optimizer",
    "pact",
    "path_leaves",
    "qat",
    "qat_blocks",
    "qtip",
    "quantize",
    "quantize_array",
    "quantize_blocks",
    "quantized",
    "quarot",
    "quip_sharp",
    "randomness",
    "recode",
    "register",
    "rejoined",
    "relative",
    "resolve",
    "restack",
    "roofline",
    "rotate_residual",
    "rtn",
    "shares",
    "sites",
    "size",
    "smoothquant",
    "ste",
    "stretched_elastic",
    "ternary",
    "thaw",
    "trained",
    "transcoded",
    "trellis",
    "unstack",
    "unstack_stats",
    "vptq",
    "with_activations",
    "zeroqat",
    "zo_step",
    "zo_value_and_grad",
]

_HOME = {
    "QAT": "training.qat",
    "Healing": "tuning.trainer",
    "ZeroQAT": "training.zeroqat",
    "Zeroth": "training.zeroth",
    "decoded": "tuning.trainable",
    "freeze": "training.latent",
    "heal": "tuning.heal",
    "heal_blocks": "tuning.heal",
    "labels": "training.latent",
    "latent": "training.latent",
    "learn": "tuning.learned_transforms",
    "learn_blocks": "tuning.learned_transforms",
    "learn_rotation": "tuning.learned_rotation",
    "optimizer": "training.optimizers",
    "qat": "training.qat",
    "qat_blocks": "training.qat",
    "recode": "tuning.recoding",
    "rejoined": "tuning.trainable",
    "relative": "training.optimizers",
    "thaw": "training.latent",
    "trained": "training.latent",
    "zo_step": "training.zeroth",
    "zo_value_and_grad": "training.zeroth",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
