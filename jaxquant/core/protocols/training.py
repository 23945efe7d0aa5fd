"""Interfaces for training: weight estimators, learned input ranges, activation formats."""

import abc
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float

from jaxquant.core.protocols.formats import Data, Format


class Estimator(abc.ABC):
    """How a weight in training is rounded, and how gradients pass through the rounding."""

    @abc.abstractmethod
    def check(self, format: Format) -> None:
        """Raise ValueError unless weights in this format can be trained this way."""

    @abc.abstractmethod
    def start(self, w: Float[Array, "k n"], format: Any, data: Data) -> Data:
        """Return the initial learned arrays.

        Args:
          w: the weight, [k, n].
          format: the format of the weight.
          data: the packed arrays of the weight.
        """

    @abc.abstractmethod
    def packed(self, w: Float[Array, "k n"], learned: Data, format: Any) -> Data:
        """Pack the rounded weight; the result decodes to `value` bit for bit.

        Args:
          w: the weight, [k, n].
          learned: the learned arrays.
          format: the format of the weight.
        """

    @abc.abstractmethod
    def value(
        self, w: Float[Array, "k n"], learned: Data, format: Any, packed: Data | None = None
    ) -> Float[Array, "k n"]:
        """Return the rounded weight, differentiable in `w` and `learned`.

        Args:
          w: the weight, [k, n].
          learned: the learned arrays.
          format: the format of the weight.
          packed: the result of `packed`, if it is at hand.
        """


class ActivationForm(Protocol):
    """An activation format, such as `core.activations.Activations`."""

    @property
    def static(self) -> bool:
        """Whether the scale is fixed in advance and stored with the weight."""

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""

    @property
    def kernel(self) -> str | None:
        """The form in which kernels quantize rows themselves; None if rows are rounded first."""

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""

    def describe(self) -> str:
        """Describe the arithmetic of a matmul, for `explain`."""

    def rounded(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m k"]:
        """Quantize and dequantize rows.

        Args:
          x: the rows, [m, k].
          data: the arrays named in `shapes`.
        """

    def straight(self, x: Float[Array, "m k"], data: Data) -> Float[Array, "m k"]:
        """Quantize and dequantize rows, with the gradients that a matmul has.

        Args:
          x: the rows, [m, k].
          data: the arrays named in `shapes`.
        """

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arrays that a weight stores for this format."""


class RangeEstimator(abc.ABC):
    """A learned range of inputs: one for all tokens, trained with the weights."""

    @abc.abstractmethod
    def check(self, form: Any) -> None:
        """Raise ValueError unless inputs in this format can be trained this way."""

    @abc.abstractmethod
    def start(self, known: Data, form: Any) -> Data:
        """Return the initial learned arrays.

        Args:
          known: the calibrated scale and zero point.
          form: the activation format.
        """

    @abc.abstractmethod
    def served(self, learned: Data, form: Any) -> Data:
        """Return the scale and zero point that a frozen weight stores.

        Args:
          learned: the learned arrays.
          form: the activation format.
        """

    @abc.abstractmethod
    def value(self, x: Float[Array, "m k"], learned: Data, form: Any) -> Float[Array, "m k"]:
        """Return the rounded rows, differentiable in `x` and `learned`.

        Args:
          x: the rows, [m, k].
          learned: the learned arrays.
          form: the activation format.
        """
