"""Methods for weights alone: short compositions of a rounder and a format."""

from typing import Literal

import jax

from jaxquant.formats import (
    E8P,
    MXFP4,
    NVFP4,
    Additive,
    EntropyCoded,
    Float8,
    Integer,
    NormalFloat,
    Ternary,
    Trellis,
    TrellisBudget,
    Vector,
)
from jaxquant.methods.method import GroupSize, Method, scalar_rounder
from jaxquant.rounding import LDLQ, Beam, Nearest, TwoSided, Waterfill
from jaxquant.transforms import Rotation


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

    The least loss at given bits. A product decodes the whole stream: to serve the weights, make
    words of them once, as the commands do (`jaxquant.transcoded`). See `Waterfill` and
    `EntropyCoded`.

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
    return Method("normal_float", scalar_rounder(feedback), format)


def float8(
    variant: Literal["e4m3", "e5m2"] = "e4m3", group_size: GroupSize = -1, *, feedback: bool = False
) -> Method:
    """FP8 weights, e4m3 or e5m2, a scale per output; with `feedback`, LDLQ.

    >>> float8("e5m2").format.variant
    'e5m2'
    """
    return Method("float8", scalar_rounder(feedback), Float8(variant, group_size))


def mxfp4(*, pad: bool = False, feedback: bool = False) -> Method:
    """MXFP4 (OCP Microscaling v1.0); with `feedback`, LDLQ.

    >>> mxfp4().name
    'mxfp4'
    """
    return Method("mxfp4", scalar_rounder(feedback), MXFP4(pad))


def nvfp4(*, pad: bool = False, feedback: bool = False) -> Method:
    """NVFP4; with `feedback`, LDLQ.

    >>> nvfp4().name
    'nvfp4'
    """
    return Method("nvfp4", scalar_rounder(feedback), NVFP4(pad))
