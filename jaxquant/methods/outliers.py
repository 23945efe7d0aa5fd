"""Named methods that deal with outliers in activations, and with the weights that multiply them."""

from typing import Any

from jaxquant.core.activations import Activations
from jaxquant.core.fields import shown
from jaxquant.core.protocols import Format, Transform
from jaxquant.formats import Dense, Integer
from jaxquant.methods.method import GroupSize, Method, scalar_rounder
from jaxquant.rounding import Clipped
from jaxquant.transforms import ActivationAware, Chain, Greedy, Kronecker, Rotation, Smooth, Zigzag


def weights(bits: int, group_size: GroupSize, symmetric: bool, clip: float, dtype: str) -> Format:
    """Return the format of the weights: `Integer`, or `Dense` (unquantized) from 16 bits on.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8; 16 or more leaves the weights unquantized.
      group_size, symmetric, clip: see `Integer`.
      dtype: storage dtype of the scales.
    """
    return Dense() if bits >= 16 else Integer(bits, group_size, symmetric, False, dtype, clip=clip)


def inputs(bits: int, symmetric: bool, clip: float, static: bool = False) -> Activations | None:
    """Return the activation format: integers, or None (no rounding) from 16 bits on.

    Args:
      bits: number of bits per code, 2 to 8; 16 or more leaves the activations unrounded.
      symmetric: whether codes have no zero point.
      clip: fraction of the range kept; values outside are clamped.
      static: use one calibrated scale for the whole tensor instead of one scale per token.
    Raises:
      ValueError: `bits` is not an int, or the combination is not supported by `Activations`.
    """
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise ValueError(f"activation_bits must be int, got {shown(bits)}")
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
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """SmoothQuant: integer weights and activations, with outliers shared between the two.

    Args:
      bits, activation_bits: bits per weight and per activation; 16 leaves that side in floating
        point.
      group_size: input channels that share a weight scale; "channel" for one scale per output
        channel, "tensor" for one per matrix.
      alpha: smoothing strength, 0 to 1, see `Smooth`; None searches for it.
      rotate: apply a Hadamard transform after smoothing.
      symmetric: whether weights and activations have no zero points.
      clip, activation_clip: fraction of the range of weights and of activations kept, in (0, 1];
        values outside are clamped.
      static: use one calibrated scale for all activations of a layer instead of one per token.
      feedback: round with `LDLQ` instead of to nearest.
      damping: see `LDLQ`; ignored without `feedback`.
      scale_dtype: storage dtype of the weight scales.

    Source: Xiao et al. 2022, arXiv:2211.10438. We differ: all inputs are smoothed, including those
    that do not come from a normalization layer.

    >>> str(smoothquant().activations), smoothquant(4, rotate=True).format.bits
    ('int8', 4)
    """
    side: Transform = Smooth(alpha)
    if rotate:
        side = Chain((side, Rotation(signed=False)))
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = inputs(activation_bits, symmetric, activation_clip, static)
    return Method("smoothquant", scalar_rounder(feedback, damping), format, side, activations=form)


def awq(
    bits: int = 4,
    group_size: GroupSize = 128,
    *,
    duo: bool = False,
    clip: bool = True,
    symmetric: bool = False,
    feedback: bool = False,
    damping: float = 0.01,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """AWQ: scale up salient channels before rounding, by a searched amount.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      duo: use the scales of AutoAWQ, which depend on the weights too, see `ActivationAware`.
      clip: also search a clipping bound for each group of weights, see `Clipped`.
      symmetric: whether codes have no zero point.
      feedback: round with `LDLQ` instead of to nearest.
      damping: see `LDLQ`; ignored without `feedback`.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

    Source: Lin et al. 2023, arXiv:2306.00978. We differ: unless `quantize` is given `inspect`,
    scales are judged by the error of the matrix products; and inputs whose scales cannot be folded
    into the preceding layer are scaled too, at run time.

    >>> awq().input
    ActivationAware(duo=False, group_size=128)
    """
    rounder = scalar_rounder(feedback, damping)
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
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """DuQuant: smooth, rotate in blocks, permute channels in zigzag order, and rotate again.

    Args:
      bits, activation_bits: bits per weight and per activation; 16 leaves that side in floating
        point.
      group_size: input channels that share a weight scale; "channel" for one scale per output
        channel, "tensor" for one per matrix.
      block: number of channels in a rotation; it must divide the number of channels of every input.
      alpha: smoothing strength, 0 to 1, see `Smooth`; None searches for it.
      steps: number of rotations tried, see `Greedy`.
      symmetric: whether weights and activations have no zero points.
      clip, activation_clip: fraction of the range of weights and of activations kept, in (0, 1];
        values outside are clamped.
      permute: if False, stop after the first rotation.
      shared: use one rotation for all blocks, as the released code does. A separate rotation for
        each block costs 32 block / n bits per weight with n outputs, for each of the two rotations.
      flat, by_row: see `Greedy`; `by_row` reproduces the released code.
      feedback: round with `LDLQ` instead of to nearest.
      damping: see `LDLQ`; ignored without `feedback`.
      scale_dtype: storage dtype of the weight scales.

    Source: Lin et al. 2024, arXiv:2406.01721.

    >>> len(duquant().input.parts), str(duquant().activations)
    (4, 'int4,asymmetric,clip=0.9')
    """
    greedy = Greedy(block, steps, shared, flat, by_row)
    side = Chain((Smooth(alpha), greedy, *((Zigzag(block), greedy) if permute else ())))
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = inputs(activation_bits, symmetric, activation_clip)
    return Method("duquant", scalar_rounder(feedback, damping), format, side, activations=form)


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
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """QuaRot: a Hadamard transform of every input, and weights rounded with error feedback.

    Args:
      bits, activation_bits: bits per weight and per activation; 16 leaves that side in floating
        point.
      group_size: input channels that share a weight scale; "channel" for one scale per output
        channel, "tensor" for one per matrix.
      block: number of channels in a Hadamard transform; None for one transform over all channels.
      alpha: smooth with this strength before rotating, see `Smooth`, which the paper does not do;
        None for no smoothing.
      signed: flip channel signs at random before the Hadamard transform.
      symmetric: whether weights and activations have no zero points.
      clip, activation_clip: fraction of the range of weights and of activations kept, in (0, 1];
        values outside are clamped.
      feedback: round with `LDLQ` (GPTQ) instead of to nearest.
      damping: see `LDLQ`; ignored without `feedback`.
      scale_dtype: storage dtype of the weight scales.

    Source: Ashkboos et al. 2024, arXiv:2404.00456. We differ: all transforms are applied at run
    time; `jaxquant.rotate_residual` folds a rotation of the residual stream into the weights around
    it.

    >>> quarot().input
    Rotation(block=None, sort=False, signed=False)
    """
    turn = Rotation(block, signed=signed)
    side: Transform = turn if alpha is None else Chain((Smooth(alpha), turn))
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = inputs(activation_bits, symmetric, activation_clip)
    return Method("quarot", scalar_rounder(feedback, damping), format, side, activations=form)


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
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """FlatQuant: transform every input by a learned Kronecker product.

    To learn the transforms, call `jaxquant.learn_blocks` or `jaxquant.learn`, and pass the result
    to `quantize` as `transforms`. Otherwise the inputs are smoothed and Hadamard-transformed.

    Args:
      bits, activation_bits: bits per weight and per activation; 16 leaves that side in floating
        point.
      group_size: input channels that share a weight scale; "channel" for one scale per output
        channel, "tensor" for one per matrix.
      alpha: strength of the initial smoothing, 0 to 1, see `Smooth`.
      orthogonal: restrict the learned matrices to rotations.
      symmetric: whether weights and activations have no zero points.
      clip, activation_clip: fraction of the range of weights and of activations kept, in (0, 1];
        values outside are clamped.
      feedback: round with `LDLQ` instead of to nearest.
      damping: see `LDLQ`; ignored without `feedback`.
      scale_dtype: storage dtype of the weight scales.

    Source: Sun et al. 2024, arXiv:2410.09426.

    >>> flatquant().input
    Kronecker(alpha=0.5, orthogonal=False)
    """
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = inputs(activation_bits, symmetric, activation_clip)
    side = Kronecker(alpha, orthogonal)
    return Method("flatquant", scalar_rounder(feedback, damping), format, side, activations=form)
