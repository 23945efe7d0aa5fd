"""A method: transform, rounder, format, and how inputs meet the codes."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.activations import Activations
from jaxquant.core.fields import check_fields, shown
from jaxquant.rounding import LDLQ, Nearest
from jaxquant.transforms import Rotation

GroupSize = int | Literal["channel", "tensor"]


# What each part must have, if it is there, and what it is then called.
_PARTS = {
    "input": ("a transform of inputs (Rotation, ...)", ("apply", "size", "shapes")),
    "output": ("a transform of outputs (Rotation, ...)", ("apply", "size", "shapes")),
    "estimator": ("an estimator (StraightThrough, ...)", ("check", "grid", "value")),
    "input_estimator": ("a learned range (LSQRange, PACT)", ("check", "served")),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """What to do with a weight: the rounder that chooses codes, the format that stores them.

    `input` and `output` are transforms of the channels on either side (`Rotation`), or None.
    `activations`: how inputs are rounded before they meet the codes, an `Activations` or its text
    ("int8", "int4,asymmetric"); None or "float": not at all.
    `estimator`, `input_estimator`: how `latent` trains weights, and learned ranges of inputs
    (`training.estimators`, `training.ranges`); None: `StraightThrough()`, and no learned ranges.
    """

    name: str
    rounder: Any
    format: Any
    input: Any = None
    output: Any = None
    activations: Activations | None = None
    estimator: Any = None
    input_estimator: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "activations", Activations.of(self.activations))
        rounds = hasattr(self.rounder, "needs_output") and hasattr(self.rounder, "needs_gram")
        if not rounds or not all(hasattr(self.format, name) for name in ("tile", "encode")):
            raise ValueError(
                f"a method is a rounder (LDLQ, ...) and a format (Integer, ...), got "
                f"{shown(self.rounder)} and {shown(self.format)}"
            )
        for name, (kind, needed) in _PARTS.items():
            part = getattr(self, name)
            if part is not None and not all(hasattr(part, method) for method in needed):
                raise ValueError(f"{name} must be {kind} or None, got {shown(part)}")

    @property
    def needs_gram(self) -> bool:
        """Whether it reads the second moment of the inputs."""
        search = getattr(self.input, "searched", False) and self.activations is None
        return search or self.rounder.needs_gram or getattr(self.input, "needs_gram", False)

    @property
    def needs_output(self) -> bool:
        """Whether it reads the second moment of the loss gradients at the outputs."""
        return self.rounder.needs_output or getattr(self.output, "needs_gram", False)

    @property
    def needs_channels(self) -> bool:
        """Whether it reads the sizes of the inputs' channels."""
        static = self.activations is not None and self.activations.static
        return static or getattr(self.input, "needs_channels", False)

    @property
    def needs_sample(self) -> bool:
        """Whether it reads rows of the inputs."""
        search = getattr(self.input, "searched", False) and self.activations is not None
        search = search or (self.activations is not None and self.activations.mse)
        return search or getattr(self.input, "needs_sample", False)

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


def added_bytes(method: Method, k: int, n: int) -> int:
    """What `heal` adds to a matrix [k, n]: signs become float16, missing sides are made.

    >>> from jaxquant.methods.registry import entropy_coded, qtip, rtn
    >>> [added_bytes(m, 64, 64) for m in (rtn(), entropy_coded(), qtip())]
    [0, 256, 240]
    """
    total = 0
    for side, size in ((method.input, k), (method.output, n)):
        if isinstance(side, Rotation):
            total += 2 * size - -(-size // 8)
        elif side is None and not getattr(method.format, "trained", ()):
            total += 2 * size
    return total
