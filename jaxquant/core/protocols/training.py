"""What training asks of estimators, of learned ranges and of forms of activations."""

import abc
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float

from jaxquant.core.protocols.formats import Data, Format


class Estimator(abc.ABC):
    """What a weight that trains is after rounding, and what derivatives go through that."""

    @abc.abstractmethod
    def check(self, format: Format) -> None:
        """Raise ValueError unless weights in this format can train so."""

    @abc.abstractmethod
    def start(self, w: Float[Array, "k n"], format: Any, data: Data) -> Data:
        """Learned arrays to begin with, of a weight and of what storage holds of it."""

    @abc.abstractmethod
    def packed(self, w: Float[Array, "k n"], learned: Data, format: Any) -> Data:
        """Storage of the rounded matrix, decoding to `value` bit for bit."""

    @abc.abstractmethod
    def value(
        self, w: Float[Array, "k n"], learned: Data, format: Any, packed: Data | None = None
    ) -> Float[Array, "k n"]:
        """The rounded matrix, differentiable in both; `packed`, if it is at hand."""


class ActivationForm(Protocol):
    """How inputs are rounded before they meet the codes; `core.activations.Activations` is one."""

    @property
    def static(self) -> bool:
        """Whether the scale is known beforehand, and held with the weight."""

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""

    @property
    def kernel(self) -> str | None:
        """The form under which kernels round themselves; None if codes are made before them."""

    @property
    def limits(self) -> tuple[int, int]:
        """The first and the last code."""

    def describe(self) -> str:
        """The arithmetic of a product, for `explain`."""

    def rounded(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m k"]:
        """What x is after rounding."""

    def straight(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m k"]:
        """`rounded`, with the derivatives of a product."""

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays that a weight holds for it."""


class RangeEstimator(abc.ABC):
    """A learned range of inputs: one for all tokens, trained with the weights."""

    @abc.abstractmethod
    def check(self, form: Any) -> None:
        """Raise ValueError unless inputs in this form can train so."""

    @abc.abstractmethod
    def start(self, known: Data, form: Any) -> Data:
        """Learned arrays to begin with, from the calibrated scale and zero point."""

    @abc.abstractmethod
    def served(self, learned: Data, form: Any) -> Data:
        """Scale and zero point that a frozen weight holds."""

    @abc.abstractmethod
    def value(self, x: Float[Array, "m k"], learned: Data, form: Any) -> Float[Array, "m k"]:
        """Rounded rows, differentiable in both."""
