"""Estimators: what a latent weight is after rounding, and what derivatives go through that.

An estimator gives, of one matrix w [k, n] in float32 and its learned arrays,

- `value`: the rounded matrix, differentiable in both, by the written formula and not by tracing
  the rounding;
- `packed`: the same as its format stores it, decoding to `value` bit for bit.

Rounding is to nearest, halves to even, by the format itself. `start` says where training begins.
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
    """Scales from the weights of the moment, which no derivative goes into; codes straight through.

    dL/dw = dL/dq, everywhere or (`clipped`) where w is within the range of its codes, ends included
    (Bengio et al. 2013, arXiv:1308.3432). Any format that encodes without a key will do.

    Attributes:
      clipped: no derivative beyond the range; for `Integer` and tables.
      stochastic: inside `randomness(key)`, up or down by chance, so that the mean is w (within the
        range); outside of it to nearest. For `Integer`.
    """

    clipped: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, format: Format) -> None:
        """Raise ValueError unless weights in this format can train so."""
        if self.clipped and not isinstance(format, LevelFormat):
            raise ValueError(f"clipped derivatives are of formats with a range of codes: {format}")
        if self.stochastic and not (isinstance(format, LevelFormat) and format.integral):
            raise ValueError(f"stochastic rounding is between whole numbers: {format}")

    def start(self, w: Float[Array, "k n"], format: Any, data: dict[str, Array]) -> Learned:
        """Nothing is learned but the weights."""
        return {}

    def grid(self, w: Float[Array, "k n"], format: LevelFormat) -> Grid:
        """Scales (and zero points) of a matrix."""
        return format.grids(w)

    def packed(self, w: Float[Array, "k n"], learned: Learned, format: Any) -> dict[str, Array]:
        """Storage of the rounded matrix."""
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        if not isinstance(format, LevelFormat):
            return format.encode(w)
        grid = self.grid(w, format)
        rows = spread(grid, format, w.shape)
        key = _key.get()
        if self.stochastic and key is not None:
            # A key of its own for every matrix, in a scan too: no name tells them apart there.
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
        """The rounded matrix; `packed`, if it is at hand."""
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
    """BitNet b1.58's ternary weights: a scale per matrix, the mean magnitude.

    Derivatives go straight through for all weights, however large. We differ: the scale may be less
    than 1e-5, so that codes do not depend on the units of the weights.

    Attributes:
      axis: inside `shard_map`, the mesh axis over which matrices are split, if any.

    Source: Ma et al. 2024, arXiv:2402.17764, and the authors' training notes.
    """

    axis: str = ""

    def check(self, format: Format) -> None:
        """Raise ValueError unless the format is ternary with one scale a matrix."""
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
    """Learned steps: the scale of each group trains with the weights (and its zero point).

    With v = w / s, c the nearest level to v (code, less the zero point) and "inside" where v is
    within the range of the levels, of q = s c:

        dq/dw = 1 inside, else 0;   dq/ds = c - v inside, else c;   dq/dzero = 0 inside, else -s.

    A zero point is kept as a float and rounded, straight through; inside is then where the rounded
    code is one, as in EfficientQAT (Chen et al. 2024, arXiv:2407.11062). Scales meet the codes as
    storage will give them back.

    Attributes:
      init: where scales begin: "format", as the format or the rounder before chose them; "mean",
        2 mean|w| / sqrt(largest code), LSQ's own, good at 3 and 4 bits; "range", so that the
        largest weight lies at the end of the range.
      scale_gradient: dL/ds is multiplied by 1 / sqrt(N c), c the largest level, N the weights of a
        "step" or of the "matrix"; "none": by 1.

    Source: LSQ, Esser et al. 2020, arXiv:1902.08153; LSQ+, Bhalgat et al. 2020, arXiv:2004.09576.
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
        """Raise ValueError unless weights in this format can train so."""
        if not isinstance(format, LevelFormat):
            raise ValueError(f"learned steps are of integers and tables, got {format}")
        if not format.learnable:
            raise ValueError("scales that are quantized themselves cannot be learned: use ste")
        if self.init == "mean" and not (format.integral and format.symmetric):
            raise ValueError(f'init="mean" is of codes without a zero point, got {format}')

    def start(self, w: Float[Array, "k n"], format: Any, data: dict[str, Array]) -> Learned:
        """Scales and zero points to begin with, of a weight and what storage holds of it."""
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
        """In steps, where the largest weight lies to begin with: at the last level."""
        return format.reach

    def inside(self, v: Array, zero: Array, format: LevelFormat) -> Bool[Array, "..."]:
        """Whether v = w / scale is within the range that derivatives go through."""
        return format.inside(v, zero)

    def beyond(self, v: Array, level: Array, format: LevelFormat) -> Array:
        """dq/ds of a weight beyond the range."""
        return level

    def grid(self, w: Float[Array, "k n"], learned: Learned, format: LevelFormat) -> Grid:
        """The grid as storage gives it back, straight through to the learned arrays."""
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
        """Storage of the rounded matrix."""
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
        """The rounded matrix."""
        w = w.astype(jnp.float32)
        rows = spread(self.grid(w, learned, format), format, w.shape)
        return stepped((format, self), w, rows.scale, format.zero_of(rows))


@dataclasses.dataclass(frozen=True)
class StretchedElastic(LSQ):
    """ParetoQ's learned ranges at 2 bits (`Stretched`) and 1.58 (`Ternary`).

    Inside is |w| <= 0.99 a, of a range a that begins as the largest weight; q / a is one of -3/4,
    -1/4, 1/4, 3/4, or of -2/3, 0, 2/3, whose step is stored.

    Attributes:
      released: at 1.58 bits, of weights beyond the range dq/da = 1, as the released program has it,
        and not the 2/3 that the forward has.

    Source: Liu et al. 2025, arXiv:2502.02631, and its released program.
    """

    init: Literal["format", "mean", "range"] = "range"
    released: bool = False

    def check(self, format: Format) -> None:
        """Raise ValueError unless the format is one of the two."""
        if not (isinstance(format, LevelFormat) and format.stretch):
            raise ValueError(f"stretched codes are Stretched or Ternary, got {format}")

    def reach(self, format: LevelFormat) -> float:
        """In steps, where the largest weight lies to begin with: at the end of the range."""
        return format.stretch

    def inside(self, v: Array, zero: Array, format: LevelFormat) -> Bool[Array, "..."]:
        """Whether v is within 0.99 of the range."""
        edge = 0.99 * format.stretch
        return (v >= -edge) & (v <= edge)

    def beyond(self, v: Array, level: Array, format: LevelFormat) -> Array:
        """dq/ds of a weight beyond the range."""
        # At 2 bits the released program has the forward's slope.
        return jnp.sign(v) * format.stretch if self.released and format.integral else level


def rounded_zero(zero: Float[Array, "g n"], format: LevelFormat) -> Float[Array, "g n"]:
    """A zero point as a whole number within the codes, straight through."""
    whole = jnp.clip(jnp.round(jax.lax.stop_gradient(zero)), *format.ends)
    return through(zero, whole)


def of_groups(fn: Callable, w: Float[Array, "k n"], format: LevelFormat) -> Float[Array, "g n"]:
    """fn(w, axes) of the weights of every scale."""
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
    """w rounded on the grid of a format, with the derivatives of `LSQ`."""
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
    """x, its derivative multiplied by the factor.

    >>> jax.grad(lambda x: scaled_gradient(x, 0.5) ** 2)(3.0).item()
    3.0
    """
    return x


@scaled_gradient.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, factor = primals
    return x, tangents[0] * factor


def spread(grid: Grid, format: LevelFormat, shape: tuple[int, ...]) -> Grid:
    """A grid [groups, n] at each of its rows [k, n]; its derivative is a sum over these."""
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
    """The key that rounding is by now, if any."""
    return _key.get()


@contextlib.contextmanager
def randomness(key: Array | None) -> Iterator[None]:
    """Weights with stochastic rounding are rounded by chance in what is traced inside.

    The key is an argument of the loss, another in every step; so that one loss sees one rounding,
    recomputed or not.

    >>> import jaxquant as jq
    >>> p = jq.latent({"w": jnp.full((64, 2), 0.3).at[0].set(1.0)}, jq.ste(2, 64, stochastic=True))
    >>> def loss(p, key):
    ...     with jq.randomness(key):
    ...         return jnp.sum(jnp.ones((1, 64)) @ p["w"])
    >>> draws = [jq.quantized(loss)(p, jax.random.key(i)) for i in range(3)]
    >>> len({float(d) for d in draws}) > 1
    True
    """
    with _key.set(key):
        yield
