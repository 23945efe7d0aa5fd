"""Named methods that deal with outliers in activations, and with the weights that multiply them."""

from jaxquant.core.activations import Activations
from jaxquant.core.protocols import Format, Transform
from jaxquant.formats import Dense, Integer
from jaxquant.methods.method import GroupSize, Method, scalar_rounder
from jaxquant.rounding import Clipped
from jaxquant.transforms import ActivationAware, Chain, Greedy, Kronecker, Rotation, Smooth, Zigzag


def weights(bits: int, group_size: GroupSize, symmetric: bool, clip: float, dtype: str) -> Format:
    """Return the format of the weights: `Integer`, or `Dense` (unquantized) at 16 bits.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8; 16 leaves the weights unquantized.
      group_size, symmetric, clip: see `Integer`.
      dtype: storage dtype of the scales.
    """
    return Dense() if bits == 16 else Integer(bits, group_size, symmetric, False, dtype, clip=clip)


def smoothquant(
    bits: int = 8,
    group_size: GroupSize = "channel",
    *,
    activations: Activations | str | None = "int8",
    alpha: float | None = 0.5,
    rotate: bool = False,
    symmetric: bool = True,
    clip: float = 1.0,
    feedback: bool = False,
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """SmoothQuant: integer weights and activations, with outliers divided between the two.

    Args:
      bits: number of bits per weight code: 2, 3, 4 or 8 (default 8); 16 leaves the weights in
        floating point.
      group_size: number of consecutive input channels that share a scale (default "channel");
        "channel" or -1 for one scale per output channel, "tensor" for one per matrix. Smaller
        groups have a smaller error and cost more bits.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form (default "int8", one scale per token); None leaves them unrounded. "int8,static" uses
        one calibrated scale for all inputs of a matmul.
      alpha: smoothing strength, 0 to 1 (default 0.5), see `Smooth`: 0 leaves the outliers in
        the activations, 1 moves them all to the weights; None searches for it.
      rotate: whether a Hadamard transform follows the smoothing (default False), which spreads the
        remaining outliers.
      symmetric: if True, codes have no zero point (default True). Zero points cost bytes and fit
        ranges that are not centered on 0.
      clip: fraction of the range of the weights that is kept, in (0, 1] (default 1.0); values
        outside are clamped.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal, at least 0 (default 0.01); without `feedback` it has no effect.
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Xiao et al. 2022, arXiv:2211.10438. Here all inputs are smoothed, including those
    that do not come from a normalization layer.

    >>> str(smoothquant().activations), smoothquant(4, rotate=True).format.bits
    ('int8', 4)
    """
    side: Transform = Smooth(alpha)
    if rotate:
        side = Chain((side, Rotation(signed=False)))
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = Activations.of(activations)
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
    activations: Activations | str | None = None,
) -> Method:
    """AWQ: scale up salient channels before rounding, by amounts found by search.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 128); "channel"
        or -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      duo: whether the scales are those of AutoAWQ, which depend on the weights too, see
        `ActivationAware` (default False).
      clip: whether a search also finds a clipping bound for each group of weights, see `Clipped`
        (default True).
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal, at least 0 (default 0.01); without `feedback` it has no effect.
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

    Source: Lin et al. 2023, arXiv:2306.00978. This implementation differs from the paper: unless
    `quantize` is given `inspect`, scales are judged by the error of the matmuls; and inputs whose
    scales cannot be folded into the preceding layer are scaled too, at run time.

    >>> awq().input
    ActivationAware(duo=False, group_size=128)
    """
    rounder = scalar_rounder(feedback, damping)
    format = Integer(bits, group_size, symmetric, False, scale_dtype, pad)
    rows = group_size if isinstance(group_size, int) and group_size > 0 else 128
    side, form = ActivationAware(duo, rows), Activations.of(activations)
    return Method("awq", Clipped(rounder) if clip else rounder, format, side, activations=form)


def duquant(
    bits: int = 4,
    group_size: GroupSize = "channel",
    *,
    activations: Activations | str | None = "int4,asymmetric,clip=0.9",
    block: int = 64,
    alpha: float | None = 0.6,
    steps: int = 256,
    symmetric: bool = False,
    clip: float = 0.8,
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
      bits: number of bits per weight code: 2, 3, 4 or 8 (default 4); 16 leaves the weights in
        floating point.
      group_size: number of consecutive input channels that share a scale (default "channel");
        "channel" or -1 for one scale per output channel, "tensor" for one per matrix. Smaller
        groups have a smaller error and cost more bits.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form (default "int4,asymmetric,clip=0.9"); None leaves them unrounded.
      block: number of channels in a rotation (default 64); it must divide the number of channels of
        every input.
      alpha: smoothing strength, 0 to 1 (default 0.6), see `Smooth`: 0 leaves the outliers in
        the activations, 1 moves them all to the weights; None searches for it.
      steps: number of rotations tried, at least 1 (default 256), see `Greedy`.
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
      clip: fraction of the range of the weights that is kept, in (0, 1] (default 0.8); values
        outside are clamped.
      permute: whether the permutation and the second rotation follow the first (default True).
      shared: whether all blocks use one rotation, as in the released code (default True). A
        separate rotation for each block costs 32 block / n bits per weight with n outputs, for each
        of the two rotations.
      flat: whether the outlier is spread exactly evenly over its block, see `Greedy` (default
        False).
      by_row: whether the search is that of the released code, see `Greedy` (default False).
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default False).
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal, at least 0 (default 0.01); without `feedback` it has no effect.
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Lin et al. 2024, arXiv:2406.01721.

    >>> len(duquant().input.parts), str(duquant().activations)
    (4, 'int4,asymmetric,clip=0.9')
    """
    greedy = Greedy(block, steps, shared, flat, by_row)
    side = Chain((Smooth(alpha), greedy, *((Zigzag(block), greedy) if permute else ())))
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = Activations.of(activations)
    return Method("duquant", scalar_rounder(feedback, damping), format, side, activations=form)


def quarot(
    bits: int = 4,
    group_size: GroupSize = "channel",
    *,
    activations: Activations | str | None = "int4,clip=0.9",
    block: int | None = None,
    alpha: float | None = None,
    signed: bool = False,
    symmetric: bool = True,
    clip: float = 1.0,
    feedback: bool = True,
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """QuaRot: a Hadamard transform of every input, and weights rounded with error feedback.

    Args:
      bits: number of bits per weight code: 2, 3, 4 or 8 (default 4); 16 leaves the weights in
        floating point.
      group_size: number of consecutive input channels that share a scale (default "channel");
        "channel" or -1 for one scale per output channel, "tensor" for one per matrix. Smaller
        groups have a smaller error and cost more bits.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form (default "int4,clip=0.9"); None leaves them unrounded.
      block: number of channels in a Hadamard transform; None (the default) for one transform over
        all channels.
      alpha: strength of a smoothing before the rotation, 0 to 1, see `Smooth`, which the paper does
        not do; None (the default) for no smoothing.
      signed: whether channel signs are flipped at random before the Hadamard transform (default
        False).
      symmetric: if True, codes have no zero point (default True). Zero points cost bytes and fit
        ranges that are not centered on 0.
      clip: fraction of the range of the weights that is kept, in (0, 1] (default 1.0); values
        outside are clamped.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default True).
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal, at least 0 (default 0.01); without `feedback` it has no effect.
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Ashkboos et al. 2024, arXiv:2404.00456. This implementation differs from the paper: all
    transforms are applied at run time; `jaxquant.ptq.rotate_residual` folds a rotation of the
    residual stream into the weights around it.

    >>> quarot().input
    Rotation(block=None, sort=False, signed=False)
    """
    turn = Rotation(block, signed=signed)
    side: Transform = turn if alpha is None else Chain((Smooth(alpha), turn))
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = Activations.of(activations)
    return Method("quarot", scalar_rounder(feedback, damping), format, side, activations=form)


def flatquant(
    bits: int = 4,
    group_size: GroupSize = "channel",
    *,
    activations: Activations | str | None = "int4,asymmetric,clip=0.9",
    alpha: float = 0.5,
    orthogonal: bool = False,
    symmetric: bool = False,
    clip: float = 0.8,
    feedback: bool = True,
    damping: float = 0.01,
    scale_dtype: str = "float16",
) -> Method:
    """FlatQuant: transform every input by a learned Kronecker product.

    To learn the transforms, call `jaxquant.tuning.learn_blocks` or `jaxquant.tuning.learn`, and
    pass the result to `quantize` as `transforms`. Otherwise the inputs are smoothed and
    Hadamard-transformed.

    Args:
      bits: number of bits per weight code: 2, 3, 4 or 8 (default 4); 16 leaves the weights in
        floating point.
      group_size: number of consecutive input channels that share a scale (default "channel");
        "channel" or -1 for one scale per output channel, "tensor" for one per matrix. Smaller
        groups have a smaller error and cost more bits.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form (default "int4,asymmetric,clip=0.9"); None leaves them unrounded.
      alpha: strength of the initial smoothing, 0 to 1, see `Smooth` (default 0.5).
      orthogonal: whether the learned matrices are restricted to rotations (default False).
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
      clip: fraction of the range of the weights that is kept, in (0, 1] (default 0.8); values
        outside are clamped.
      feedback: whether weights are rounded with error feedback (`LDLQ`), which needs second
        moments, instead of to nearest (default True).
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal, at least 0 (default 0.01); without `feedback` it has no effect.
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Sun et al. 2024, arXiv:2410.09426.

    >>> flatquant().input
    Kronecker(alpha=0.5, orthogonal=False)
    """
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    side, form = Kronecker(alpha, orthogonal), Activations.of(activations)
    return Method("flatquant", scalar_rounder(feedback, damping), format, side, activations=form)
