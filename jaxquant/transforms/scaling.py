"""A factor per channel: what evens channels out before rounding, and what healing trains."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.channels import Channels
from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.magnitude import ratios
from jaxquant.core.protocols import Transform

_RANGE = 64.0  # factors lie within this of their geometric mean, either way
_LEAST, _MOST = 2.0**-14, 65504.0  # in float16 with all its bits
_TINY = 1e-5


class Factors(Transform):
    """Base of the maps x -> x * factors of n channels; invertible, not orthonormal.

    The array: "factors", n float16.
    """

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that `fit` makes."""
        return {"factors": jax.ShapeDtypeStruct((n,), jnp.float16)}

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """x A, for row vectors x."""
        return x * arrays["factors"].astype(x.dtype)

    def transposed(
        self, y: Float[Array, "... n"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """y A^T: the same product."""
        return self.apply(y, arrays)

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """x A^-T: what weights become where the vectors they meet become x A."""
        return x / arrays["factors"].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Scaling(Factors):
    """Factors by how much a channel counts.

    Attributes:
      power: factors are the mean square that a channel's vectors have (inputs x on the input side,
        loss gradients on the output side), to this power, over their geometric mean (1 for a dead
        channel). At -1/2 all channels come to count alike, and a rounder that weighs outputs alike
        is right to; 0: ones, to be trained.

    >>> known = Channels(jnp.eye(2), gram=jnp.diag(jnp.array([4.0, 1.0])))
    >>> Scaling(-0.5).fit(known, jax.random.key(0))["factors"].tolist()
    [0.70703125, 1.4140625]
    """

    power: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_gram(self) -> bool:  # type: ignore[override]
        """Whether the second moment on this side decides the factors."""
        return self.power != 0

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether its arrays depend on the weight, and so cannot be shared."""
        return self.needs_gram

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Its arrays."""
        del key
        moment = channels.moment
        alive = moment > 0
        log = self.power * jnp.log(jnp.where(alive, moment, 1.0))
        mean = jnp.sum(log) / jnp.maximum(jnp.sum(alive), 1)
        log = jnp.clip(jnp.where(alive, log - mean, 0.0), -jnp.log(_RANGE), jnp.log(_RANGE))
        return {"factors": jnp.exp(log).astype(jnp.float16)}


@dataclasses.dataclass(frozen=True)
class Smooth(Factors):
    """SmoothQuant: inputs lend their size to the weights, channel by channel.

    Factors are 1/s, s = max|x|^alpha / max|w|^(1 - alpha), the maxima over all tokens and over all
    weights that read this input, both over the power of two above the largest, so that factors do
    not depend on the units of either; 1 for a channel that is dead.

    Attributes:
      alpha: 0 to 1; None: searched for, in steps of 1/20 (see `jaxquant.ptq.shared_transforms`).

    Source: Xiao et al. 2022, arXiv:2211.10438.

    >>> known = Channels.of(jnp.array([[1.0, 4.0]]), jnp.array([[16.0, 1.0]]))
    >>> arrays = Smooth(0.5).fit(known, jax.random.key(0))
    >>> Smooth(0.5).apply(jnp.array([16.0, 1.0]), arrays).tolist()
    [8.0, 4.0]
    """

    alpha: float | None = 0.5

    needs_channels: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.alpha is not None and not (
            isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1
        ):
            raise ValueError(
                f"alpha must be in [0, 1], or None to be searched for; got {self.alpha}"
            )

    @property
    def searched(self) -> bool:  # type: ignore[override]
        """Whether the best of `candidates` is to be found."""
        return self.alpha is None

    def candidates(self, channels: Channels, key: Array) -> Iterator[dict[str, Array]]:
        """Arrays of which the search keeps the best."""
        del key
        return (self._arrays(channels, i / 20) for i in range(21))

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Its arrays; where alpha is to be searched for, of 1/2."""
        del key
        return self._arrays(channels, 0.5 if self.alpha is None else self.alpha)

    def _arrays(self, channels: Channels, alpha: float) -> dict[str, Array]:
        x, w = ratios(channels.largest), ratios(jnp.max(jnp.abs(channels.weights), axis=0))
        s = jnp.maximum(x, _TINY) ** alpha / jnp.maximum(w, _TINY) ** (1 - alpha)
        factors = jnp.where((x > 0) & (w > 0), 1 / s, 1.0)
        return {"factors": jnp.clip(factors, _LEAST, _MOST).astype(jnp.float16)}


@dataclasses.dataclass(frozen=True)
class ActivationAware(Factors):
    """AWQ: channels whose inputs are large get the finer codes, by a search for how much.

    Factors are 1/s, s = a^r over the geometric mean of its extremes, a = mean |x| and r = 0, .05,
    ..., .95 (see `ptq.shared_transforms`); with `duo` s = a^r / (w^(1 - r) + 1e-4), w the mean of
    |w| over its group's largest.

    Attributes:
      duo: AutoAWQ's and llm-compressor's s.
      group_size: rows that share a scale, for w.

    Source: Lin et al. 2023, arXiv:2306.00978; `duo` is not in the paper.

    >>> known = Channels.of(jnp.ones((1, 2)), jnp.array([[4.0, 1.0]]))
    >>> tried = list(ActivationAware().candidates(known, jax.random.key(0)))
    >>> len(tried), tried[0]["factors"].tolist(), tried[10]["factors"].tolist()
    (20, [1.0, 1.0], [0.70703125, 1.4140625])
    """

    duo: bool = False
    group_size: int = 128

    needs_channels: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    searched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "group_size")

    def candidates(self, channels: Channels, key: Array) -> Iterator[dict[str, Array]]:
        """Arrays of which the search keeps the best."""
        del key
        return (self._arrays(channels, i / 20) for i in range(20))

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """The first of the candidates."""
        return next(self.candidates(channels, key))

    def _arrays(self, channels: Channels, r: float) -> dict[str, Array]:
        if channels.magnitude is None:
            raise ValueError("the sizes of the channels are unknown: calibrate for them")
        s = ratios(channels.magnitude) ** r
        if self.duo:
            s = s / (self._weights(ratios(channels.weights)) ** (1 - r) + 1e-4)
        s = jnp.maximum(s, 1e-4)
        s = s / jnp.sqrt(jnp.max(s) * jnp.min(s))
        return {"factors": jnp.clip(1 / s, _LEAST, _MOST).astype(jnp.float16)}

    def _weights(self, weights: Float[Array, "r n"]) -> Float[Array, " n"]:
        n = weights.shape[1]
        size = jnp.abs(jnp.pad(weights, ((0, 0), (0, -n % self.group_size))))
        size = size.reshape(len(weights), -1, self.group_size)
        part = size / jnp.maximum(jnp.max(size, axis=-1, keepdims=True), 1e-6)
        return jnp.mean(part.reshape(len(weights), -1)[:, :n], axis=0)
