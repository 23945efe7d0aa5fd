"""Weight-only methods: short compositions of a rounder and a format."""

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
    """Round to nearest. See `Integer`.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      symmetric: whether codes have no zero point.
      mse: search the clipping range of each group for the least squared error.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

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
    """GPTQ: error feedback against the second moment of the inputs. See `LDLQ` and `Integer`.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      symmetric: whether codes have no zero point.
      mse: search the clipping range of each group for the least squared error.
      act_order: round the input channels in order of decreasing second moment.
      damping: fraction of the mean of diag(H) added to the diagonal.
      block_size: rows between two dense updates; it changes the speed, not the result.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

    Source: Frantar et al. 2022, arXiv:2210.17323.

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
    """Ternary codes -1, 0 and 1. See `Ternary`.

    Args:
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      feedback: round with `LDLQ` against the second moment of the inputs instead of to nearest.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

    >>> ternary().format.limits
    (-1, 1)
    """
    rounder = LDLQ() if feedback else Nearest()
    return Method(
        "ternary", rounder, Ternary(group_size=group_size, scale_dtype=scale_dtype, pad=pad)
    )


def quip_sharp(bits: int = 2, *, passes: int = 4, damping: float = 0.01) -> Method:
    """QuIP#: rotations on both sides, the E8P lattice codebook and block error feedback.

    Args:
      bits: number of bits per weight: 2, 3 or 4, see `E8P`.
      passes: sweeps of coordinate descent after error feedback, see `LDLQ`.
      damping: fraction of the mean of diag(H) added to the diagonal.

    Source: Tseng et al. 2024, arXiv:2402.04396. We differ: the scale is searched on the targets
    that error feedback produces.

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
    """QTIP: rotations on both sides, trellis-coded quantization and block error feedback.

    Args:
      bits: number of bits per weight, a whole number from 1 to 8, see `Trellis`.
      L: number of bits of a trellis state; the default is 12 on a CPU and 16 on an accelerator.
      code: function from states to values, see `Trellis`.
      two_sided: also feed errors across output channels, which needs the second moment of the loss
        gradients at the outputs (YAQA, Tseng et al. 2025, arXiv:2505.22988).
      passes: sweeps of coordinate descent after error feedback, see `LDLQ`; must be 0 with
        `two_sided`.
      damping: fraction of the mean of diag(H) added to the diagonal.
    Raises:
      ValueError: both `two_sided` and `passes` are given.

    Source: Tseng et al. 2024, arXiv:2406.11235.

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
    """Trellis codes with bit rates allocated over the input channels, at any average rate.

    Channels are sorted by energy and rotated in blocks. Each block gets a whole number of bits per
    weight, chosen so that each bit goes where it reduces the loss most. See `TrellisBudget`.

    Args:
      bits: average number of bits per weight, above 0 and at most 8.
      block: number of input channels in a block, a multiple of 16 for which a Hadamard matrix
        exists; channels are padded with zeros to whole blocks.
      L: number of bits of a trellis state; the default is 12 on a CPU and 16 on an accelerator.
      code: function from states to values, see `Trellis`.
      passes: sweeps of coordinate descent after error feedback, see `LDLQ`.
      damping: fraction of the mean of diag(H) added to the diagonal.

    Source: ours.

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
    """AQLM: sums of learned codebook vectors. See `Beam` and `Additive`.

    Args:
      codebooks: number of vectors summed for each group.
      bits: number of bits per code; each codebook has 2**bits vectors.
      group: number of consecutive input channels that one code covers.
      beam: beam width of the code search.
      sweeps: number of alternations between fitting the codebooks and updating the codes.

    Source: Egiazarian et al. 2024, arXiv:2401.06118. We differ: the initial codes come from error
    feedback, and the codebooks are fitted by conjugate gradients.

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
    """VPTQ: learned codebook vectors along the output channels. See `Beam` and `Vector`.

    Args:
      length: number of consecutive output channels that one code covers.
      bits: number of bits per code; the codebook has 2**bits vectors.
      residual_bits: the same for a second, residual codebook; 0 for none.
      outliers: fraction of the input channels that have codebooks of their own, in [0, 1).
      beam: beam width of the code search.
      sweeps: number of alternations between fitting the codebooks and updating the codes.

    Source: Liu et al. 2024, arXiv:2409.17066. We differ: inputs are rotated first, and codes and
    codebooks are refined as in `aqlm`.

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
    """Water-filled error feedback with entropy coding: any rate, met to the byte.

    This method has the least loss at a given number of bits. Since each matrix product decodes the
    whole stream, convert the weights to fixed-width words once before serving, as the command-line
    tools do (`jaxquant.transcoded`). See `Waterfill` and `EntropyCoded`.

    Args:
      bits: number of bits per weight, everything included; above 0 and at most 12.
      states: number of trellis states, see `EntropyCoded`.
      two_sided: also choose step sizes per output channel by the second moment of the loss
        gradients, and feed errors on to later output channels; needs output-side statistics.
      damping: fraction of the mean of diag(H) added to the diagonal.
      chain: maximum number of weights in a row that share a trellis. The default is 256, and 128
        with `two_sided`, where feedback goes from chain to chain.

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
    """NormalFloat: NF4, NF3 or NF2. See `NormalFloat`.

    Args:
      bits: number of bits per code: 2, 3 or 4.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      double_quant: store the scales as 8-bit codes.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.
      feedback: round with `LDLQ` instead of to nearest.

    Source: Dettmers et al. 2023, arXiv:2305.14314.

    >>> normal_float().format.bits
    4
    """
    format = NormalFloat(bits, group_size, scale_dtype, double_quant, pad)
    return Method("normal_float", scalar_rounder(feedback), format)


def float8(
    variant: Literal["e4m3", "e5m2"] = "e4m3", group_size: GroupSize = -1, *, feedback: bool = False
) -> Method:
    """FP8 weights, e4m3 or e5m2. See `Float8`.

    Args:
      variant: "e4m3" or "e5m2".
      group_size: input channels that share a scale; -1 or "channel" for one scale per output
        channel, "tensor" for one per matrix.
      feedback: round with `LDLQ` instead of to nearest.

    >>> float8("e5m2").format.variant
    'e5m2'
    """
    return Method("float8", scalar_rounder(feedback), Float8(variant, group_size))


def mxfp4(*, pad: bool = False, feedback: bool = False) -> Method:
    """MXFP4 weights. See `MXFP4`.

    Args:
      pad: allow a number of input channels that 32 does not divide.
      feedback: round with `LDLQ` instead of to nearest.

    Source: OCP Microscaling v1.0.

    >>> mxfp4().name
    'mxfp4'
    """
    return Method("mxfp4", scalar_rounder(feedback), MXFP4(pad))


def nvfp4(*, pad: bool = False, feedback: bool = False) -> Method:
    """NVFP4 weights. See `NVFP4`.

    Args:
      pad: allow a number of input channels that 16 does not divide.
      feedback: round with `LDLQ` instead of to nearest.

    >>> nvfp4().name
    'nvfp4'
    """
    return Method("nvfp4", scalar_rounder(feedback), NVFP4(pad))
