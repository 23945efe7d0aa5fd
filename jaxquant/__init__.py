"""jaxquant: a functional quantization library for JAX.

The names here are those that a user meets first. Every other public name is exported from one
subpackage: `jaxquant.formats`, `transforms`, `rounding`, `estimators`, `calibration`, `methods`,
`adapters`, `recipes`, `ptq`, `storage`, `theory`, `selection`, `tuning`, `training`, `distributed`
and `core`. What trains, saves or selects is imported on first access, because it needs Optax, Orbax
or SciPy; quantization and inference do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant import (
    adapters,
    calibration,
    core,
    distributed,
    estimators,
    formats,
    methods,
    ptq,
    recipes,
    rounding,
    theory,
    transforms,
)
from jaxquant.calibration.calibrate import calibrate
from jaxquant.calibration.statistics import Stats
from jaxquant.core.activations import Activations
from jaxquant.core.dispatch import explain, quantized
from jaxquant.core.sites import sites
from jaxquant.core.tensor import QTensor
from jaxquant.core.tree import bits_per_weight, dequantize
from jaxquant.evaluation import evaluate
from jaxquant.methods.codebooks import aqlm, entropy_coded, qtip, quip_sharp, trellis, vptq
from jaxquant.methods.method import KEEP, Method
from jaxquant.methods.outliers import awq, duquant, flatquant, quarot, smoothquant
from jaxquant.methods.registry import METHODS
from jaxquant.methods.training import bitnet, lsq, pact, ste, stretched_elastic, zeroqat
from jaxquant.methods.weights import (
    float8,
    gptq,
    mxfp4,
    nf4,
    normal_float,
    nvfp4,
    rtn,
    ternary,
)
from jaxquant.ptq.quantize import quantize, quantize_array
from jaxquant.recipes.recipe import Recipe
from jaxquant.recipes.size import size
from jaxquant.recipes.summary import summary
from jaxquant.theory.roofline import roofline

if TYPE_CHECKING:
    from jaxquant import selection as selection
    from jaxquant import storage as storage
    from jaxquant import training as training
    from jaxquant import tuning as tuning
    from jaxquant.storage.checkpoint import load, save
    from jaxquant.training.adaptation import adapt
    from jaxquant.training.latent import freeze, labels, latent, thaw, trained
    from jaxquant.training.merging import merge
    from jaxquant.training.qat import qat
    from jaxquant.tuning.heal import heal

__version__ = "0.2.0"

__all__ = [
    "KEEP",
    "METHODS",
    "Activations",
    "Method",
    "QTensor",
    "Recipe",
    "Stats",
    "adapt",
    "aqlm",
    "awq",
    "bitnet",
    "bits_per_weight",
    "calibrate",
    "dequantize",
    "duquant",
    "entropy_coded",
    "evaluate",
    "explain",
    "flatquant",
    "float8",
    "freeze",
    "gptq",
    "heal",
    "labels",
    "latent",
    "load",
    "lsq",
    "merge",
    "mxfp4",
    "nf4",
    "normal_float",
    "nvfp4",
    "pact",
    "qat",
    "qtip",
    "quantize",
    "quantize_array",
    "quantized",
    "quarot",
    "quip_sharp",
    "roofline",
    "rtn",
    "save",
    "sites",
    "size",
    "smoothquant",
    "ste",
    "stretched_elastic",
    "summary",
    "ternary",
    "thaw",
    "trained",
    "trellis",
    "vptq",
    "zeroqat",
]

# Modules of the names that are imported on first access, and the subpackages that are.
_LATER = {
    "adapt": "training.adaptation",
    "freeze": "training.latent",
    "heal": "tuning.heal",
    "labels": "training.latent",
    "latent": "training.latent",
    "load": "storage.checkpoint",
    "merge": "training.merging",
    "qat": "training.qat",
    "save": "storage.checkpoint",
    "thaw": "training.latent",
    "trained": "training.latent",
}
_LATER_ROOMS = ("lossless", "selection", "storage", "training", "tuning")
_ROOMS = (
    adapters, calibration, core, distributed, estimators, formats, methods, ptq, recipes, rounding,
    theory, transforms,
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER_ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_home_of(name)}")


def _home_of(name: str) -> str:
    """Say in which subpackage a name is, if in any."""
    rooms = [*_ROOMS, *map(__getattr__, _LATER_ROOMS)] if not name.startswith("_") else []
    homes = [room.__name__ for room in rooms if name in room.__all__]
    return f"; it is {homes[0]}.{name}" if homes else ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER_ROOMS})
