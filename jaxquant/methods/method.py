"""Quantization methods: a transform, a rounder, a format and the rounding of inputs."""

import dataclasses
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.activations import Activations
from jaxquant.core.fields import article, check_fields
from jaxquant.core.protocols import Estimator, Format, RangeEstimator, Rounder, Transform, lacking
from jaxquant.rounding import LDLQ, Nearest
from pallas_kernels.context import compiled

GroupSize = int | Literal["channel", "tensor"]


# The base class of each part, and an example for error messages; the first two are required.
_PARTS: dict[str, tuple[type, str]] = {
    "rounder": (Rounder, "LDLQ"),
    "format": (Format, "Integer"),
    "input": (Transform, "Rotation"),
    "output": (Transform, "Rotation"),
    "estimator": (Estimator, "StraightThrough"),
    "input_estimator": (RangeEstimator, "LSQRange"),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How to quantize a weight: the rounder that chooses codes and the format that stores them.

    Attributes:
      name: name shown in plans, reports and error messages.
      rounder: algorithm that chooses the codes, such as `LDLQ`.
      format: codebook and storage layout, such as `Integer`.
      input: invertible transform of the input channels, such as `Rotation`; None for no transform.
      output: the same for the output channels.
      activations: how inputs are rounded before they are multiplied by the codes, an `Activations`
        or its string form form ("int8", "int4,asymmetric"); None or "float" leaves inputs
        unrounded.
      estimator: how `latent` trains the weights (`estimators.weight_estimators`); None means
        `StraightThrough()`.
      input_estimator: how `latent` trains the ranges of inputs (`estimators.input_ranges`); None
        means that these ranges are not learned.

    Raises:
      ValueError: a part is of the wrong kind, or the activations are not valid.
    """

    name: str
    rounder: Rounder
    format: Format
    input: Transform | None = None
    output: Transform | None = None
    activations: Activations | None = None
    estimator: Estimator | None = None
    input_estimator: RangeEstimator | None = None

    def __post_init__(self) -> None:
        for name, (kind, example) in _PARTS.items():
            part = getattr(self, name)
            if part is None and name not in ("rounder", "format"):
                continue
            if wrong := lacking(kind, part):
                none = "" if name in ("rounder", "format") else " or None"
                wanted = f"{article(kind.__name__)} {kind.__name__} ({example}(), ...)"
                raise ValueError(f"{name} must be {wanted}{none}: {wrong}")
        object.__setattr__(self, "activations", Activations.of(self.activations))
        check_fields(self)

    @property
    def needs_gram(self) -> bool:
        """Whether the method reads the second moment of the inputs."""
        side = self.input
        search = side is not None and side.searched and self.activations is None
        return search or self.rounder.needs_gram or (side is not None and side.needs_gram)

    @property
    def needs_output(self) -> bool:
        """Whether the method reads the second moment of the loss gradients at the outputs."""
        return self.rounder.needs_output or (self.output is not None and self.output.needs_gram)

    @property
    def needs_channels(self) -> bool:
        """Whether the method reads channel statistics of the inputs (mean magnitude and range)."""
        static = self.activations is not None and self.activations.static
        return static or (self.input is not None and self.input.needs_channels)

    @property
    def needs_sample(self) -> bool:
        """Whether the method reads sample rows of the inputs."""
        side, form = self.input, self.activations
        search = form is not None and (form.mse or (side is not None and side.searched))
        return search or (side is not None and side.needs_sample)

    @partial(compiled, static_argnums=0)
    def magnitudes(self, w: Float[Array, "k n"]) -> Float[Array, "s t"]:
        """Return the approximate magnitude of each entry of the stored matrix [s, t].

        A transform mixes channels, so every channel on a transformed side is given the maximum over
        all channels of that side.

        Args:
          w: weight matrix [k, n], before transforms.
        """
        k, n = self.stored(*w.shape)
        if self.input is not None:
            w = jnp.max(jnp.abs(w), 0, keepdims=True)
        if self.output is not None:
            w = jnp.max(jnp.abs(w), 1, keepdims=True)
        return jnp.broadcast_to(w, (k, n))

    def healing_bytes(self, k: int, n: int) -> int:
        """Return the number of bytes that healing adds to a matrix [k, n].

        Sign vectors become float16, and a side without a transform gets float16 channel scales if
        the format has no parameters of its own to train.

        Args:
          k: number of input channels.
          n: number of output channels.

        >>> from jaxquant import entropy_coded, qtip, rtn
        >>> [m.healing_bytes(64, 64) for m in (rtn(), entropy_coded(), qtip())]
        [0, 256, 240]
        """
        total = 0
        for side, size in ((self.input, k), (self.output, n)):
            if side is not None:
                total += side.healing_bytes(size)
            elif not self.format.trained:
                total += 2 * size
        return total

    def stored(self, k: int, n: int) -> tuple[int, int]:
        """Return the shape of the matrix that the format stores for a weight [k, n].

        Args:
          k: number of input channels.
          n: number of output channels.
        Raises:
          ValueError: a transform or the format does not support this shape.
        """
        if self.input is not None:
            k = self.input.size(k)
        if self.output is not None:
            n = self.output.size(n)
        self.format.check_shape(k, n)
        return k, n


@dataclasses.dataclass(frozen=True)
class Keep:
    """The rule that leaves a leaf unquantized.

    Attributes:
      name: name shown in plans.
    """

    name: str = "keep"

    __post_init__ = check_fields


KEEP = Keep()


def scalar_rounder(feedback: bool, damping: float = 0.01) -> LDLQ | Nearest:
    """Return `LDLQ` with the given damping if `feedback` is set, else `Nearest`.

    Args:
      feedback: whether to round with error feedback.
      damping: see `LDLQ`; ignored without feedback.
    """
    return LDLQ(damping) if feedback else Nearest()
