"""Learned ranges of inputs: one range for all tokens, trained with the weights.

As for weights, an estimator has `value`, the rounded rows with gradients by a written formula, and
`served`, the scale and zero point with which a frozen weight rounds its inputs. Training starts at
the static range that calibration found.
"""

import dataclasses
import math
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.activations import Activations
from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import RangeEstimator
from jaxquant.estimators.weight_estimators import scaled_gradient

Learned = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class LSQRange(RangeEstimator):
    """A learned step size, with an offset b if codes are asymmetric (LSQ, LSQ+).

    With v = (x - b) / s, and "inside" where v is within the range of the codes, the derivatives of
    q = s code + b are

        dq/dx = 1 inside, else 0;  dq/ds = code - v inside, else code;  dq/db = 0 inside, else 1.

    Those for s and b are multiplied by 1 / sqrt(k c), with k channels and largest code c.

    Source:
      Esser et al. 2020, arXiv:1902.08153; Bhalgat et al. 2020, arXiv:2004.09576.
    """

    names: ClassVar[tuple[str, ...]] = ("scale", "offset")

    def check(self, form: Activations | None) -> None:
        """Raise ValueError unless the form of the inputs has one static scale for all tokens."""
        _check(form)

    def start(self, known: Learned, form: Activations) -> Learned:
        """Return the learned arrays that correspond to the calibrated scale and zero point.

        Args:
          known: calibrated "scale" and "zero", float32 [1].
          form: how inputs are rounded.
        Returns:
          "scale", and "offset" if codes are asymmetric.
        """
        offset = {} if form.symmetric else {"offset": -known["scale"] * known["zero"]}
        return {"scale": known["scale"], **offset}

    def served(self, learned: Learned, form: Activations) -> Learned:
        """Return the scale and zero point that a frozen weight holds."""
        scale = learned["scale"]
        offset = learned.get("offset", jnp.zeros_like(scale))
        return {"scale": scale, "zero": -offset / scale}

    def value(
        self, x: Float[Array, "m k"], learned: Learned, form: Activations
    ) -> Float[Array, "m k"]:
        """Return the rounded rows, differentiable in `x` and `learned`.

        Args:
          x: rows.
          learned: learned arrays, as from `start`.
          form: how inputs are rounded.
        Returns:
          The rounded rows, float32.
        """
        factor = 1 / math.sqrt(x.shape[-1] * form.limits[1])
        scale = scaled_gradient(learned["scale"], factor)
        offset = learned.get("offset", jnp.zeros_like(scale))
        return _stepped(form, x.astype(jnp.float32), scale, scaled_gradient(offset, factor))


@dataclasses.dataclass(frozen=True)
class PACT(RangeEstimator):
    """A learned bound a at which inputs are clipped before they are rounded.

    The range of x is [0, a] (`unsigned`, for outputs of a ReLU) or [-a, a]. Then dq/dx = 1 strictly
    within the range (at 0 too if unsigned), else 0, and dq/da = 1 where x >= a (-1 where x <= -a,
    if signed), else 0; the contribution of rounding is ignored. The paper penalizes a^2: for that,
    give the label "range" a weight decay.

    Attributes:
      unsigned: whether the range is [0, a], which takes asymmetric codes. Default: [-a, a], which
        takes symmetric ones.

    Source:
      Choi et al. 2018, arXiv:1805.06085.
    """

    unsigned: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, form: Activations | None) -> None:
        """Raise ValueError unless inputs have one static scale and codes that fit `unsigned`."""
        _check(form)
        if form is not None and form.symmetric == self.unsigned:
            kind = "asymmetric" if self.unsigned else "symmetric"
            raise ValueError(f"{self} needs {kind} codes, got activations={str(form)!r}")

    def start(self, known: Learned, form: Activations) -> Learned:
        """Return the bound at the end of the calibrated range.

        Args:
          known: calibrated "scale" and "zero", float32 [1].
          form: how inputs are rounded.
        Returns:
          "bound".
        """
        return {"bound": known["scale"] * (form.limits[1] - known["zero"])}

    def served(self, learned: Learned, form: Activations) -> Learned:
        """Return the scale and zero point that a frozen weight holds."""
        bottom, top = form.limits
        steps = top - bottom if self.unsigned else top
        zero = jnp.full_like(learned["bound"], bottom if self.unsigned else 0)
        # XLA turns a division by a constant into this product, but does not outside of `jax.jit`.
        return {"scale": learned["bound"] * (1 / steps), "zero": zero}

    def value(
        self, x: Float[Array, "m k"], learned: Learned, form: Activations
    ) -> Float[Array, "m k"]:
        """Return the rounded rows, differentiable in `x` and `learned`.

        Args:
          x: rows.
          learned: "bound".
          form: how inputs are rounded.
        Returns:
          The rounded rows, float32.
        """
        known = self.served(learned, form)
        x = x.astype(jnp.float32)
        return _bounded((form, self.unsigned), x, learned["bound"], known["scale"], known["zero"])


def _check(form: Activations | None) -> None:
    if form is None or not form.static:
        raise ValueError(
            "learned ranges need one scale for all tokens: give the method "
            'activations="int8,static" or similar, got '
            f"{'float' if form is None else str(form)!r}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stepped(
    form: Activations, x: Float[Array, "m k"], scale: Float[Array, "1"], offset: Float[Array, "1"]
) -> Float[Array, "m k"]:
    return form.rounded(x, {"scale": scale, "zero": -offset / scale})


def _stepped_forward(form: Activations, x: Array, scale: Array, offset: Array) -> tuple:
    return _stepped(form, x, scale, offset), (x, scale, offset)


def _stepped_backward(form: Activations, kept: tuple, g: Array) -> tuple:
    x, scale, offset = kept
    bottom, top = form.limits
    v = (x - offset) / scale
    inside = (v >= bottom) & (v <= top)
    code = jnp.clip(jnp.round(v), bottom, top)
    slope = jnp.where(inside, code - v, code)
    total = lambda a: jnp.sum(g * a).reshape(scale.shape)
    return g * inside, total(slope), total(~inside)


_stepped.defvjp(_stepped_forward, _stepped_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bounded(
    how: tuple[Activations, bool], x: Array, bound: Array, scale: Array, zero: Array
) -> Float[Array, "m k"]:
    return how[0].rounded(x, {"scale": scale, "zero": zero})


def _bounded_forward(how: tuple, x: Array, bound: Array, scale: Array, zero: Array) -> tuple:
    return _bounded(how, x, bound, scale, zero), (x, bound)


def _bounded_backward(how: tuple, kept: tuple, g: Array) -> tuple:
    (_, unsigned), (x, bound) = how, kept
    above, below = x >= bound, x < 0 if unsigned else x <= -bound
    ends = above.astype(jnp.float32) if unsigned else above.astype(jnp.float32) - below
    d_bound = jnp.sum(g * ends).reshape(bound.shape)
    zeros = jnp.zeros_like(bound)
    return g * ~(above | below), d_bound, zeros, zeros


_bounded.defvjp(_bounded_forward, _bounded_backward)
