"""Estimators: the rounded value of a latent weight, and the gradients through the rounding.

For one matrix w [k, n] in float32 and its learned arrays, an estimator gives

- `value`: the rounded matrix, differentiable in both by a written formula, not by tracing the
  rounding;
- `packed`: the rounded matrix as its format stores it, which decodes to `value` bit for bit.

Formats round to nearest, ties to even. `start` gives the initial learned arrays.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxquant.core.fields import check_fields
from jaxquant.core.protocols import Estimator, Format, Grid, LevelFormat
from jaxquant.core.straight_through import through
from jaxquant.formats import Ternary
from pallas_kernels.context import Setting

Learned = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StraightThrough(Estimator):
    """Straight-through estimator, with scales computed from the current weights.

    No gradient passes through the scales. dL/dw = dL/dq everywhere, or if `clipped`, only where w
    is within the range of its codes, ends included (Bengio et al. 2013, arXiv:1308.3432). Any
    format that encodes without a key will do.

    Attributes:
      clipped: no gradient outside the range; for `Integer` and tables.
      stochastic: inside `randomness(key)`, round up or down at random, so that the expectation is w
        (within the range); outside of it, round to nearest. For `Integer`.
    """

    clipped: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, format: Format) -> None:
        """Raise ValueError unless weights in this format can be trained this way."""
        if self.clipped and not isinstance(format, LevelFormat):
            raise ValueError(
                f"clipped=True needs a format with levels (a LevelFormat), got {format}"
            )
        if self.stochastic and not (isinstance(format, LevelFormat) and format.integral):
            raise ValueError(f"stochastic=True needs an integer format, got {format}")

    def start(self, w: Float[Array, "k n"], format: Any, data: dict[str, Array]) -> Learned:
        """Return no arrays, since only the weights are learned."""
        return {}

    def grid(self, w: Float[Array, "k n"], format: LevelFormat) -> Grid:
        """Return the scales (and zero points) of a matrix."""
        return format.grids(w)

    def packed(self, w: Float[Array, "k n"], learned: Learned, format: Any) -> dict[str, Array]:
        """Return the packed arrays of the rounded matrix."""
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        if not isinstance(format, LevelFormat):
            return format.encode(w)
        grid = self.grid(w, format)
        rows = spread(grid, format, w.shape)
        key = _key.get()
        if self.stochastic and key is not None:
            # The sum of its bits gives each matrix its own key, even in a scan, without names.
            bits = jax.lax.bitcast_convert_type(w, jnp.uint32)
            u = jax.random.uniform(jax.random.fold_in(key, jnp.sum(bits)), w.shape)
            w = rows.scale * jnp.floor(w / rows.scale + u)
        return format.pack(format.round(w, rows)[0], grid)

    def value(
        self,
        w: Float[Array, "k n"],
        learned: Learned,
        format: Any,
        packed: dict[str, Array] | None = None,
    ) -> Float[Array, "k n"]:
        """Return the rounded matrix.

        Args:
          w: the matrix.
          learned: ignored.
          format: its format.
          packed: the result of `packed`, if already known.
        Returns:
          The rounded matrix, differentiable in `w`.
        """
        packed = self.packed(w, learned, format) if packed is None else packed
        value = format.dequantize(packed, w.shape[0])
        w = w.astype(jnp.float32)
        if not (self.clipped and isinstance(format, LevelFormat)):
            return through(w, value)
        fixed = jax.lax.stop_gradient(w)
        rows = spread(self.grid(fixed, format), format, w.shape)
        inside = format.inside(fixed / rows.scale, format.zero_of(rows))
        return through(jnp.where(inside, w, fixed), value)


@dataclasses.dataclass(frozen=True)
class AbsMean(StraightThrough):
    """BitNet b1.58's ternary weights, with the mean magnitude as the scale of each matrix.

    The gradient is straight-through for all weights, however large.

    Attributes:
      axis: inside `shard_map`, the mesh axis over which matrices are split; "" if they are not.

    Source: Ma et al. 2024, arXiv:2402.17764, and the authors' training notes. This implementation
    differs from the notes: the scale may be less than 1e-5, so that codes do not depend on the
    units of the weights.
    """

    axis: str = ""

    def check(self, format: Format) -> None:
        """Raise ValueError unless the format is ternary with one scale per matrix."""
        super().check(format)
        if not isinstance(format, Ternary) or format.group_size != "tensor":
            raise ValueError(f'expected Ternary(group_size="tensor"), got {format}')

    def grid(self, w: Float[Array, "k n"], format: LevelFormat) -> Grid:
        mean = jnp.mean(jnp.abs(w), keepdims=True)
        if self.axis:
            mean = jax.lax.pmean(mean, self.axis)
        return format.stored(mean)


@dataclasses.dataclass(frozen=True)
class LSQ(Estimator):
    """Learned step sizes: the scale (and zero point) of each group is trained with the weights.

    Let v = w / s, c the level nearest to v (the code minus the zero point), and "inside" mean that
    v is within the range of the levels. The derivatives of q = s c are

        dq/dw = 1 inside, else 0;   dq/ds = c - v inside, else c;   dq/dzero = 0 inside, else -s.

    A zero point is kept as a float and rounded, straight through. A weight then is inside if its
    rounded code is in range, as in EfficientQAT (Chen et al. 2024, arXiv:2407.11062). Scales are
    used as they are stored.

    Attributes:
      init: initial scales. "format": as the format or the rounder chose them; "mean": 2 mean|w| /
        sqrt(largest code), as in LSQ, good at 3 and 4 bits; "range": the largest weight lies at the
        end of the range.
      scale_gradient: dL/ds is multiplied by 1 / sqrt(N c), with c the largest level and N the
        number of weights that share the scale ("step") or that the matrix has ("matrix"); "none":
        by 1.

    Source:
      LSQ, Esser et al. 2020, arXiv:1902.08153; LSQ+, Bhalgat et al. 2020, arXiv:2004.09576.
    """

    init: Literal["format", "mean", "range"] = "format"
    scale_gradient: Literal["step", "matrix", "none"] = "step"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, known in (("init", ("format", "mean", "range")),
                            ("scale_gradient", ("step", "matrix", "none"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    def check(self, format: Format) -> None:
        """Raise ValueError unless weights in this format can be trained this way."""
        if not isinstance(format, LevelFormat):
            raise ValueError(
                f"learned steps need a format with levels (a LevelFormat), got {format}"
            )
        if not format.learnable:
            raise ValueError(
                f"learned steps need scales that are not quantized: use ste, got {format}"
            )
        if self.init == "mean" and not (format.integral and format.symmetric):
            raise ValueError(f'init="mean" needs integer codes without a zero point, got {format}')

    def start(self, w: Float[Array, "k n"], format: Any, data: dict[str, Array]) -> Learned:
        """Return initial scales and zero points.

        Args:
          w: the matrix.
          format: its format.
          data: its packed arrays.
        Returns:
          "scale", and "zero" for asymmetric codes.
        """
        grid = format.stored_grid(data)
        learned = {"scale": grid.scale.astype(jnp.float32)}
        if self.init != "format":
            learned["scale"] = self._initial(w, format)
        if not format.symmetric:
            learned["zero"] = format.zero_of(grid)
        return learned

    def _initial(self, w: Float[Array, "k n"], format: LevelFormat) -> Float[Array, "g n"]:
        if self.init == "mean":
            return 2 * of_groups(jnp.mean, jnp.abs(w), format) / math.sqrt(format.reach)
        largest = of_groups(jnp.max, jnp.abs(w), format)
        return largest / self.reach(format)

    def reach(self, format: LevelFormat) -> float:
        """Return the initial position of the largest weight, in steps: at the last level."""
        return format.reach

    def inside(self, v: Array, zero: Array, format: LevelFormat) -> Bool[Array, "..."]:
        """Return whether v = w / scale is within the range through which gradients pass."""
        return format.inside(v, zero)

    def beyond(self, v: Array, level: Array, format: LevelFormat) -> Array:
        """Return dq/ds of a weight outside the range."""
        return level

    def grid(self, w: Float[Array, "k n"], learned: Learned, format: LevelFormat) -> Grid:
        """Return the grid with scales as stored, straight-through to the learned arrays."""
        scale = scaled_gradient(learned["scale"], self._factor(format, w.shape))
        grid = format.stored(jax.lax.stop_gradient(scale))
        grid = grid._replace(scale=through(scale, grid.scale))
        if format.symmetric:
            return grid
        return grid._replace(zero=rounded_zero(learned["zero"], format))

    def _factor(self, format: LevelFormat, shape: tuple[int, ...]) -> float:
        if self.scale_gradient == "none":
            return 1.0
        k, n = shape
        count = format.rows_per_group(k) * (n if format.group_size == "tensor" else 1)
        return 1 / math.sqrt((k * n if self.scale_gradient == "matrix" else count) * format.reach)

    def packed(self, w: Float[Array, "k n"], learned: Learned, format: Any) -> dict[str, Array]:
        """Return the packed arrays of the rounded matrix."""
        w, learned = jax.lax.stop_gradient((w.astype(jnp.float32), learned))
        grid = self.grid(w, learned, format)
        return format.pack(format.round(w, spread(grid, format, w.shape))[0], grid)

    def value(
        self,
        w: Float[Array, "k n"],
        learned: Learned,
        format: Any,
        packed: dict[str, Array] | None = None,
    ) -> Float[Array, "k n"]:
        """Return the rounded matrix, differentiable in `w` and `learned`."""
        w = w.astype(jnp.float32)
        rows = spread(self.grid(w, learned, format), format, w.shape)
        return stepped((format, self), w, rows.scale, format.zero_of(rows))


@dataclasses.dataclass(frozen=True)
class StretchedElastic(LSQ):
    """ParetoQ's learned ranges for 2 bits (`Stretched`) and 1.58 bits (`Ternary`).

    Inside means |w| <= 0.99 a, for a range a that starts as the largest weight. q / a is one of
    -3/4, -1/4, 1/4, 3/4, or of -2/3, 0, 2/3; the distance between these is the stored step.

    Attributes:
      released: at 1.58 bits, use dq/da = 1 for weights outside the range, as the released code
        does, instead of the 2/3 of the forward pass.

    Source:
      Liu et al. 2025, arXiv:2502.02631, and its released code.
    """

    init: Literal["format", "mean", "range"] = "range"
    released: bool = False

    def check(self, format: Format) -> None:
        """Raise ValueError unless the format is `Stretched` or `Ternary`."""
        if not (isinstance(format, LevelFormat) and format.stretch):
            raise ValueError(f"stretched codes need the format Stretched or Ternary, got {format}")

    def reach(self, format: LevelFormat) -> float:
        """Return the initial position of the largest weight, in steps: at the end of the range."""
        return format.stretch

    def inside(self, v: Array, zero: Array, format: LevelFormat) -> Bool[Array, "..."]:
        """Return whether v is within 0.99 of the range."""
        edge = 0.99 * format.stretch
        return (v >= -edge) & (v <= edge)

    def beyond(self, v: Array, level: Array, format: LevelFormat) -> Array:
        """Return dq/ds of a weight outside the range."""
        # At 2 bits the released code has the slope of the forward pass.
        return jnp.sign(v) * format.stretch if self.released and format.integral else level


def rounded_zero(zero: Float[Array, "g n"], format: LevelFormat) -> Float[Array, "g n"]:
    """Return a zero point rounded and clamped to the codes of its format, straight-through."""
    whole = jnp.clip(jnp.round(jax.lax.stop_gradient(zero)), *format.ends)
    return through(zero, whole)


def of_groups(fn: Callable, w: Float[Array, "k n"], format: LevelFormat) -> Float[Array, "g n"]:
    """Reduce the weights that share a scale by fn(array, axes), such as `jnp.mean`."""
    k, n = w.shape
    rows = format.rows_per_group(k)
    axes = (1, 2) if format.group_size == "tensor" else (1,)
    groups = jnp.pad(w, ((0, -k % rows), (0, 0)), mode="edge").reshape(-1, rows, n)
    return fn(groups, axes).reshape(groups.shape[0], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def stepped(
    rule: tuple[LevelFormat, LSQ],
    w: Float[Array, "k n"],
    scale: Float[Array, "k n"],
    zero: Float[Array, "..."],
) -> Float[Array, "k n"]:
    """Round w on a grid, with the gradients of `LSQ`; `rule` is the format and the estimator."""
    return rule[0].round(w, rule[0].make_grid(scale, zero))[1]


def _stepped_forward(rule: tuple, w: Array, scale: Array, zero: Array) -> tuple[Array, tuple]:
    return stepped(rule, w, scale, zero), (w, scale, zero)


def _stepped_backward(rule: tuple, kept: tuple, g: Array) -> tuple[Array, Array, Array]:
    (format, estimator), (w, scale, zero) = rule, kept
    v = w / scale
    level, inside = format.level(v, zero), estimator.inside(v, zero, format)
    slope = jnp.where(inside, level - v, estimator.beyond(v, level, format))
    d_zero = jnp.where(inside, 0.0, -scale) * g
    return g * inside, g * slope, d_zero if jnp.ndim(zero) else jnp.zeros(())


stepped.defvjp(_stepped_forward, _stepped_backward)


@jax.custom_jvp
def scaled_gradient(x: Array, factor: float) -> Array:
    """Return x unchanged, with its gradient multiplied by `factor`.

    >>> jax.grad(lambda x: scaled_gradient(x, 0.5) ** 2)(3.0).item()
    3.0
    """
    return x


@scaled_gradient.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, factor = primals
    return x, tangents[0] * factor


def spread(grid: Grid, format: LevelFormat, shape: tuple[int, ...]) -> Grid:
    """Repeat a grid [groups, n] for each row of a [k, n] matrix; gradients sum over the rows."""
    k, n = shape
    rows = format.rows_per_group(k)

    def one(a: Array) -> Array:
        if a.shape[0] == 1:
            return jnp.broadcast_to(a, (k, n))
        return jnp.broadcast_to(a[:, None], (a.shape[0], rows, n)).reshape(-1, n)[:k]

    zero = format.zero_of(grid)
    return format.make_grid(one(grid.scale), one(zero) if zero.ndim else None)


# --- randomness ----------------------------------------------------------------------------------

_key = Setting[Array | None]("key of rounding", None)


def chance() -> Array | None:
    """Return the key of stochastic rounding in the current context, if any."""
    return _key.get()


@contextlib.contextmanager
def randomness(key: Array | None) -> Iterator[None]:
    """Round weights with stochastic rounding at random inside this context.

    Pass the key as an argument of the loss, a new one in every step. One evaluation of the loss
    then sees one rounding, also where it is recomputed.

    Args:
      key: PRNG key, or None for rounding to nearest.

    >>> import jaxquant as jq
    >>> p = jq.latent({"w": jnp.full((64, 2), 0.3).at[0].set(1.0)}, jq.ste(2, 64, stochastic=True))
    >>> def loss(p, key):
    ...     with jq.estimators.randomness(key):
    ...         return jnp.sum(jnp.ones((1, 64)) @ p["w"])
    >>> draws = [jq.quantized(loss)(p, jax.random.key(i)) for i in range(3)]
    >>> len({float(d) for d in draws}) > 1
    True
    """
    with _key.set(key):
        yield
