"""Weight-only methods whose codes cover several weights: lattices, trellises, learned vectors."""

import jax

from jaxquant.core.activations import Activations
from jaxquant.formats import (
    E8P,
    Additive,
    EntropyCoded,
    Trellis,
    TrellisBudget,
    Vector,
)
from jaxquant.methods.method import Method
from jaxquant.rounding import LDLQ, Beam, TwoSided, Waterfill
from jaxquant.transforms import Rotation


def quip_sharp(
    bits: int = 2,
    *,
    passes: int = 4,
    damping: float = 0.01,
    activations: Activations | str | None = None,
) -> Method:
    """QuIP#: rotations on both sides, the E8P lattice codebook and block error feedback.

    Args:
      bits: number of bits per weight: 2 (the default), 3 or 4, see `E8P`.
      passes: number of sweeps of coordinate descent after error feedback, at least 0 (default 4).
        Each lowers the loss and takes about as long as the feedback.
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal before error feedback, at least 0 (default 0.01). Larger values rely
        less on the statistics.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Tseng et al. 2024, arXiv:2402.04396. This implementation differs from the paper: the
    scale is found by a search on the targets that error feedback produces.

    >>> quip_sharp().format.bits
    2
    """
    scales = (1.0, 1.05, 1.1, 1.15, 1.2) if bits == 2 else (0.95, 1.0, 1.05, 1.1)
    rounder = LDLQ(damping, act_order=False, passes=passes, scales=scales)
    return Method(
        "quip_sharp",
        rounder,
        E8P(bits),
        Rotation(),
        Rotation(),
        activations=Activations.of(activations),
    )


def qtip(
    bits: int = 2,
    *,
    L: int | None = None,
    code: str = "mul1",
    two_sided: bool = False,
    passes: int = 0,
    damping: float = 0.01,
    activations: Activations | str | None = None,
) -> Method:
    """QTIP: rotations on both sides, trellis-coded quantization and block error feedback.

    Args:
      bits: number of bits per weight, a whole number from 1 to 8 (default 2), see `Trellis`.
      L: number of bits of a trellis state, 8 to 16. The default None means 12 if JAX's default
        backend (`jax.default_backend()`) is the CPU when `qtip` is called, and 16 otherwise. Each
        additional bit lowers the loss a little and doubles the search time.
      code: function from trellis states to values, see `Trellis`: "mul1" (the default), "3inst",
        "hyb" or "vpu".
      two_sided: whether errors are also fed across output channels (default False), which needs the
        second moment of the loss gradients at the outputs (YAQA, Tseng et al. 2025,
        arXiv:2505.22988).
      passes: number of sweeps of coordinate descent after error feedback, at least 0 (default 0).
        Each lowers the loss and takes about as long as the feedback. It must be 0 with `two_sided`.
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal before error feedback, at least 0 (default 0.01). Larger values rely
        less on the statistics.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range, or both `two_sided` and
        `passes` are given.

    Source: Tseng et al. 2024, arXiv:2406.11235.

    >>> qtip(bits=3).format.rates
    (3,)
    """
    if two_sided and passes:
        raise ValueError(
            "passes must be 0 when two_sided=True: coordinate descent is only "
            "implemented for one-sided feedback"
        )
    one = LDLQ(damping, act_order=False, passes=passes, scales=(0.95, 1.0, 1.05, 1.1))
    rounder = TwoSided(damping, scale=1.02) if two_sided else one
    format = Trellis((bits,), _states(L), code)
    return Method(
        "qtip", rounder, format, Rotation(), Rotation(), activations=Activations.of(activations)
    )


def trellis(
    bits: float = 2.0,
    *,
    block: int = 64,
    L: int | None = None,
    code: str = "mul1",
    passes: int = 1,
    damping: float = 0.01,
    activations: Activations | str | None = None,
) -> Method:
    """Trellis codes with bit rates allocated over the input channels, at any average rate.

    Channels are sorted by energy and rotated in blocks. Each block gets a whole number of bits per
    weight, chosen so that each bit goes where it reduces the loss most. See `TrellisBudget`.

    Args:
      bits: average number of bits per weight, above 0 and at most 8 (default 2.0); fractions are
        allowed.
      block: number of input channels in a block (default 64), a multiple of 16 for which a Hadamard
        matrix exists; channels are padded with zeros to whole blocks.
      L: number of bits of a trellis state, 8 to 16. The default None means 12 if JAX's default
        backend (`jax.default_backend()`) is the CPU when `trellis` is called, and 16 otherwise.
        Each additional bit lowers the loss a little and doubles the search time.
      code: function from trellis states to values, see `Trellis`: "mul1" (the default), "3inst",
        "hyb" or "vpu".
      passes: number of sweeps of coordinate descent after error feedback, at least 0 (default 1).
        Each lowers the loss and takes about as long as the feedback.
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal before error feedback, at least 0 (default 0.01). Larger values rely
        less on the statistics.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: ours.

    >>> trellis(bits=2.25).format.bits
    2.25
    """
    rounder = LDLQ(damping, act_order=False, passes=passes, scales=(0.95, 1.0, 1.05, 1.1))
    format = TrellisBudget(bits, block, _states(L), code)
    sides = Rotation(block, sort=True), Rotation()
    return Method("trellis", rounder, format, *sides, activations=Activations.of(activations))


def _states(L: int | None) -> int:
    return L or (12 if jax.default_backend() == "cpu" else 16)


def aqlm(
    codebooks: int = 2,
    bits: int = 8,
    group: int = 8,
    *,
    beam: int = 8,
    sweeps: int = 6,
    activations: Activations | str | None = None,
) -> Method:
    """AQLM: sums of learned codebook vectors. See `Beam` and `Additive`.

    Args:
      codebooks: number of vectors that are summed for each group, at least 1 (default 2).
      bits: number of bits per code, 1 to 16 (default 8); each codebook has 2**bits vectors. The
        bits per weight are codebooks * bits / group, and the codebooks.
      group: number of consecutive input channels that one code covers, at least 1 (default 8).
      beam: number of candidates that the code search keeps, at least 1 (default 8). Wider beams
        lose less and take longer in proportion.
      sweeps: number of alternations between fitting the codebooks and updating the codes, at least
        0 (default 6).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Egiazarian et al. 2024, arXiv:2401.06118. This implementation differs from the paper:
    the initial codes come from error feedback, and the codebooks are fitted by conjugate gradients.

    >>> aqlm().format.group
    8
    """
    format = Additive(codebooks, bits, group)
    return Method("aqlm", Beam(beam, sweeps), format, activations=Activations.of(activations))


def vptq(
    length: int = 8,
    bits: int = 8,
    residual_bits: int = 8,
    *,
    outliers: float = 0.0,
    beam: int = 8,
    sweeps: int = 6,
    activations: Activations | str | None = None,
) -> Method:
    """VPTQ: learned codebook vectors along the output channels. See `Beam` and `Vector`.

    Args:
      length: number of consecutive output channels that one code covers, at least 1 (default 8).
      bits: number of bits per code, 1 to 16 (default 8); the codebook has 2**bits vectors. The bits
        per weight are (bits + residual_bits) / length, and the codebooks.
      residual_bits: the same for a second, residual codebook (default 8); 0 for none.
      outliers: fraction of the input channels that have codebooks of their own, in [0, 1) (default
        0).
      beam: number of candidates that the code search keeps, at least 1 (default 8). Wider beams
        lose less and take longer in proportion.
      sweeps: number of alternations between fitting the codebooks and updating the codes, at least
        0 (default 6).
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: Liu et al. 2024, arXiv:2409.17066. This implementation differs from the paper: inputs
    are rotated first, and codes and codebooks are refined as in `aqlm`.

    >>> vptq().format.length
    8
    """
    format = Vector(length, bits, residual_bits, outliers)
    return Method(
        "vptq", Beam(beam, sweeps), format, Rotation(), activations=Activations.of(activations)
    )


def entropy_coded(
    bits: float = 2.0,
    *,
    states: int = 64,
    two_sided: bool = False,
    damping: float = 0.02,
    chain: int | None = None,
    activations: Activations | str | None = None,
) -> Method:
    """Water-filled error feedback with entropy coding: any rate, met to the byte.

    This method has the least loss at a given number of bits. Since each matmul decodes the whole
    stream, convert the weights to fixed-width words once before inference, as the command-line
    tools do (`jaxquant.formats.transcoded`).

    Args:
      bits: number of bits per weight, everything included; above 0 and at most 12 (default 2.0);
        fractions are allowed.
      states: number of trellis states, see `EntropyCoded` (default 64).
      two_sided: whether step sizes are also chosen per output channel, by the second moment of the
        loss gradients, and errors fed on to later output channels (default False); needs
        output-side statistics.
      damping: fraction of the mean of diag(H), with H the second moment of the inputs, that is
        added to the diagonal before error feedback, at least 0 (default 0.02). Larger values rely
        less on the statistics.
      chain: largest number of weights in a row that share a trellis. The default None means 256,
        and 128 with `two_sided`, where feedback goes from chain to chain.
      activations: how inputs are rounded before they are multiplied: an `Activations` or its string
        form, such as "int8"; None (the default) leaves them unrounded.

    Returns:
      A `Method` for `quantize`, `Recipe` or `latent`.

    Raises:
      ValueError: an argument has the wrong type or is out of range.

    Source: WaterSIC, arXiv:2603.04956, for the step sizes; ours otherwise, see `Waterfill` and
    `EntropyCoded`.

    >>> entropy_coded(bits=1.5).format.bits
    1.5
    """
    rounder = Waterfill(damping, 0.5 if two_sided else None)
    format = EntropyCoded(bits, states, chain or (128 if two_sided else 256))
    return Method("entropy_coded", rounder, format, activations=Activations.of(activations))
