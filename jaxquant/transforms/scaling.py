"""Channel scaling: a factor per channel, which equalizes channels before rounding or is trained."""

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

_RANGE = 64.0  # largest ratio, in either direction, of a factor to the geometric mean
_LEAST, _MOST = 2.0**-14, 65504.0  # range of normal float16 numbers
_TINY = 1e-5


class Factors(Transform):
    """Base of the maps x -> x * factors of n channels, which are invertible but not orthonormal.

    The array is "factors", float16 [n].
    """

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the arrays that `fit` makes."""
        return {"factors": jax.ShapeDtypeStruct((n,), jnp.float16)}

    def apply(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A for row vectors x."""
        return x * arrays["factors"].astype(x.dtype)

    def transposed(
        self, y: Float[Array, "... n"], arrays: dict[str, Array], n: int
    ) -> Float[Array, "... n"]:
        """Return y A^T for row vectors y, which is the same product."""
        return self.apply(y, arrays)

    def inverse(self, x: Float[Array, "... n"], arrays: dict[str, Array]) -> Float[Array, "... n"]:
        """Return x A^-T: what weights become if the vectors they multiply become x A."""
        return x / arrays["factors"].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Scaling(Factors):
    """Factors that depend on the second moment of a channel.

    Attributes:
      power: exponent p of the factors moment^p over their geometric mean, where the moment is the
        mean square of the channel's vectors (inputs x on the input side, loss gradients on the
        output side); 1 for a dead channel. At -1/2 all channels matter equally, as a rounder that
        weights outputs equally assumes. At 0 all factors are 1, to be trained.

    >>> known = Channels(jnp.eye(2), gram=jnp.diag(jnp.array([4.0, 1.0])))
    >>> Scaling(-0.5).fit(known, jax.random.key(0))["factors"].tolist()
    [0.70703125, 1.4140625]
    """

    power: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_gram(self) -> bool:  # type: ignore[override]
        """Whether the factors depend on the second moment on this side."""
        return self.power != 0

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether the arrays depend on the weight and thus cannot be shared."""
        return self.needs_gram

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the arrays for these channels."""
        del key
        moment = channels.moment
        alive = moment > 0
        log = self.power * jnp.log(jnp.where(alive, moment, 1.0))
        mean = jnp.sum(log) / jnp.maximum(jnp.sum(alive), 1)
        log = jnp.clip(jnp.where(alive, log - mean, 0.0), -jnp.log(_RANGE), jnp.log(_RANGE))
        return {"factors": jnp.exp(log).astype(jnp.float16)}


@dataclasses.dataclass(frozen=True)
class Smooth(Factors):
    """SmoothQuant: move the range of the inputs to the weights, channel by channel.

    Factors are 1/s with s = max|x|^alpha / max|w|^(1 - alpha), and 1 for a dead channel. The maxima
    are over all tokens, and over all weights that read this input. Each is divided by a power of
    two just above its largest value, so that the factors do not depend on units.

    Attributes:
      alpha: smoothing strength, 0 to 1; None searches for it in steps of 1/20 (see
        `jaxquant.ptq.shared_transforms`).

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
            raise ValueError(f"alpha must be in [0, 1], or None to search for it, got {self.alpha}")

    @property
    def searched(self) -> bool:  # type: ignore[override]
        """Whether to search for the best of `candidates`."""
        return self.alpha is None

    def candidates(self, channels: Channels, key: Array) -> Iterator[dict[str, Array]]:
        """Return the arrays for alpha = 0, 0.05, ..., 1, of which a search keeps the best."""
        del key
        return (self._arrays(channels, i / 20) for i in range(21))

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the arrays for `alpha`, or for 1/2 if it is to be searched for."""
        del key
        return self._arrays(channels, 0.5 if self.alpha is None else self.alpha)

    def _arrays(self, channels: Channels, alpha: float) -> dict[str, Array]:
        x, w = ratios(channels.largest), ratios(jnp.max(jnp.abs(channels.weights), axis=0))
        s = jnp.maximum(x, _TINY) ** alpha / jnp.maximum(w, _TINY) ** (1 - alpha)
        factors = jnp.where((x > 0) & (w > 0), 1 / s, 1.0)
        return {"factors": jnp.clip(factors, _LEAST, _MOST).astype(jnp.float16)}


@dataclasses.dataclass(frozen=True)
class ActivationAware(Factors):
    """AWQ: channels with large inputs are scaled up before rounding, by factors found by search.

    Factors are 1/s. By default s = a^r, with a = mean |x|. The search tries the powers r = 0, .05,
    ..., .95 (see `ptq.shared_transforms`); with `duo` s = a^r / (w^(1 - r) + 1e-4), w the mean of
    |w| over its group's largest.

    That is, each |w| is divided by the largest in its group of input channels, and the mean is over
    the output channels. In either case s is divided by the geometric mean of its extremes.

    Attributes:
      duo: use the s of AutoAWQ and llm-compressor.
      group_size: number of input channels in a group, for w.

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
        """Return the arrays for r = 0, 0.05, ..., 0.95, of which a search keeps the best."""
        del key
        return (self._arrays(channels, i / 20) for i in range(20))

    def fit(self, channels: Channels, key: Array) -> dict[str, Array]:
        """Return the first of the candidates."""
        return next(self.candidates(channels, key))

    def _arrays(self, channels: Channels, r: float) -> dict[str, Array]:
        if channels.magnitude is None:
            raise ValueError(
                "the magnitudes of the channels are unknown: pass the result of calibrate"
            )
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
