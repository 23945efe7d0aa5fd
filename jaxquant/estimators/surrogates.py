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
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.fields import check_fields
from jaxquant.core.straight_through import through
from jaxquant.formats import Grid, Integer, Stretched, Ternary
from jaxquant.formats.scales import as_stored
from jaxquant.formats.table import Scales, Table

Learned = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StraightThrough:
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

    def check(self, format: Any) -> None:
        """Raise ValueError unless weights in this format can train so."""
        if self.clipped and not isinstance(format, Integer | Table):
            raise ValueError(f"clipped derivatives are of formats with a range of codes: {format}")
        if self.stochastic and not isinstance(format, Integer):
            raise ValueError(f"stochastic rounding is between whole numbers: {format}")

    def start(self, w: Float[Array, "k n"], format: Any, data: dict[str, Array]) -> Learned:
        """Nothing is learned but the weights."""
        return {}

    def grid(self, w: Float[Array, "k n"], format: Any) -> Any:
        """Scales (and zero points) of a matrix."""
        return format.grids(w)

    def packed(self, w: Float[Array, "k n"], learned: Learned, format: Any) -> dict[str, Array]:
        """Storage of the rounded matrix."""
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        if not isinstance(format, Integer | Table):
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
        if not self.clipped:
            return through(w, value)
        fixed = jax.lax.stop_gradient(w)
        rows = spread(self.grid(fixed, format), format, w.shape)
        _, inside = steps(format, fixed / rows.scale, getattr(rows, "zero", None), None)
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

    def check(self, format: Any) -> None:
        """Raise ValueError unless the format is ternary with one scale a matrix."""
        super().check(format)
        if not isinstance(format, Ternary) or format.group_size != "tensor":
            raise ValueError(f'expected Ternary(group_size="tensor"), got {format}')

    def grid(self, w: Float[Array, "k n"], format: Any) -> Grid:
        mean = jnp.mean(jnp.abs(w), keepdims=True)
        if self.axis:
            mean = jax.lax.pmean(mean, self.axis)
        scale = as_stored(mean, format.scale_dtype)
        return Grid(scale, jnp.zeros(scale.shape, jnp.int32))


@dataclasses.dataclass(frozen=True)
class LSQ:
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

    edge: ClassVar[float | None] = None  # of the inside, if it is not that of the levels
    beyond: ClassVar[float | None] = None  # dq/ds there, if it is not the last level

    def __post_init__(self) -> None:
        check_fields(self)
        for name, known in (("init", ("format", "mean", "range")),
                            ("scale_gradient", ("step", "matrix", "none"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")

    def check(self, format: Any) -> None:
        """Raise ValueError unless weights in this format can train so."""
        if not isinstance(format, Integer | Table):
            raise ValueError(f"learned steps are of integers and tables, got {format}")
        if getattr(format, "double_quant", False):
            raise ValueError("scales that are quantized themselves cannot be learned: use ste")
        if self.init == "mean" and not (isinstance(format, Integer) and format.symmetric):
            raise ValueError(f'init="mean" is of codes without a zero point, got {format}')

    def start(self, w: Float[Array, "k n"], format: Any, data: dict[str, Array]) -> Learned:
        """Scales and zero points to begin with, of a weight and what storage holds of it."""
        grid = grid_of(format, data)
        learned = {"scale": grid.scale.astype(jnp.float32)}
        if self.init != "format":
            learned["scale"] = self._initial(w, format)
        if isinstance(grid, Grid) and not format.symmetric:
            learned["zero"] = grid.zero.astype(jnp.float32)
        return learned

    def _initial(self, w: Float[Array, "k n"], format: Any) -> Float[Array, "g n"]:
        if self.init == "mean":
            return 2 * of_groups(jnp.mean, jnp.abs(w), format) / math.sqrt(_largest(format))
        largest = of_groups(jnp.max, jnp.abs(w), format)
        return largest / (self.edge_of(format) or _largest(format))

    def edge_of(self, format: Any) -> float | None:
        """In steps, how far the inside reaches; None: as far as the levels."""
        return None

    def grid(self, w: Float[Array, "k n"], learned: Learned, format: Any) -> Any:
        """The grid as storage gives it back, straight through to the learned arrays."""
        scale = scaled_gradient(learned["scale"], self._factor(format, w.shape))
        fixed = jax.lax.stop_gradient(scale)
        if isinstance(format, Table):
            grid = format.stored(fixed)
            return grid._replace(scale=through(scale, grid.scale))
        stored = through(scale, as_stored(fixed, format.scale_dtype))
        return Grid(stored, rounded_zero(learned.get("zero", jnp.zeros_like(stored)), format))

    def _factor(self, format: Any, shape: tuple[int, ...]) -> float:
        if self.scale_gradient == "none":
            return 1.0
        k, n = shape
        count = format.rows_per_group(k) * (n if format.group_size == "tensor" else 1)
        return 1 / math.sqrt(
            (k * n if self.scale_gradient == "matrix" else count) * _largest(format)
        )

    def packed(self, w: Float[Array, "k n"], learned: Learned, format: Any) -> dict[str, Array]:
        """Storage of the rounded matrix."""
        w, learned = jax.lax.stop_gradient((w.astype(jnp.float32), learned))
        grid = self.grid(w, learned, format)
        codes = format.round(w, spread(grid, format, w.shape))[0]
        if isinstance(grid, Grid):
            grid = grid._replace(zero=grid.zero.astype(jnp.int32))
        return format.pack(codes, grid)

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
        zero = getattr(rows, "zero", jnp.zeros(()))
        return stepped((format, self), w, rows.scale, zero)


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

    def check(self, format: Any) -> None:
        """Raise ValueError unless the format is one of the two."""
        if not isinstance(format, Stretched | Ternary):
            raise ValueError(f"stretched codes are Stretched or Ternary, got {format}")

    def edge_of(self, format: Any) -> float:
        return 1.5 if isinstance(format, Ternary) else 1.0


def rounded_zero(zero: Float[Array, "g n"], format: Any) -> Float[Array, "g n"]:
    """A zero point as a whole number within the codes, straight through."""
    whole = jnp.clip(jnp.round(jax.lax.stop_gradient(zero)), *format.limits)
    return through(zero, whole)


def of_groups(fn: Any, w: Float[Array, "k n"], format: Any) -> Float[Array, "g n"]:
    """fn(w, axes) of the weights of every scale."""
    k, n = w.shape
    rows = format.rows_per_group(k)
    axes = (1, 2) if format.group_size == "tensor" else (1,)
    groups = jnp.pad(w, ((0, -k % rows), (0, 0)), mode="edge").reshape(-1, rows, n)
    return fn(groups, axes).reshape(groups.shape[0], -1)


def _largest(format: Any) -> float:
    """The largest level, in steps; of codes with a zero point their number less one."""
    if isinstance(format, Table):
        return float(np.max(np.abs(_levels(format))))
    bottom, top = format.limits
    return float(top if format.symmetric else top - bottom)


def _levels(format: Table) -> np.ndarray:
    """All levels, or of a float8 format the ends."""
    named = isinstance(format.table, str)
    return np.asarray((-format.largest, format.largest) if named else format.table)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def stepped(
    rule: tuple[Any, LSQ],
    w: Float[Array, "k n"],
    scale: Float[Array, "k n"],
    zero: Float[Array, "..."],
) -> Float[Array, "k n"]:
    """w rounded on the grid of a format, with the derivatives of `LSQ`."""
    return rule[0].round(w, _like(rule[0], scale, zero))[1]


def _stepped_forward(rule: tuple, w: Array, scale: Array, zero: Array) -> tuple[Array, tuple]:
    return stepped(rule, w, scale, zero), (w, scale, zero)


def _stepped_backward(rule: tuple, kept: tuple, g: Array) -> tuple[Array, Array, Array]:
    (format, estimator), (w, scale, zero) = rule, kept
    v = w / scale
    level, inside = steps(format, v, zero, estimator)
    ternary = isinstance(format, Ternary)  # at 2 bits the released program has the forward's slope
    if isinstance(estimator, StretchedElastic) and estimator.released and ternary:
        level = jnp.where(inside, level, jnp.sign(v) * estimator.edge_of(format))
    slope = jnp.where(inside, level - v, level)
    d_zero = jnp.where(inside, 0.0, -scale) * g
    return g * inside, g * slope, d_zero if jnp.ndim(zero) else jnp.zeros(())


stepped.defvjp(_stepped_forward, _stepped_backward)


def steps(format: Any, v: Array, zero: Array | None, estimator: Any) -> tuple[Array, Array]:
    """The nearest level to v = w / scale, and whether v is inside the range."""
    if isinstance(format, Table):
        level = format.round(v, Scales(jnp.ones(()), {}))[1]
        ends = _levels(format)
        low, high = float(ends.min()), float(ends.max())
    else:
        zero = jnp.zeros(()) if zero is None else zero
        bottom, top = format.limits
        level = jnp.clip(jnp.round(v) + zero, bottom, top) - zero
        if not format.symmetric:
            rounded = jnp.round(v) + zero
            return level, (rounded >= bottom) & (rounded <= top)
        low, high = float(bottom), float(top)
    if isinstance(estimator, StretchedElastic):
        high = 0.99 * estimator.edge_of(format)
        low = -high
    return level, (v >= low) & (v <= high)


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


def spread(grid: Any, format: Any, shape: tuple[int, ...]) -> Any:
    """A grid [groups, n] at each of its rows [k, n]; its derivative is a sum over these."""
    k, n = shape
    rows = format.rows_per_group(k)

    def one(a: Array) -> Array:
        if a.shape[0] == 1:
            return jnp.broadcast_to(a, (k, n))
        return jnp.broadcast_to(a[:, None], (a.shape[0], rows, n)).reshape(-1, n)[:k]

    if isinstance(grid, Scales):
        return Scales(one(grid.scale), {})
    return jax.tree.map(one, grid)


def _like(format: Any, scale: Array, zero: Array) -> Any:
    return Scales(scale, {}) if isinstance(format, Table) else Grid(scale, zero)


def grid_of(format: Any, data: dict[str, Array]) -> Any:
    """The grid of packed data."""
    if isinstance(format, Table):
        return Scales(format.scales(format.opened(data)).astype(jnp.float32), {})
    return format.stored_grid(data)


# --- randomness ----------------------------------------------------------------------------------

_key: ContextVar[Array | None] = ContextVar("jaxquant_training_key", default=None)


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
    token = _key.set(key)
    try:
        yield
    finally:
        _key.reset(token)
