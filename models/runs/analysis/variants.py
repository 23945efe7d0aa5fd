"""Quantized versions of the reference: what they are, and the commands that make them."""

import os
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import jaxquant as jq
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import BUILTIN
from jaxquant_models.runs.analysis.request import AnalysisRequest
from jaxquant_models.runs.quantization import plan_model
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.recipes import recipe_of

GROUPS = (64, 32, 16, 8, -1)  # sizes that are tried where the method's own does not divide


class Variant(NamedTuple):
    """A quantized version of the reference.

    Attributes:
      method: name of the method.
      bits: bits of its codes.
      options: other options of the method.
      request: the request that makes it.
    """

    method: str
    bits: int
    options: Mapping[str, Any]
    request: QuantizationRequest

    @property
    def name(self) -> str:
        """A short name."""
        return f"{self.method} {self.bits} bits"


def variants_of(request: AnalysisRequest, outline: Model) -> list[Variant]:
    """Return the versions that an analysis makes, as `jaxquant quantize` would make them.

    A method that does not fit the model is left out.

    Args:
      request: the request of the analysis.
      outline: the reference, with shapes in place of arrays.
    """
    found = [_variant(request, outline, *each) for each in request.size.variants]
    return [variant for variant in found if variant is not None]


def _variant(request: AnalysisRequest, outline: Model, method: str, bits: int) -> Variant | None:
    for options in ({}, *({"group_size": size} for size in GROUPS)):
        made = quantization_request(request, recipe_of(jq.METHODS[method](bits=bits, **options)))
        try:
            plan_model(outline, made.recipe)
        except ValueError:  # the group size does not divide
            continue
        return Variant(method, bits, options, made)
    return None


def quantization_request(request: AnalysisRequest, recipe: jq.Recipe) -> QuantizationRequest:
    """Return the request of `jaxquant quantize --effort EFFORT` for a recipe.

    Args:
      request: the request of the analysis, which has the effort.
      recipe: the recipe.
    """
    return QuantizationRequest(
        recipe=recipe, choices=(), target_bits=0.0, exact_prefix=0, calibration=BUILTIN,
        calibration_tokens=request.size.calibration_tokens, weighting="gradient", seed=request.seed,
        rotation="", rotating=None, learning=None, healing=None, recoding=None,
        layers_healed=False, heal_text="",
    )  # fmt: skip


def command_of(spec: str, variant: Variant, effort: str) -> str:
    """Return the command line that makes a version.

    Args:
      spec: the model that is quantized.
      variant: the version.
      effort: the effort.
    """
    options = [f"--{k.replace('_', '-')} {v}" for k, v in variant.options.items()]
    out = f"{variant.method}-{variant.bits}"
    what = f"--method {variant.method} --bits {variant.bits}"
    parts = ["jaxquant quantize", quoted(spec), what, *options]
    return " ".join([*parts, f"--effort {effort} --out {out}"])


def quoted(spec: str) -> str:
    """Return a model for a command line that may be run in another directory.

    Args:
      spec: a name, or a path, which becomes absolute.
    """
    return shlex.quote(spec if spec in registry.NAMED else os.path.abspath(spec))
