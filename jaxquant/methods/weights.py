"""Weight-only methods that code each weight by itself: integers, ternary, NormalFloat, floats."""

from typing import Literal

from jaxquant.core.activations import Activations
from jaxquant.formats import (
    MXFP4,
    NVFP4,
    Float8,
    Integer,
    NormalFloat,
    Ternary,
)
from jaxquant.methods.method import GroupSize, Method, scalar_rounder
from jaxquant.rounding import LDLQ, Nearest


def rtn(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    mse: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """Round to nearest: integer codes with a scale and a zero point per group. See `Integer`.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
      mse: if True, the range of each group is chosen by a search for the least squared error
        (default False: the full range).
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    >>> rtn(bits=3).format.bits
    3
    """
    format = Integer(bits, group_size, symmetric, mse, scale_dtype, pad)
    return Method("rtn", Nearest(), format, activations=Activations.of(activations))


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
    activations: Activations | str | None = None,
) -> Method:
    """GPTQ: error feedback guided by the second moment of the inputs. See `LDLQ` and `Integer`.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
      mse: if True, the range of each group is chosen by a search for the least squared error
        (default False: the full range).
      act_order: whether input channels are rounded in order of decreasing second moment (default
        True), which reduces the error.
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal before error feedback, at least 0 (default 0.01). Larger values rely
        less on the statistics.
      block_size: number of input channels that are rounded between two dense updates of the
        remaining ones, at least 1 (default 128); it changes the speed, not the result.
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Frantar et al. 2022, arXiv:2210.17323.

    >>> gptq(bits=3, act_order=False).rounder.act_order
    False
    """
    rounder = LDLQ(damping, act_order, block_size)
    format = Integer(bits, group_size, symmetric, mse, scale_dtype, pad)
    return Method("gptq", rounder, format, activations=Activations.of(activations))


def ternary(
    group_size: GroupSize = 64,
    *,
    feedback: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """Ternary codes -1, 0 and 1, five to a byte. See `Ternary`.

    Args:
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    >>> ternary().format.limits
    (-1, 1)
    """
    format = Ternary(group_size=group_size, scale_dtype=scale_dtype, pad=pad)
    return Method(
        "ternary", scalar_rounder(feedback), format, activations=Activations.of(activations)
    )


def normal_float(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    double_quant: bool = False,
    scale_dtype: str = "float32",
    pad: bool = False,
    feedback: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """NormalFloat: NF4, NF3 or NF2, the quantiles of a normal distribution. See `NormalFloat`.

    Args:
      bits: number of bits per code: 2, 3 or 4 (the default).
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      double_quant: whether the scales are themselves stored as 8-bit codes (default False), which
        saves 0.37 bits per weight of float32 scales in groups of 64.
      scale_dtype: storage dtype of the scales: "float32" (the default), "bfloat16" or "float16".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Dettmers et al. 2023, arXiv:2305.14314.

    >>> normal_float(bits=3).format.bits
    3
    """
    format = NormalFloat(bits, group_size, scale_dtype, double_quant, pad)
    return Method(
        "normal_float", scalar_rounder(feedback), format, activations=Activations.of(activations)
    )


def nf4(
    group_size: GroupSize = 64,
    *,
    double_quant: bool = False,
    scale_dtype: str = "float32",
    pad: bool = False,
    feedback: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """NF4, as QLoRA stores the weights it fine-tunes: `normal_float` at 4 bits.

    Args:
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      double_quant: whether the scales are themselves stored as 8-bit codes (default False), which
        saves 0.37 bits per weight of float32 scales in groups of 64.
      scale_dtype: storage dtype of the scales: "float32" (the default), "bfloat16" or "float16".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Dettmers et al. 2023, arXiv:2305.14314.

    >>> nf4(double_quant=True).format
    NormalFloat(bits=4, group_size=64, scale_dtype='float32', double_quant=True, pad=False)
    """
    format = NormalFloat(4, group_size, scale_dtype, double_quant, pad)
    return Method("nf4", scalar_rounder(feedback), format, activations=Activations.of(activations))


def float8(
    variant: Literal["e4m3", "e5m2"] = "e4m3",
    group_size: GroupSize = "channel",
    *,
    feedback: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """FP8 weights, e4m3 or e5m2. See `Float8`.

    Args:
      variant: "e4m3" (the default: 3 bits of mantissa, up to 448) or "e5m2" (2 bits, up to 57344).
      group_size: number of consecutive input channels that share a scale (default "channel");
        "channel" or -1 for one scale per output channel, "tensor" for one per matrix. Smaller
        groups have a smaller error and cost more bits.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Micikevicius et al. 2022, arXiv:2209.05433.

    >>> float8("e5m2").format.variant
    'e5m2'
    """
    format = Float8(variant, group_size)
    return Method(
        "float8", scalar_rounder(feedback), format, activations=Activations.of(activations)
    )


def mxfp4(
    *,
    pad: bool = False,
    feedback: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """MXFP4 weights: e2m1 codes with a power-of-two scale for every 32. See `MXFP4`.

    Args:
      pad: whether a number of input channels that 32 does not divide is padded with zeros (default
        False: that is an error).
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: OCP Microscaling v1.0.

    >>> mxfp4().name
    'mxfp4'
    """
    return Method(
        "mxfp4", scalar_rounder(feedback), MXFP4(pad), activations=Activations.of(activations)
    )


def nvfp4(
    *,
    pad: bool = False,
    feedback: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """NVFP4 weights: e2m1 codes with an e4m3 scale for every 16. See `NVFP4`.

    Args:
      pad: whether a number of input channels that 16 does not divide is padded with zeros (default
        False: that is an error).
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: NVIDIA 2025, arXiv:2509.25149.

    >>> nvfp4().name
    'nvfp4'
    """
    return Method(
        "nvfp4", scalar_rounder(feedback), NVFP4(pad), activations=Activations.of(activations)
    )
