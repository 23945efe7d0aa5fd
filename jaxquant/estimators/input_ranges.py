"""Learned ranges of inputs: one for all tokens, trained with the weights.

Like those of weights, estimators of inputs give `value`, the rounded rows with derivatives by the
written formula, and `served`, the scale and zero point that a frozen weight rounds its inputs by.
Training begins at the static range that calibration found.
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
    """A learned step, and an offset b where codes are asymmetric (LSQ, LSQ+).

    With v = (x - b) / s, inside where v is within the codes' range, of q = s code + b:

        dq/dx = 1 inside, else 0;  dq/ds = code - v inside, else code;  dq/db = 0 inside, else 1;

    ds and db times 1 / sqrt(k c), k channels and c the largest code.

    Source: Esser et al. 2020, arXiv:1902.08153; Bhalgat et al. 2020, arXiv:2004.09576.
    """

    names: ClassVar[tuple[str, ...]] = ("scale", "offset")

    def check(self, form: Activations | None) -> None:
        """Raise ValueError unless inputs are rounded by one scale for all."""
        _check(form)

    def start(self, known: Learned, form: Activations) -> Learned:
        """From the calibrated scale and zero point."""
        offset = {} if form.symmetric else {"offset": -known["scale"] * known["zero"]}
        return {"scale": known["scale"], **offset}

    def served(self, learned: Learned, form: Activations) -> Learned:
        """What a frozen weight holds."""
        scale = learned["scale"]
        offset = learned.get("offset", jnp.zeros_like(scale))
        return {"scale": scale, "zero": -offset / scale}

    def value(
        self, x: Float[Array, "m k"], learned: Learned, form: Activations
    ) -> Float[Array, "m k"]:
        """Rounded rows."""
        factor = 1 / math.sqrt(x.shape[-1] * form.limits[1])
        scale = scaled_gradient(learned["scale"], factor)
        offset = learned.get("offset", jnp.zeros_like(scale))
        return _stepped(form, x.astype(jnp.float32), scale, scaled_gradient(offset, factor))


@dataclasses.dataclass(frozen=True)
class PACT(RangeEstimator):
    """A learned bound a: inputs are clipped there and rounded below.

    Of x within [0, a] (`unsigned`, for what a ReLU gives) or [-a, a]: dq/dx = 1 below a, else 0;
    dq/da = 1 at and above it (-1 at and below -a), else 0: what rounding adds is ignored. The paper
    puts a penalty on a^2: give the label "range" a weight decay.

    Source: Choi et al. 2018, arXiv:1805.06085.
    """

    unsigned: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, form: Activations | None) -> None:
        """Raise ValueError unless inputs are rounded by one scale for all, of fitting codes."""
        _check(form)
        if form is not None and form.symmetric == self.unsigned:
            kind = "asymmetric" if self.unsigned else "symmetric"
            raise ValueError(f"{self} takes {kind} codes, got activations={str(form)!r}")

    def start(self, known: Learned, form: Activations) -> Learned:
        """From the end of the calibrated range."""
        return {"bound": known["scale"] * (form.limits[1] - known["zero"])}

    def served(self, learned: Learned, form: Activations) -> Learned:
        """What a frozen weight holds."""
        bottom, top = form.limits
        steps = top - bottom if self.unsigned else top
        zero = jnp.full_like(learned["bound"], bottom if self.unsigned else 0)
        return {"scale": learned["bound"] / steps, "zero": zero}

    def value(
        self, x: Float[Array, "m k"], learned: Learned, form: Activations
    ) -> Float[Array, "m k"]:
        """Rounded rows."""
        known = self.served(learned, form)
        x = x.astype(jnp.float32)
        return _bounded((form, self.unsigned), x, learned["bound"], known["scale"], known["zero"])


def _check(form: Activations | None) -> None:
    if form is None or not form.static:
        raise ValueError(
            f"learned ranges are of inputs with one scale for all: give the method "
            f'activations="int8,static" or the like, got {"float" if form is None else str(form)!r}'
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
