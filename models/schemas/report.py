"""Schema of the report.json that `jaxquant analyze` writes, and of its parts.

Numbers that could not be measured are null; a section that was not asked for is null or empty.
`version` rises with every change that a reader could notice.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

VERSION = 1


class Part(BaseModel):
    """A part of the report: its fields are those listed, no others, and no number is NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Part):
    """What the model is.

    Attributes:
      model: the MODEL that the command was given.
      against: the reference MODEL; null if there is none.
      text: the text that was used: its name, and its number of tokens.
      architecture: fields of the configuration, by name.
      parameters: number of parameters.
      bytes: bytes of all parameters in memory.
      bytes_on_disk: bytes of the files; null if unknown.
      bits_per_weight: bits per quantized weight, side information included.
      bits_over_all: bits over all parameters.
      methods: number of matrices (those of a stack counted one by one) by the method or type in
        which the files store them.
    """

    model: str
    against: str | None
    text: str
    tokens: int
    architecture: dict[str, int | float | bool | str]
    parameters: int
    bytes: int
    bytes_on_disk: int | None
    bits_per_weight: FiniteFloat
    bits_over_all: FiniteFloat
    methods: dict[str, int]


class TensorRow(Part):
    """One matrix or one stack; means over the matrices of a stack.

    Attributes:
      path: path of the parameter.
      kind: the name of the weight without its layer, such as "mlp/down".
      shape: its shape.
      method, format: how it is stored.
      bytes: bytes in memory.
      stored: stored bits per weight, side information included.
      entropy: entropy of the codes, or of the floats, per weight.
      ideal: bits per weight of an ideal lossless code of what is stored.
      exponent: entropy of the exponents of the (dequantized or reference) floats.
      distortion: mean squared error over the variance of the reference weight; null without a
        reference that differs.
      output_distortion: the same, weighted by the second moments of the inputs.
      shannon: R(D) of a Gaussian at that distortion, in bits.
      gap: stored - shannon, in bits.
      gap_decibels: the same in decibels (6.02 dB a bit).
      temperature: -d loss / d bits at this point, in nats per 10^6 stored bits; equal in all
        tensors at an optimal allocation.
      largest: largest |weight| over the root mean square.
      kurtosis: excess kurtosis of the weights.
      outliers: kinds of outliers among the inputs ("channel", "token", "massive").
    """

    path: str
    kind: str
    shape: list[int]
    method: str
    format: str
    bytes: int
    stored: FiniteFloat
    entropy: FiniteFloat | None
    ideal: FiniteFloat | None
    exponent: FiniteFloat | None
    distortion: FiniteFloat | None
    output_distortion: FiniteFloat | None
    shannon: FiniteFloat | None
    gap: FiniteFloat | None
    gap_decibels: FiniteFloat | None
    temperature: FiniteFloat | None
    largest: FiniteFloat
    kurtosis: FiniteFloat
    outliers: list[str]


class Histogram(Part):
    """Exponents of the weights of one kind.

    Attributes:
      kind: the kind of weight, or "all".
      first: the exponent of the first count (of 2).
      counts: number of weights for each exponent from `first` on.
      entropy: entropy in bits.
    """

    kind: str
    first: int
    counts: list[int]
    entropy: FiniteFloat


class Point(Part):
    """One quantized variant on the rate-quality plane.

    Attributes:
      name: short name, such as "gptq 3 bits".
      command: the command line that makes it; "" for the model itself.
      bits_per_weight: bits per quantized weight.
      bytes: bytes of all parameters in memory.
      kl: mean KL divergence from the reference, nats per token.
      top1: top-1 agreement.
      perplexity: of the variant on the text.
      on_frontier: whether every other point has more bytes or a higher KL, or equals this one.
    """

    name: str
    command: str
    bits_per_weight: FiniteFloat
    bytes: int
    kl: FiniteFloat
    top1: FiniteFloat
    perplexity: FiniteFloat
    on_frontier: bool


class Frontier(Part):
    """The variants that were run.

    Attributes:
      reference: the model against which KL is measured, and its perplexity.
      points: all variants, the model itself included if it differs from the reference.
      tokens: number of scored tokens.
    """

    reference: str
    perplexity: FiniteFloat
    points: list[Point]
    tokens: int


class Dimensions(Part):
    """Intrinsic dimension of the hidden states after every layer.

    Attributes:
      estimators: the names of the estimators.
      layers: for each layer, the value of each estimator.
      reference: the same for the reference; null without one.
      points: number of vectors of each layer.
    """

    estimators: list[str]
    layers: list[list[FiniteFloat]]
    reference: list[list[FiniteFloat]] | None
    points: int


class LimitRow(Part):
    """One row of `jaxquant.theory.limits.suite.run_suite`; see `theory.limits.limit.Limit`."""

    name: str
    statement: str
    kind: Literal["theorem", "expectation", "survival", "description"]
    measured: FiniteFloat | None
    bound: FiniteFloat | None
    holds: bool | None
    verdict: str
    seconds: FiniteFloat
    note: str


class ChipRow(Part):
    """The bounds of this model on one chip.

    Attributes:
      chip: name of the chip.
      source: where its figures come from.
      fits: whether weights and the cache of one sequence fit in memory.
      decode: most tokens per second at batch 1 and the context of `context`.
      prefill: most tokens per second of a prompt of `context` tokens.
      wall: what bounds decoding: "memory" or "compute".
      critical_batch: batch from which decoding is bound by compute; null if it never is.
      intensity: operations per byte of decoding at batch 1.
      ridge: operations per byte at which the chip's two roofs meet.
      joules: energy per token at batch 1; null where no constant is known.
      bandwidth: bytes per second of the chip's memory, for the figure; null leaves it out there.
      prefill_intensity: operations per byte of that prompt, for the figure.
    """

    chip: str
    source: str
    fits: bool
    decode: FiniteFloat
    prefill: FiniteFloat
    wall: str
    critical_batch: FiniteFloat | None
    intensity: FiniteFloat
    ridge: FiniteFloat
    joules: FiniteFloat | None
    bandwidth: FiniteFloat | None = None
    prefill_intensity: FiniteFloat | None = None


class Energy(Part):
    """The energy of one decoded token, in joules, under stated constants.

    Attributes:
      node: name of the set of constants.
      constants: the constants, by name, each with its unit in the name.
      sources: where each constant comes from.
      weights, cache: joules to move weights and the key-value cache.
      arithmetic: joules of multiplications and additions.
      landauer: joules of erasing as many bits as are moved, at 300 K.
      by_bits: (bits per weight, joules of movement, joules of arithmetic) of the same model
        at other widths, for the figure.
    """

    node: str
    constants: dict[str, FiniteFloat]
    sources: dict[str, str]
    weights: FiniteFloat
    cache: FiniteFloat
    arithmetic: FiniteFloat
    landauer: FiniteFloat
    by_bits: list[tuple[FiniteFloat, FiniteFloat, FiniteFloat]]


class Advice(Part):
    """What to do.

    Attributes:
      command: a command line to paste.
      reason: one or two sentences that say why, with numbers.
      bytes: bytes of the result, as measured or predicted.
      kl: KL of the result.
      kl_now: KL of the model as it is, at its bytes; null if the model is the reference.
      measured: whether `kl` was measured (a variant that was run), or predicted.
    """

    command: str
    reason: str
    bytes: int
    kl: FiniteFloat
    kl_now: FiniteFloat | None
    measured: bool


class Report(Part):
    """The whole report.

    Attributes:
      version: version of this schema.
      made: date and time (ISO 8601, UTC), version of jaxquant and of JAX.
      seconds: time of each stage.
      context: number of tokens in the cache that roofline and energy assume.
      findings: the sentences that head the page, the most surprising first.
      notes: what was left out, and why.
    """

    version: Literal[1] = VERSION
    made: dict[str, str]
    seconds: dict[str, FiniteFloat]
    identity: Identity
    tensors: list[TensorRow]
    histograms: list[Histogram]
    frontier: Frontier | None
    dimensions: Dimensions | None
    limits: list[LimitRow]
    context: int
    roofline: list[ChipRow]
    energy: Energy | None
    advice: list[Advice]
    findings: list[str]
    notes: list[str]
