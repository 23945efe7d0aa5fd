"""A method: transform, rounder, format, and how inputs meet the codes."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.activations import Activations
from jaxquant.core.fields import check_fields, shown
from jaxquant.core.protocols import Estimator, Format, RangeEstimator, Rounder, Transform, lacking
from jaxquant.rounding import LDLQ, Nearest

GroupSize = int | Literal["channel", "tensor"]


# The kind of each part, and an example of it; only the first two must be there.
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
    """What to do with a weight: the rounder that chooses codes, the format that stores them.

    `input` and `output` are transforms of the channels on either side (`Rotation`), or None.
    `activations`: how inputs are rounded before they meet the codes, an `Activations` or its text
    ("int8", "int4,asymmetric"); None or "float": not at all.
    `estimator`, `input_estimator`: how `latent` trains weights, and learned ranges of inputs
    (`estimators.weight_estimators`, `estimators.input_ranges`); None: `StraightThrough()`, and no
    learned ranges.
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
                raise ValueError(
                    f"{name} must be a {kind.__name__} ({example}, ...){none}, got "
                    f"{shown(part)}; {wrong}"
                )
        object.__setattr__(self, "activations", Activations.of(self.activations))
        check_fields(self)

    @property
    def needs_gram(self) -> bool:
        """Whether it reads the second moment of the inputs."""
        side = self.input
        search = side is not None and side.searched and self.activations is None
        return search or self.rounder.needs_gram or (side is not None and side.needs_gram)

    @property
    def needs_output(self) -> bool:
        """Whether it reads the second moment of the loss gradients at the outputs."""
        return self.rounder.needs_output or (self.output is not None and self.output.needs_gram)

    @property
    def needs_channels(self) -> bool:
        """Whether it reads the sizes of the inputs' channels."""
        static = self.activations is not None and self.activations.static
        return static or (self.input is not None and self.input.needs_channels)

    @property
    def needs_sample(self) -> bool:
        """Whether it reads rows of the inputs."""
        side, form = self.input, self.activations
        search = form is not None and (form.mse or (side is not None and side.searched))
        return search or (side is not None and side.needs_sample)

    def magnitudes(self, w: Float[Array, "k n"]) -> Float[Array, "s t"]:
        """How large the entries of the stored matrix will be, about.

        A transform mixes channels: each then stands for all that it is mixed with.
        """
        k, n = self.stored(*w.shape)
        if self.input is not None:
            w = jnp.max(jnp.abs(w), 0, keepdims=True)
        if self.output is not None:
            w = jnp.max(jnp.abs(w), 1, keepdims=True)
        return jnp.broadcast_to(w, (k, n))

    def healing_bytes(self, k: int, n: int) -> int:
        """What healing adds to a matrix [k, n]: signs become float16, missing sides are made.

        >>> from jaxquant.methods.weights import entropy_coded, qtip, rtn
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
        """Rows and columns that the format stores for a matrix [k, n]; ValueError if it cannot."""
        if self.input is not None:
            k = self.input.size(k)
        if self.output is not None:
            n = self.output.size(n)
        self.format.check_shape(k, n)
        return k, n


@dataclasses.dataclass(frozen=True)
class Keep:
    """Leave a leaf as it is."""

    name: str = "keep"

    __post_init__ = check_fields


KEEP = Keep()


def scalar_rounder(feedback: bool, damping: float = 0.01) -> LDLQ | Nearest:
    """Error feedback, or nearest."""
    return LDLQ(damping) if feedback else Nearest()
