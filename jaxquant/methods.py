"""Named methods: short compositions of a rounder and a format."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxquant.activations import Activations
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
from jaxquant.fields import check_fields
from jaxquant.rounding import LDLQ, Beam, Clipped, Nearest, TwoSided, Waterfill
from jaxquant.transforms import ActivationAware, Chain, Greedy, Kronecker, Rotation, Smooth, Zigzag

GroupSize = int | Literal["channel", "tensor"]


@dataclasses.dataclass(frozen=True)
class Method:
    """What to do with a weight: the rounder that chooses codes, the format that stores them.

    `input` and `output` are transforms of the channels on either side (`Rotation`), or None.
    `activations`: how inputs are rounded before they meet the codes, an `Activations` or its text
    ("int8", "int4,asymmetric"); None or "float": not at all.
    """

    name: str
    rounder: Any
    format: Any
    input: Any = None
    output: Any = None
    activations: Activations | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "activations", Activations.of(self.activations))
        if not hasattr(self.rounder, "needs_gram") or not hasattr(self.format, "tile"):
            raise ValueError(
                f"a method is a rounder (LDLQ, ...) and a format (Integer, ...), got "
                f"{self.rounder!r} and {self.format!r}"
            )

    @property
    def needs_gram(self) -> bool:
        """Whether it reads the second moment of the inputs."""
        search = getattr(self.input, "searched", False) and self.activations is None
        return search or self.rounder.needs_gram or getattr(self.input, "needs_gram", False)

    @property
    def needs_output(self) -> bool:
        """Whether it reads the second moment of the loss gradients at the outputs."""
        return self.rounder.needs_output or getattr(self.output, "needs_gram", False)

    @property
    def needs_channels(self) -> bool:
        """Whether it reads the sizes of the inputs' channels."""
        static = self.activations is not None and self.activations.static
        return static or getattr(self.input, "needs_channels", False)

    @property
    def needs_sample(self) -> bool:
        """Whether it reads rows of the inputs."""
        search = getattr(self.input, "searched", False) and self.activations is not None
        return search or getattr(self.input, "needs_sample", False)

    def stored(self, k: int, n: int) -> tuple[int, int]:
        """Rows and columns that the format stores for a matrix [k, n]; ValueError if it cannot."""
        if self.input is not None:
            k = self.input.size(k)
        if self.output is not None:
            n = self.output.size(n)
        self.format.check_shape(k, n)
        return k, n


@dataclasses.dataclass(frozen=True)
class Keep:
    """Leave a leaf as it is."""

    name: str = "keep"


KEEP = Keep()


def rtn(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    mse: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Round to nearest. See `Integer` for the arguments.

    >>> rtn(bits=3).format.bits
    3
    """
    return Method("rtn", Nearest(), Integer(bits, group_size, symmetric, mse, scale_dtype, pad))


def gptq(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    mse: bool = False,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Error feedback against the input's second moment (Frantar et al. 2022, arXiv:2210.17323).

    See `LDLQ` and `Integer` for the arguments.

    >>> gptq(bits=3, act_order=False).rounder.act_order
    False
    """
    return Method(
        "gptq",
        LDLQ(damping, act_order, block_size),
        Integer(bits, group_size, symmetric, mse, scale_dtype, pad),
    )


def ternary(
    group_size: GroupSize = 64,
    *,
    feedback: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Codes -1, 0, 1; with `feedback`, LDLQ against the statistics.

    >>> ternary().format.limits
    (-1, 1)
    """
    rounder = LDLQ() if feedback else Nearest()
    return Method(
        "ternary", rounder, Ternary(group_size=group_size, scale_dtype=scale_dtype, pad=pad)
    )


def quip_sharp(bits: int = 2, *, passes: int = 4, damping: float = 0.01) -> Method:
    """QuIP#: rotation on both sides, E8P lattice, block feedback (Tseng et al. 2024,
    arXiv:2402.04396).

    We differ: the scale is searched for on the targets that feedback makes.

    >>> quip_sharp().format.bits
    2
    """
    scales = (1.0, 1.05, 1.1, 1.15, 1.2) if bits == 2 else (0.95, 1.0, 1.05, 1.1)
    rounder = LDLQ(damping, act_order=False, passes=passes, scales=scales)
    return Method("quip_sharp", rounder, E8P(bits), Rotation(), Rotation())


def qtip(
    bits: int = 2,
    *,
    L: int | None = None,
    code: str = "mul1",
    two_sided: bool = False,
    passes: int = 0,
    damping: float = 0.01,
) -> Method:
    """QTIP: rotation on both sides, trellis, block feedback (Tseng et al. 2024, arXiv:2406.11235).

    Args:
      L: bits of a state; default 12 on a CPU, 16 where there is an accelerator.
      two_sided: feed errors across outputs too, which needs output-side statistics (YAQA, Tseng
        et al. 2025, arXiv:2505.22988).
      passes: see `LDLQ`; not with `two_sided`.

    >>> qtip(bits=3).format.rates
    (3,)
    """
    if two_sided and passes:
        raise ValueError("passes come after one-sided feedback; leave them out with two_sided")
    one = LDLQ(damping, act_order=False, passes=passes, scales=(0.95, 1.0, 1.05, 1.1))
    rounder = TwoSided(damping, scale=1.02) if two_sided else one
    format = Trellis((bits,), _states(L), code)
    return Method("qtip", rounder, format, Rotation(), Rotation())


def trellis(
    bits: float = 2.0,
    *,
    block: int = 64,
    L: int | None = None,
    code: str = "mul1",
    passes: int = 1,
    damping: float = 0.01,
) -> Method:
    """Trellis with rates allocated over input channels; any average rate.

    Channels are sorted by energy, rotated in blocks, and each block is given the whole number of
    bits a weight that takes most off the loss. Ours; see `TrellisBudget` for the arguments.

    >>> trellis(bits=2.25).format.bits
    2.25
    """
    rounder = LDLQ(damping, act_order=False, passes=passes, scales=(0.95, 1.0, 1.05, 1.1))
    format = TrellisBudget(bits, block, _states(L), code)
    return Method("trellis", rounder, format, Rotation(block, sort=True), Rotation())


def _states(L: int | None) -> int:
    return L or (12 if jax.default_backend() == "cpu" else 16)


def aqlm(
    codebooks: int = 2, bits: int = 8, group: int = 8, *, beam: int = 8, sweeps: int = 6
) -> Method:
    """AQLM: sums of learned vectors (Egiazarian et al. 2024, arXiv:2401.06118).

    We differ: the first codes come by error feedback, the tables by conjugate gradients. See
    `Beam` and `Additive` for the arguments.

    >>> aqlm().format.group
    8
    """
    return Method("aqlm", Beam(beam, sweeps), Additive(codebooks, bits, group))


def vptq(
    length: int = 8,
    bits: int = 8,
    residual_bits: int = 8,
    *,
    outliers: float = 0.0,
    beam: int = 8,
    sweeps: int = 6,
) -> Method:
    """VPTQ: learned vectors along the outputs (Liu et al. 2024, arXiv:2409.17066).

    We differ: inputs are rotated first, and codes and tables refined as in `aqlm`. See `Beam` and
    `Vector` for the arguments.

    >>> vptq().format.length
    8
    """
    format = Vector(length, bits, residual_bits, outliers)
    return Method("vptq", Beam(beam, sweeps), format, input=Rotation())


def entropy_coded(
    bits: float = 2.0,
    *,
    states: int = 64,
    two_sided: bool = False,
    damping: float = 0.02,
    chain: int | None = None,
) -> Method:
    """Water-filled feedback and a real entropy coder; any rate, kept to the byte.

    The least loss at given bits, and the slowest product: the stream is decoded for every one.
    See `Waterfill` and `EntropyCoded`.

    Args:
      two_sided: outputs get widths by what the loss gradient says they matter, and errors are fed
        on to later ones; needs output-side statistics.
      chain: default 256, and 128 for two-sided feedback, which goes from chain to chain.

    >>> entropy_coded(bits=1.5).format.bits
    1.5
    """
    rounder = Waterfill(damping, 0.5 if two_sided else None)
    format = EntropyCoded(bits, states, chain or (128 if two_sided else 256))
    return Method("entropy_coded", rounder, format)


def normal_float(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    double_quant: bool = False,
    scale_dtype: str = "float32",
    pad: bool = False,
    feedback: bool = False,
) -> Method:
    """NF4, NF3, NF2 (Dettmers et al. 2023, arXiv:2305.14314); with `feedback`, LDLQ.

    >>> normal_float().format.bits
    4
    """
    format = NormalFloat(bits, group_size, scale_dtype, double_quant, pad)
    return Method("normal_float", _scalar_rounder(feedback), format)


def float8(
    variant: Literal["e4m3", "e5m2"] = "e4m3", group_size: GroupSize = -1, *, feedback: bool = False
) -> Method:
    """FP8 weights, e4m3 or e5m2, a scale per output; with `feedback`, LDLQ.

    >>> float8("e5m2").format.variant
    'e5m2'
    """
    return Method("float8", _scalar_rounder(feedback), Float8(variant, group_size))


def mxfp4(*, pad: bool = False, feedback: bool = False) -> Method:
    """MXFP4 (OCP Microscaling v1.0); with `feedback`, LDLQ.

    >>> mxfp4().name
    'mxfp4'
    """
    return Method("mxfp4", _scalar_rounder(feedback), MXFP4(pad))


def nvfp4(*, pad: bool = False, feedback: bool = False) -> Method:
    """NVFP4; with `feedback`, LDLQ.

    >>> nvfp4().name
    'nvfp4'
    """
    return Method("nvfp4", _scalar_rounder(feedback), NVFP4(pad))


def _scalar_rounder(feedback: bool) -> LDLQ | Nearest:
    return LDLQ() if feedback else Nearest()


def _weights(bits: int, group_size: GroupSize, symmetric: bool, clip: float, dtype: str) -> Any:
    """Integers, or from 16 bits on the weights as they are."""
    return Dense() if bits >= 16 else Integer(bits, group_size, symmetric, False, dtype, clip=clip)


def _inputs(bits: int, symmetric: bool, clip: float, static: bool = False) -> Activations | None:
    """Integers per token, or of a known range; from 16 bits on floats."""
    per: Any = "tensor" if static else "token"
    return None if bits >= 16 else Activations(bits, symmetric, clip, per)


def smoothquant(
    bits: int = 8,
    group_size: GroupSize = "channel",
    *,
    activation_bits: int = 8,
    alpha: float | None = 0.5,
    rotate: bool = False,
    symmetric: bool = True,
    clip: float = 1.0,
    activation_clip: float = 1.0,
    static: bool = False,
    feedback: bool = False,
    scale_dtype: str = "float16",
) -> Method:
    """SmoothQuant: integers on both sides, outliers shared out between them
    (Xiao et al. 2022, arXiv:2211.10438).

    We differ: all inputs are smoothed, those that no norm makes too.

    Args:
      bits, activation_bits: 16: left as floats.
      alpha: see `Smooth`; None: searched for.
      rotate: a Hadamard transform after smoothing.
      symmetric: of weights and of activations.
      clip, activation_clip: of the ranges of weights and of activations, what is kept.
      static: one scale for all activations, from calibration, not one per token.
      feedback: LDLQ in place of nearest rounding.

    >>> str(smoothquant().activations), smoothquant(4, rotate=True).format.bits
    ('int8', 4)
    """
    side: Any = Smooth(alpha)
    if rotate:
        side = Chain((side, Rotation(signed=False)))
    format = _weights(bits, group_size, symmetric, clip, scale_dtype)
    form = _inputs(activation_bits, symmetric, activation_clip, static)
    return Method("smoothquant", _scalar_rounder(feedback), format, side, activations=form)


def awq(
    bits: int = 4,
    group_size: GroupSize = 128,
    *,
    duo: bool = False,
    clip: bool = True,
    symmetric: bool = False,
    feedback: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """AWQ: channels that matter are scaled up before rounding, by a search (Lin et al. 2023,
    arXiv:2306.00978).

    We differ: where no inspection is given (`quantize`), scales are judged by the error of the
    products, and outputs that no scale can be folded into are scaled too, online.

    Args:
      duo: see `ActivationAware`.
      clip: search a bound for the weights of every group too, see `Clipped`.
      feedback: LDLQ in place of nearest rounding.
      The others: see `Integer`.

    >>> awq().input
    ActivationAware(duo=False, group_size=128)
    """
    rounder = _scalar_rounder(feedback)
    format = Integer(bits, group_size, symmetric, False, scale_dtype, pad)
    rows = group_size if isinstance(group_size, int) and group_size > 0 else 128
    side = ActivationAware(duo, rows)
    return Method("awq", Clipped(rounder) if clip else rounder, format, side)


def duquant(
    bits: int = 4,
    group_size: GroupSize = "channel",
    *,
    activation_bits: int = 4,
    block: int = 64,
    alpha: float | None = 0.6,
    steps: int = 256,
    symmetric: bool = False,
    clip: float = 0.8,
    activation_clip: float = 0.9,
    permute: bool = True,
    shared: bool = True,
    flat: bool = False,
    by_row: bool = False,
    feedback: bool = False,
    scale_dtype: str = "float16",
) -> Method:
    """DuQuant: smoothed, rotated in blocks, dealt out in zigzag, rotated again
    (Lin et al. 2024, arXiv:2406.01721).

    Args:
      bits, activation_bits: 16: left as floats.
      block: channels of a rotation; it divides those of every input.
      alpha: of smoothing, see `Smooth`.
      symmetric: of weights and of activations.
      clip, activation_clip: of the ranges of weights and of activations, what is kept.
      permute: False: the first rotation alone.
      shared: one rotation for all blocks, as in the released code: a rotation of its own for each
        costs 32 block / n bits per weight of n outputs, twice.
      steps, flat, by_row: see `Greedy`; `by_row` is the released code's.
      feedback: LDLQ in place of nearest rounding.

    >>> len(duquant().input.parts), str(duquant().activations)
    (4, 'int4,asymmetric,clip=0.9')
    """
    greedy = Greedy(block, steps, shared, flat, by_row)
    side = Chain((Smooth(alpha), greedy, *((Zigzag(block), greedy) if permute else ())))
    format = _weights(bits, group_size, symmetric, clip, scale_dtype)
    form = _inputs(activation_bits, symmetric, activation_clip)
    return Method("duquant", _scalar_rounder(feedback), format, side, activations=form)


def quarot(
    bits: int = 4,
    group_size: GroupSize = "channel",
    *,
    activation_bits: int = 4,
    block: int | None = None,
    alpha: float | None = None,
    signed: bool = False,
    symmetric: bool = True,
    clip: float = 1.0,
    activation_clip: float = 0.9,
    feedback: bool = True,
    scale_dtype: str = "float16",
) -> Method:
    """QuaRot: a Hadamard transform of every input, weights by error feedback
    (Ashkboos et al. 2024, arXiv:2404.00456).

    We differ: all transforms are done online; `transforms.residual` folds those of the residual
    stream into the weights around it.

    Args:
      bits, activation_bits: 16: left as floats.
      block: channels of a transform; None: all.
      alpha: smooth first, see `Smooth`, which the paper does not; None: do not.
      signed: random signs before the transform.
      symmetric: of weights and of activations.
      clip, activation_clip: of the ranges of weights and of activations, what is kept.
      feedback: LDLQ (GPTQ) rather than nearest rounding.

    >>> quarot().input
    Rotation(block=None, sort=False, signed=False)
    """
    turn = Rotation(block, signed=signed)
    side: Any = turn if alpha is None else Chain((Smooth(alpha), turn))
    format = _weights(bits, group_size, symmetric, clip, scale_dtype)
    form = _inputs(activation_bits, symmetric, activation_clip)
    return Method("quarot", _scalar_rounder(feedback), format, side, activations=form)


def flatquant(
    bits: int = 4,
    group_size: GroupSize = "channel",
    *,
    activation_bits: int = 4,
    alpha: float = 0.5,
    orthogonal: bool = False,
    symmetric: bool = False,
    clip: float = 0.8,
    activation_clip: float = 0.9,
    feedback: bool = True,
    scale_dtype: str = "float16",
) -> Method:
    """FlatQuant: every input through a learned Kronecker product (Sun et al. 2024,
    arXiv:2410.09426).

    Learn the transforms with `jaxquant.learn`, and give them to `quantize`; else they are Hadamard
    transforms of smoothed inputs.

    Args:
      bits, activation_bits: 16: left as floats.
      alpha: of smoothing, to begin with; see `Smooth`.
      orthogonal: learn rotations alone.
      symmetric: of weights and of activations.
      clip, activation_clip: of the ranges of weights and of activations, what is kept.
      feedback: LDLQ rather than nearest rounding.

    >>> flatquant().input
    Kronecker(alpha=0.5, orthogonal=False)
    """
    format = _weights(bits, group_size, symmetric, clip, scale_dtype)
    form = _inputs(activation_bits, symmetric, activation_clip)
    side = Kronecker(alpha, orthogonal)
    return Method("flatquant", _scalar_rounder(feedback), format, side, activations=form)


METHODS: dict[str, Callable[..., Method]] = {
    f.__name__: f
    for f in (
        rtn, gptq, ternary, quip_sharp, qtip, trellis, aqlm, vptq, entropy_coded,
        normal_float, float8, mxfp4, nvfp4, smoothquant, awq, duquant, quarot, flatquant,
    )
}  # fmt: skip


def named_method(name: str, **options: Any) -> Method:
    """A method by name; options that are None are left at their defaults.

    Every method takes `activations` beside its own options, see `Method`, or `activation_bits`, a
    whole number: symmetric codes per token where the method does not say otherwise.

    Raises:
      ValueError: unknown name, an option the method does not have, or a bad value.

    >>> named_method("gptq", bits=3, group_size=None).format.bits
    3
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    given = {k: v for k, v in options.items() if v is not None}
    form = {"activations": given.pop("activations")} if "activations" in given else {}
    own = inspect.signature(METHODS[name]).parameters
    if "activation_bits" in given and "activation_bits" not in own:
        form = {"activations": _inputs(given.pop("activation_bits"), True, 1.0)} | form
    try:
        return dataclasses.replace(METHODS[name](**given), **form)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
