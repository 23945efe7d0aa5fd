"""Methods made for training: a format, and the estimator that `latent` trains it by.

As methods of `quantize` they round to nearest.
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
    """Integers whose scales follow the weights, straight through. See `StraightThrough`.

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
    """Integers with learned scales, and zero points unless symmetric. See `LSQ`.

    Args:
      activation_bits: of inputs, by one learned scale for all tokens (`LSQRange`), and an offset
        unless `activation_symmetric`; None: as they are. For scales per token give the method
        another form of activations (`named_method("lsq", activations="int8")`).
      init: "" begins at the scales of least squared error at 2 bits, at LSQ's own at 3 and 4, at
        those of the largest weight at 8 (and wherever there are zero points): measured on normal
        weights, LSQ's have 1.5 times the least error at 2 bits and ten times at 8.

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
    """Inputs clipped at a learned bound (`PACT`), weights clipped straight through.

    Choi et al. 2018, arXiv:1805.06085.

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
    """ParetoQ: at 2 and 1.58 bits stretched codes, at 3 and 4 `lsq` from the largest weight.

    See `StretchedElastic` (Liu et al. 2025, arXiv:2502.02631).

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
    """Integers whose ranges are learned parts of those of the weights of the moment.

    Made for training without derivatives (`zeroth`); `qat` trains it as well. See
    `LearnedClipping` (ZeroQAT, arXiv:2509.00031; OmniQuant, arXiv:2308.13137).

    >>> zeroqat(bits=2).estimator.scale_gradient
    'none'
    """
    format = Integer(bits, group_size, symmetric, True, scale_dtype, pad)
    return Method("zeroqat", Nearest(), format, estimator=LearnedClipping())


def bitnet(activations: Activations | str | None = "int8", *, axis: str = "") -> Method:
    """BitNet b1.58's weights and inputs: ternary by absmean, int8 per token by absmax.

    Scales are float32: in half precision a code in a few hundred would be another.
    See `AbsMean` (Ma et al. 2024, arXiv:2402.17764).

    >>> str(bitnet().activations)
    'int8'
    """
    format = Ternary(group_size="tensor", scale_dtype="float32")
    form = Activations.of(activations)
    return Method("bitnet", Nearest(), format, activations=form, estimator=AbsMean(axis=axis))
