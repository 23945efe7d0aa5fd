"""What the methods of a request require of calibration."""

from typing import NamedTuple

from jaxquant_models.runs.quantization_request import QuantizationRequest

SAMPLE = 256  # rows of every input kept to fit transforms: the largest, and as many at random


class Needs(NamedTuple):
    """What the methods of a request require.

    Attributes:
      statistics: whether any input statistics are required.
      gram: whether second moments of inputs are required.
      channels: whether magnitudes of single channels, or a sample, are required.
      output: patterns of the weights whose output-side statistics are required.
      sample: number of rows of each input to keep, both of those with the largest entries and of
        random ones.
      module_loss: whether scales are searched for by the error of a module's output.
    """

    statistics: bool
    gram: bool
    channels: bool
    output: tuple[str, ...]
    sample: int
    module_loss: bool


def needs_of(request: QuantizationRequest) -> Needs:
    """Return what the methods of a request require.

    Args:
      request: the request.
    """
    rules, allocates = request.rules, request.recipe is None
    methods = [method for _, method in rules]
    gram = allocates or any(m.needs_gram for m in methods)
    sample = any(m.needs_sample for m in methods)
    channels = sample or any(m.needs_channels for m in methods)
    output = tuple(dict.fromkeys(path for path, m in rules if m.needs_output))
    searched = (m for m in methods if getattr(m.input, "searched", False))
    return Needs(
        statistics=bool(gram or channels or output),
        gram=gram,
        channels=channels,
        output=output,
        sample=SAMPLE if sample else 0,
        module_loss=any(m.activations is None for m in searched),
    )
