"""Named methods against outliers: of activations, and of the weights that these make matter."""

from typing import Any

from jaxquant.core.activations import Activations
from jaxquant.core.fields import shown
from jaxquant.core.protocols import Format, Transform
from jaxquant.formats import Dense, Integer
from jaxquant.methods.method import GroupSize, Method, scalar_rounder
from jaxquant.rounding import Clipped
from jaxquant.transforms import ActivationAware, Chain, Greedy, Kronecker, Rotation, Smooth, Zigzag


def weights(bits: int, group_size: GroupSize, symmetric: bool, clip: float, dtype: str) -> Format:
    """Integers, or from 16 bits on the weights as they are."""
    return Dense() if bits >= 16 else Integer(bits, group_size, symmetric, False, dtype, clip=clip)


def inputs(bits: int, symmetric: bool, clip: float, static: bool = False) -> Activations | None:
    """Integers per token, or of a known range; from 16 bits on floats."""
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
      feedback: LDLQ in place of nearest rounding. damping: see `LDLQ`.

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
    """AWQ: channels that matter are scaled up before rounding, by a search (Lin et al. 2023,
    arXiv:2306.00978).

    We differ: where no inspection is given (`quantize`), scales are judged by the error of the
    products, and outputs that no scale can be folded into are scaled too, online.

    Args:
      duo: see `ActivationAware`.
      clip: search a bound for the weights of every group too, see `Clipped`.
      feedback: LDLQ in place of nearest rounding. damping: see `LDLQ`.
      The others: see `Integer`.

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
      feedback: LDLQ in place of nearest rounding. damping: see `LDLQ`.

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
    """QuaRot: a Hadamard transform of every input, weights by error feedback
    (Ashkboos et al. 2024, arXiv:2404.00456).

    We differ: all transforms are done online; `jaxquant.rotate_residual` folds one of the residual
    stream into the weights around it.

    Args:
      bits, activation_bits: 16: left as floats.
      block: channels of a transform; None: all.
      alpha: smooth first, see `Smooth`, which the paper does not; None: do not.
      signed: random signs before the transform.
      symmetric: of weights and of activations.
      clip, activation_clip: of the ranges of weights and of activations, what is kept.
      feedback: LDLQ (GPTQ) rather than nearest rounding. damping: see `LDLQ`.

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
    """FlatQuant: every input through a learned Kronecker product (Sun et al. 2024,
    arXiv:2410.09426).

    Learn the transforms (`jaxquant.learn_blocks`, `jaxquant.learn`) and give them to `quantize`;
    else they are Hadamard transforms of smoothed inputs.

    Args:
      bits, activation_bits: 16: left as floats.
      alpha: of smoothing, to begin with; see `Smooth`.
      orthogonal: learn rotations alone.
      symmetric: of weights and of activations.
      clip, activation_clip: of the ranges of weights and of activations, what is kept.
      feedback: LDLQ rather than nearest rounding. damping: see `LDLQ`.

    >>> flatquant().input
    Kronecker(alpha=0.5, orthogonal=False)
    """
    format = weights(bits, group_size, symmetric, clip, scale_dtype)
    form = inputs(activation_bits, symmetric, activation_clip)
    side = Kronecker(alpha, orthogonal)
    return Method("flatquant", scalar_rounder(feedback, damping), format, side, activations=form)
