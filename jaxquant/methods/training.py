"""Methods made for training: a format and the estimator with which `latent` trains it.

When used with `quantize`, they round to nearest.
"""

from typing import Literal

from jaxquant.core.activations import Activations
from jaxquant.estimators.input_ranges import PACT, LSQRange
from jaxquant.estimators.learned_clipping import LearnedClipping
from jaxquant.estimators.weight_estimators import LSQ, AbsMean, StraightThrough, StretchedElastic
from jaxquant.formats import Integer, Stretched, Ternary
from jaxquant.methods.method import GroupSize, Method
from jaxquant.rounding import Nearest


def ste(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    mse: bool = False,
    clipped: bool = False,
    stochastic: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Integers trained with the straight-through estimator; scales are recomputed from the weights.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      symmetric: whether codes have no zero point.
      mse: search the clipping range of each group for the least squared error.
      clipped, stochastic: see `StraightThrough`.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

    >>> ste(bits=2, clipped=True).estimator
    StraightThrough(clipped=True, stochastic=False)
    """
    format = Integer(bits, group_size, symmetric, mse, scale_dtype, pad)
    return Method("ste", Nearest(), format, estimator=StraightThrough(clipped, stochastic))


def lsq(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = True,
    init: Literal["", "format", "mean", "range"] = "",
    scale_gradient: Literal["step", "matrix", "none"] = "step",
    activation_bits: int | None = None,
    activation_symmetric: bool = True,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """Integers with learned scales, and learned zero points unless symmetric. See `LSQ`.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      symmetric: whether codes have no zero point.
      init: initial scales, see `LSQ`. "" selects the scales of least squared error at 2 bits, LSQ's
        own at 3 and 4 bits, and the full min-max range at 8 bits and for 3 and 4 bits with zero
        points. Measured on normal weights, LSQ's own scales have 1.5 times the least error at 2
        bits and ten times at 8.
      scale_gradient: normalization of the scale gradient, see `LSQ`.
      activation_bits: number of bits per activation, with one learned scale for all tokens
        (`LSQRange`); None leaves inputs unrounded. For one scale per token, set the activations of
        the method instead (`named_method("lsq", activations="int8")`).
      activation_symmetric: if False, an offset of the activations is learned too.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

    >>> lsq(bits=2).format.mse, lsq(bits=4).estimator.init, lsq(bits=8).estimator.init
    (True, 'mean', 'format')
    """
    fitted = init == "" and bits == 2
    start = init or ("mean" if symmetric and bits in (3, 4) else "format")
    format = Integer(bits, group_size, symmetric, fitted, scale_dtype, pad)
    form = _static(activation_bits, activation_symmetric)
    return Method(
        "lsq", Nearest(), format, activations=form, estimator=LSQ(start, scale_gradient),
        input_estimator=None if form is None else LSQRange(),
    )  # fmt: skip


def pact(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    activation_bits: int = 4,
    unsigned: bool = False,
    symmetric: bool = True,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """PACT: inputs clipped at a learned bound, weights by the clipped straight-through estimator.

    Args:
      bits: number of bits per weight code: 2, 3, 4 or 8.
      group_size: input channels that share a weight scale; "channel" for one scale per output
        channel, "tensor" for one per matrix.
      activation_bits: number of bits per activation, 2 to 8.
      unsigned: the inputs are not negative, as after a ReLU, see `PACT`.
      symmetric: whether weight codes have no zero point.
      scale_dtype: storage dtype of the weight scales.
      pad: allow a group size that does not divide the number of input channels.

    Source: Choi et al. 2018, arXiv:1805.06085.

    >>> str(pact().activations), pact().input_estimator
    ('int4,static,mse', PACT(unsigned=False))
    """
    format = Integer(bits, group_size, symmetric, False, scale_dtype, pad)
    form = _static(activation_bits, not unsigned)
    estimator = StraightThrough(clipped=True)
    return Method(
        "pact", Nearest(), format, activations=form, estimator=estimator,
        input_estimator=PACT(unsigned),
    )  # fmt: skip


def _static(bits: int | None, symmetric: bool) -> Activations | None:
    return None if bits is None else Activations(bits, symmetric, per="tensor", mse=True)


def stretched_elastic(
    bits: float = 2,
    group_size: GroupSize = "channel",
    *,
    scale_gradient: Literal["step", "matrix", "none"] = "matrix",
    released: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """ParetoQ: stretched codes at 1.58 and 2 bits; at 3 and 4 bits `lsq` with `init="range"`.

    See `StretchedElastic` for the estimator.

    Args:
      bits: 1.58 (ternary), 2, 3 or 4.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      scale_gradient: normalization of the scale gradient, see `LSQ`.
      released: at 1.58 bits, use the scale gradient of the released code, see `StretchedElastic`.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.
    Raises:
      ValueError: `bits` is none of these.

    Source: Liu et al. 2025, arXiv:2502.02631.

    >>> stretched_elastic(1.58).format.limits
    (-1, 1)
    """
    if bits in (3, 4):
        return lsq(int(bits), group_size, init="range", scale_gradient=scale_gradient,
                   scale_dtype=scale_dtype, pad=pad)  # fmt: skip
    if bits not in (1.58, 2):
        raise ValueError(f"bits must be 1.58, 2, 3 or 4, got {bits}")
    formats = {1.58: Ternary(group_size=group_size, scale_dtype=scale_dtype, pad=pad),
               2: Stretched(group_size, scale_dtype, pad)}  # fmt: skip
    estimator = StretchedElastic(scale_gradient=scale_gradient, released=released)
    return Method("stretched_elastic", Nearest(), formats[bits], estimator=estimator)


def zeroqat(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """ZeroQAT: integers whose clipping ranges are learned fractions of the current weight range.

    Made for training without derivatives (`zeroth`), but `qat` can train it as well. See
    `LearnedClipping`.

    Args:
      bits: number of bits per code: 2, 3, 4 or 8.
      group_size: input channels that share a scale; "channel" for one scale per output channel,
        "tensor" for one per matrix.
      symmetric: whether codes have no zero point.
      scale_dtype: storage dtype of the scales.
      pad: allow a group size that does not divide the number of input channels.

    Source: ZeroQAT, arXiv:2509.00031; OmniQuant, arXiv:2308.13137.

    >>> zeroqat(bits=2).estimator.scale_gradient
    'none'
    """
    format = Integer(bits, group_size, symmetric, True, scale_dtype, pad)
    return Method("zeroqat", Nearest(), format, estimator=LearnedClipping())


def bitnet(activations: Activations | str | None = "int8", *, axis: str = "") -> Method:
    """BitNet b1.58: ternary weights scaled by their mean magnitude, int8 inputs scaled per token.

    Scales are float32, since in half precision one code in a few hundred would differ. See
    `AbsMean`.

    Args:
      activations: how inputs are rounded, see `Method`.
      axis: inside `shard_map`, the mesh axis over which matrices are split; "" if there is none.

    Source: Ma et al. 2024, arXiv:2402.17764.

    >>> str(bitnet().activations)
    'int8'
    """
    format = Ternary(group_size="tensor", scale_dtype="float32")
    form = Activations.of(activations)
    return Method("bitnet", Nearest(), format, activations=form, estimator=AbsMean(axis=axis))
