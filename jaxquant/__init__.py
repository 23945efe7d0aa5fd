"""jaxquant: a functional quantization stack for JAX.

What trains is imported when it is first asked for: it needs Optax, and those who only quantize and
serve do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant.calibration.calibrate import Stats, calibrate
from jaxquant.calibration.observe import Observation, observe
from jaxquant.core.activations import Activations, exact_activations
from jaxquant.core.dispatch import Explanation, explain, quantized
from jaxquant.core.paths import path_leaves
from jaxquant.core.sites import Site, sites
from jaxquant.core.tensor import QTensor
from jaxquant.estimators.input_ranges import PACT, LSQRange
from jaxquant.estimators.kurtosis import flattened
from jaxquant.estimators.latent import Drawing, Latent
from jaxquant.estimators.learned_clipping import LearnedClipping
from jaxquant.estimators.surrogates import (
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
from jaxquant.methods.registry import (
    KEEP,
    METHODS,
    Method,
    aqlm,
    awq,
    bitnet,
    duquant,
    entropy_coded,
    flatquant,
    float8,
    gptq,
    lsq,
    mxfp4,
    named_method,
    normal_float,
    nvfp4,
    pact,
    qtip,
    quarot,
    quip_sharp,
    rtn,
    smoothquant,
    ste,
    stretched_elastic,
    ternary,
    trellis,
    vptq,
    zeroqat,
)
from jaxquant.ptq.allocate import Allocation, Choices, Option, allocate
from jaxquant.ptq.bit_shares import shares
from jaxquant.ptq.blockwise import quantize_blocks
from jaxquant.ptq.folding import fold
from jaxquant.ptq.layer_stacks import restack, unstack, unstack_stats
from jaxquant.ptq.quantize import (
    Done,
    bits_per_weight,
    dequantize,
    quantize,
    quantize_array,
    with_activations,
)
from jaxquant.ptq.residual_rotation import Residual, rotate_residual
from jaxquant.recipes.recipe import Plan, Recipe, resolve
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
    from jaxquant.training.descent import QAT
    from jaxquant.training.latent import freeze, labels, latent, thaw, trained
    from jaxquant.training.optimizers import optimizer, relative
    from jaxquant.training.qat import qat, qat_blocks
    from jaxquant.training.zeroqat import ZeroQAT
    from jaxquant.training.zeroth import Zeroth, zo_step, zo_value_and_grad
    from jaxquant.tuning.heal import Healing, heal, heal_blocks, recode
    from jaxquant.tuning.learned_rotation import learn_rotation
    from jaxquant.tuning.learned_transforms import learn, learn_blocks
    from jaxquant.tuning.trainable import decoded, rejoined

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
    "Explanation",
    "Float8",
    "Greedy",
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
    "Scaling",
    "Site",
    "Size",
    "Smooth",
    "Stats",
    "StraightThrough",
    "Stretched",
    "StretchedElastic",
    "Ternary",
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
    "QAT": "training.descent",
    "Healing": "tuning.heal",
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
    "recode": "tuning.heal",
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
