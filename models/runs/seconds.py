"""The time that a layer-by-layer quantization is expected to take.

The constants were set by hand to agree with runs on one machine, `MACHINE`: those of rtn with the
three sizes of `python -m tests.benchmarks.real_sizes`, those of gptq with one run of 135 million
weights and with the seconds per layer of 7 billion. Another machine needs other constants.
"""

import jaxquant as jq
from jaxquant_models.runs.needs import Needs
from jaxquant_models.runs.quantization_request import QuantizationRequest

MACHINE = "2 cores of an AMD EPYC, without a GPU"
START = 20.0  # seconds: Python, reading the text, compiling
READ = 6.0  # seconds per billion weights: two bytes each are read for the digest, and to be used
STATISTICS = 0.05  # seconds per billion weights and token
# Seconds per billion weights that a method takes to round them.
ROUNDING = {"rtn": 20.0, "gptq": 250.0}


def expected_seconds(
    plan: jq.recipes.Plan, needs: Needs, request: QuantizationRequest
) -> float | None:
    """Return the seconds that a run is expected to take on `MACHINE`.

    Args:
      plan: the resolved recipe.
      needs: what its methods require.
      request: the request.
    Returns:
      The seconds, or None if a method or a step of the request has not been measured.
    """
    steps = request.recipe is None or request.heals or request.training or request.rotation
    if steps or any(entry.method.name not in ROUNDING for entry in plan.weights):
        return None
    billions = sum(entry.size for entry in plan.entries) / 1e9
    rounding = sum(ROUNDING[entry.method.name] * entry.size / 1e9 for entry in plan.weights)
    statistics = STATISTICS * request.calibration_tokens * billions if needs.statistics else 0.0
    return START + READ * billions + statistics + rounding
