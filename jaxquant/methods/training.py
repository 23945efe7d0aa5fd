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
    activations: Activations | str | None = None,
) -> Method:
    """Integers trained with the straight-through estimator; scales are recomputed from the weights.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
      mse: if True, the range of each group is chosen by a search for the least squared error
        (default False: the full range).
      clipped: whether weights outside the range get no gradient, see `StraightThrough` (default
        False).
      stochastic: whether weights are rounded up or down at random, in proportion to their distance
        (default False).
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

    Source: Bengio et al. 2013, arXiv:1308.3432.

    >>> ste(bits=2, clipped=True).estimator
    StraightThrough(clipped=True, stochastic=False)
    """
    format = Integer(bits, group_size, symmetric, mse, scale_dtype, pad)
    estimator = StraightThrough(clipped, stochastic)
    form = Activations.of(activations)
    return Method("ste", Nearest(), format, activations=form, estimator=estimator)


def lsq(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = True,
    init: Literal["", "format", "mean", "range"] = "",
    scale_gradient: Literal["step", "matrix", "none"] = "step",
    scale_dtype: str = "float16",
    pad: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """Integers with learned scales, and learned zero points unless symmetric. See `LSQ`.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      symmetric: if True, codes have no zero point (default True). Zero points cost bytes and fit
        ranges that are not centered on 0.
      init: initial scales, see `LSQ`. "" (the default) selects the scales of least squared error at
        2 bits, LSQ's own at 3 and 4 bits, and the full min-max range at 8 bits and for 3 and 4 bits
        with zero points. Measured on normal weights, LSQ's own scales have 1.5 times the least
        error at 2 bits and ten times at 8.
      scale_gradient: normalization of the scale gradient, see `LSQ`: "step" (the default), "matrix"
        or "none".
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      activations: how inputs are rounded: an `Activations` or its string form; None (the default)
        leaves them unrounded. The scale of a static form ("int8,static,mse"), and its offset if the
        form is asymmetric, are learned (`LSQRange`); those of one scale per token ("int8") are
        computed.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Esser et al. 2019, arXiv:1902.08153; LSQ+, Bhalgat et al. 2020, arXiv:2004.09576.

    >>> lsq(bits=2).format.mse, lsq(bits=4).estimator.init, lsq(bits=8).estimator.init
    (True, 'mean', 'format')
    >>> lsq(activations="int8,static,mse").input_estimator
    LSQRange()
    """
    fitted = init == "" and bits == 2
    start = init or ("mean" if symmetric and bits in (3, 4) else "format")
    format = Integer(bits, group_size, symmetric, fitted, scale_dtype, pad)
    form = Activations.of(activations)
    ranges = LSQRange() if form is not None and form.static else None
    estimator = LSQ(start, scale_gradient)
    return Method(
        "lsq", Nearest(), format, activations=form, estimator=estimator, input_estimator=ranges
    )


def pact(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    activations: Activations | str = "int4,static,mse",
    symmetric: bool = True,
    scale_dtype: str = "float16",
    pad: bool = False,
) -> Method:
    """PACT: inputs clipped at a learned bound, weights by the clipped straight-through estimator.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      activations: how inputs are rounded: an `Activations` or its string form, with a static scale
        (default "int4,static,mse"). An asymmetric form ("int4,asymmetric,static,mse") is for inputs
        that are not negative, as after a ReLU: codes then run from 0 to the bound, see `PACT`.
      symmetric: if True, codes have no zero point (default True). Zero points cost bytes and fit
        ranges that are not centered on 0.
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range, or the scale of `activations`
        is not static.

    Source: Choi et al. 2018, arXiv:1805.06085.

    >>> str(pact().activations), pact().input_estimator
    ('int4,static,mse', PACT(unsigned=False))
    """
    form = Activations.of(activations)
    if form is None or not form.static:
        raise ValueError(
            'pact needs activations with a static scale, such as "int4,static,mse", '
            f"got {form}; for one scale per token use ste(clipped=True, "
            "activations=...)"
        )
    format = Integer(bits, group_size, symmetric, False, scale_dtype, pad)
    weights, inputs = StraightThrough(clipped=True), PACT(unsigned=not form.symmetric)
    return Method(
        "pact", Nearest(), format, activations=form, estimator=weights, input_estimator=inputs
    )


def stretched_elastic(
    bits: float = 2,
    group_size: GroupSize = "channel",
    *,
    scale_gradient: Literal["step", "matrix", "none"] = "matrix",
    released: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """ParetoQ: stretched codes at 1.58 and 2 bits; at 3 and 4 bits `lsq` with `init="range"`.

    Args:
      bits: 1.58 (ternary), 2 (the default), 3 or 4.
      group_size: number of consecutive input channels that share a scale (default "channel");
        "channel" or -1 for one scale per output channel, "tensor" for one per matrix. Smaller
        groups have a smaller error and cost more bits.
      scale_gradient: normalization of the scale gradient, see `LSQ`: "matrix" (the default), "step"
        or "none".
      released: whether the scale gradient at 1.58 bits is that of the released code, see
        `StretchedElastic` (default False).
      scale_dtype: storage dtype of the scales: "float16" (the default), "bfloat16" or "float32".
      pad: if True, the number of input channels need not be a multiple of the group size: the last
        group is padded with zeros, which are stored. If False (the default), a number that is not a
        multiple raises an error.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range, such as other `bits`.

    Source: Liu et al. 2025, arXiv:2502.02631.

    >>> stretched_elastic(1.58).format.limits
    (-1, 1)
    """
    if bits in (3, 4):
        return lsq(int(bits), group_size, init="range", scale_gradient=scale_gradient,
                   scale_dtype=scale_dtype, pad=pad, activations=activations)  # fmt: skip
    if bits not in (1.58, 2):
        raise ValueError(f"bits must be 1.58, 2, 3 or 4, got {bits}")
    formats = {1.58: Ternary(group_size=group_size, scale_dtype=scale_dtype, pad=pad),
               2: Stretched(group_size, scale_dtype, pad)}  # fmt: skip
    estimator = StretchedElastic(scale_gradient=scale_gradient, released=released)
    form = Activations.of(activations)
    return Method(
        "stretched_elastic", Nearest(), formats[bits], activations=form, estimator=estimator
    )


def zeroqat(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    symmetric: bool = False,
    scale_dtype: str = "float16",
    pad: bool = False,
    activations: Activations | str | None = None,
) -> Method:
    """ZeroQAT: integers whose clipping ranges are learned fractions of the current weight range.

    Made for training without derivatives (`training.zeroth`), but `qat` can train it as well. See
    `LearnedClipping`.

    Args:
      bits: number of bits per code: 2, 3, 4 (the default) or 8.
      group_size: number of consecutive input channels that share a scale (default 64); "channel" or
        -1 for one scale per output channel, "tensor" for one per matrix. Smaller groups have a
        smaller error and cost more bits.
      symmetric: if True, codes have no zero point (default False). Zero points cost bytes and fit
        ranges that are not centered on 0.
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

    Source: ZeroQAT, arXiv:2509.00031; OmniQuant, arXiv:2308.13137.

    >>> zeroqat(bits=2).estimator.scale_gradient
    'none'
    """
    format = Integer(bits, group_size, symmetric, True, scale_dtype, pad)
    form = Activations.of(activations)
    return Method("zeroqat", Nearest(), format, activations=form, estimator=LearnedClipping())


def bitnet(
    *,
    activations: Activations | str | None = "int8",
    axis: str = "",
) -> Method:
    """BitNet b1.58: ternary weights scaled by their mean magnitude, int8 inputs scaled per token.

    Scales are float32, since in half precision one code in a few hundred would differ. See
    `AbsMean`.

    Args:
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form (default "int8", one scale per token); None leaves them unrounded.
      axis: inside `shard_map`, the mesh axis over which matrices are split; "" (the default) if
        there is none.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Ma et al. 2024, arXiv:2402.17764.

    >>> str(bitnet().activations)
    'int8'
    """
    format = Ternary(group_size="tensor", scale_dtype="float32")
    form = Activations.of(activations)
    return Method("bitnet", Nearest(), format, activations=form, estimator=AbsMean(axis=axis))
