"""Activation formats: how the input of a matmul is quantized before it meets packed weights.

Integer formats are computed exactly. A row x is approximated by s (q - z) with integer codes q, a
scale s and an integer zero point z, so x @ w = s (q @ w - z 1 @ w), and the kernels only multiply
codes. Below 8 bits, q - z fits the kernels' int8 and is passed directly. At 8 bits, and for static
ranges, whose learned zero points may be fractional, a row of ones is appended to the codes: the
same call then also returns the column sums of w that the zero points need.

A row that contains NaN or an infinity gets codes 0 and scale NaN, so all its results are NaN. The
rule is stated in `pallas_kernels.activations`, which also applies it where kernels do the rounding.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.core.fields import check_fields, shown
from jaxquant.core.straight_through import nearest_codes, through
from pallas_kernels import activations as forms
from pallas_kernels.context import Setting, compiled

_E4M3 = float(jnp.finfo(jnp.float8_e4m3fn).max)


class Codes(NamedTuple):
    """Quantized rows: x ~ scale * (code - zero), with integer codes stored as float32.

    Attributes:
      code: the codes, [m, k].
      scale: one scale per row; [1, 1] if static.
      zero: one zero point per row; [1, 1] if static, where a learned one may be fractional.
    """

    code: Float[Array, "m k"]
    scale: Float[Array, "m 1"]
    zero: Float[Array, "m 1"]


@dataclasses.dataclass(frozen=True)
class Activations:
    """An activation format: how the inputs of a matmul are quantized.

    Attributes:
      bits: number of bits per code, 2 to 8.
      symmetric: if True, codes run from -q to q with q = 2^(bits - 1) - 1. If False, 2^bits - 1
        steps (254 at 8 bits) cover the range from the smallest to the largest entry, extended to
        include zero, with an integer zero point.
      clip: fraction of the range kept, in (0, 1]; values outside are clamped.
      per: what shares a scale: "token" (a row), "block" (256 channels of a row) or "tensor" (all
        inputs, with a static scale found by calibration).
      floating: use float8 e4m3 with a scale per token instead of integer codes.
      mse: for a "tensor" scale, choose the range with the least squared error on the rows kept by
        calibration, instead of their full range.
      mean: set each token's scale to mean|x| / sqrt(q) instead of deriving it from the largest
        entry, and add the code -q - 1 (BitNet a4.8, arXiv:2411.04965, which does so at 4 bits).
      top: fraction of each token's entries kept, those of largest magnitude; the others become 0
        (BitNet a4.8 keeps 0.5, at 8 bits). Gradients pass straight through to all entries,
        including the dropped ones.

    Raises:
      ValueError: a value is out of range, or fields do not combine: `mean` and `top` need
        symmetric, unclipped codes with a scale per token; "block" and `floating` allow only
        symmetric 8-bit codes without clipping; `mse` needs "tensor".

    >>> str(Activations(4, symmetric=False, clip=0.9))
    'int4,asymmetric,clip=0.9'
    >>> Activations.of("int8/256")
    Activations(bits=8, symmetric=True, clip=1.0, per='block', floating=False, ...)
    """

    bits: int = 8
    symmetric: bool = True
    clip: float = 1.0
    per: Literal["token", "block", "tensor"] = "token"
    floating: bool = False
    mse: bool = False
    mean: bool = False
    top: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits of activations must be 2 to 8, got {self.bits}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be in (0, 1], got {self.clip}")
        if self.per not in ("token", "block", "tensor"):
            raise ValueError(f'per must be "token", "block" or "tensor", got {self.per!r}')
        plain = self.bits == 8 and self.symmetric and self.clip == 1
        if not 0 < self.top <= 1:
            raise ValueError(f"top must be in (0, 1], got {self.top}")
        if (self.mean or self.top < 1) and not (self.symmetric and self.clip == 1 and self.by_row):
            raise ValueError("mean and top need symmetric codes, clip=1 and one scale per token")
        if self.per == "block" and not plain:
            raise ValueError('per="block" needs symmetric codes of 8 bits and clip=1')
        if self.mse and not self.static:
            raise ValueError('mse needs a static scale: add static, which is per="tensor"')
        if self.floating and not (plain and self.per == "token"):
            raise ValueError(
                "float8 activations take no options: they are always e4m3 with one scale per token"
            )

    @staticmethod
    def of(text: "str | Activations | None") -> "Activations | None":
        """Parse the text form of a format, as `str` prints it.

        Args:
          text: a text such as "int4,asymmetric,clip=0.9"; an `Activations` or None is returned as
            is.

        Returns:
          The format, or None for "float" (inputs are not rounded).

        Raises:
          ValueError: the text is not a known format; the message lists the accepted ones.
        """
        if text is None or isinstance(text, Activations):
            return text
        return _parse(text) if isinstance(text, str) else _parse(repr(text))

    def __str__(self) -> str:
        if self.floating:
            return "float8"
        words = [f"int{self.bits}" + ("/256" if self.per == "block" else "")]
        words += [] if self.symmetric else ["asymmetric"]
        words += [f"clip={self.clip:g}"] if self.clip < 1 else []
        words += ["static"] if self.static else []
        words += ["mean"] if self.mean else []
        words += [f"top={self.top:g}"] if self.top < 1 else []
        return ",".join([*words, *(["mse"] if self.mse else [])])

    @property
    def by_row(self) -> bool:
        """Whether each token has one scale, shared by all its channels."""
        return self.per == "token" and not self.floating

    @property
    def static(self) -> bool:
        """Whether the scale is fixed in advance, by calibration or training."""
        return self.per == "tensor"

    @property
    def kernel(self) -> str | None:
        """The form in which kernels quantize rows themselves; None if rows are rounded first."""
        if self.bits != 8 or not self.symmetric or self.clip < 1 or self.static or self.floating:
            return None
        if self.mean or self.top < 1:
            return None
        return "int8" if self.per == "token" else "int8/256"

    def describe(self) -> str:
        """Describe the arithmetic of a matmul, for `explain`."""
        if self.floating:
            return "e4m3 activations, float product"
        sums = "" if self.symmetric else ", zero points by row sums"
        return f"{self} activations, integer product{sums}"

    # --- scales and codes ------------------------------------------------------------------------

    def range(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Return the scale and zero point for entries between `low` and `high`.

        Args:
          low: smallest entries, any shape.
          high: largest entries, same shape.

        Returns:
          Scales and zero points, float32, same shape. Where all entries are 0 the scale is 1.

        >>> Activations(4, symmetric=False).range(jnp.array([-1.0]), jnp.array([2.0]))
        (Array([0.2], dtype=float32), Array([-3.], dtype=float32))
        """
        low, high = (self.clip * a.astype(jnp.float32) for a in (low, high))
        bottom, top = self.limits
        if self.symmetric:
            scale = jnp.maximum(-low, high) / top
            scale = jnp.where(scale == 0, 1.0, scale)
            return scale, jnp.zeros_like(scale)
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scale = (high - low) / (top - bottom)
        empty, scale = scale == 0, jnp.where(scale == 0, 1.0, scale)
        zero = jnp.clip(jax.lax.stop_gradient(jnp.round(bottom - low / scale)), bottom, top)
        return scale, jnp.where(empty, 0.0, zero)  # a range of zeros decodes to exact zeros

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        top = (1 << (self.bits - 1)) - 1
        balanced = not self.mean and (self.symmetric or self.bits == 8)
        return (-top if balanced else -top - 1), top

    def codes(self, x: Float[Array, "m k"], data: dict[str, Array]) -> Codes:
        """Quantize rows to codes, scales and zero points.

        Args:
          x: the rows, [m, k].
          data: the arrays "scale" and "zero" of a static format; not read otherwise.
        """
        x, factor = forms.finite_rows(x.astype(jnp.float32))
        whole = x
        if self.top < 1:
            x = _largest(x, self.top)
        if self.static:
            scale, zero = (data[name].reshape(1, 1) for name in ("scale", "zero"))
        elif self.mean:
            scale = jnp.mean(jnp.abs(x), axis=1, keepdims=True) / self.limits[1] ** 0.5
            scale = jnp.where(scale == 0, 1.0, scale)
            zero = jnp.zeros_like(scale)
        else:
            low, high = (f(x, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
            scale, zero = self.range(low, high)
        if self.mean or self.top < 1:
            scale = jax.lax.stop_gradient(scale)
            code = nearest_codes(jax.lax.stop_gradient(x) / scale, zero, self.limits)
            return Codes(through(whole / scale, code), scale * factor, zero)
        steps, of = x / scale, zero
        if self.static:  # add a learned, fractional zero point before rounding
            steps, of = steps + zero, jnp.zeros(())
        return Codes(nearest_codes(steps, of, self.limits), scale * factor, zero)

    @functools.partial(compiled, static_argnums=0)
    def rounded(self, x: Float[Array, "m k"], data: dict[str, Array]) -> Float[Array, "m k"]:
        """Quantize and dequantize rows.

        Args:
          x: the rows, [m, k].
          data: the arrays "scale" and "zero" of a static format; not read otherwise.

        Returns:
          The rounded rows, float32.

        >>> Activations(2).rounded(jnp.array([[3.0, -2.0, 0.0], [0.0, 0.0, 0.0]]), {}).tolist()
        [[3.0, -3.0, 0.0], [0.0, 0.0, 0.0]]
        """
        if self.floating:
            return _float8(x.astype(jnp.float32))
        if self.kernel is not None:
            return forms.rounded(x, self.kernel)
        code, scale, zero = self.codes(x, data)
        return (code - zero) * scale

    def straight(self, x: Float[Array, "m k"], data: dict[str, Array]) -> Float[Array, "m k"]:
        """Return `rounded(x, data)` with the gradients that a matmul has."""
        value = self.rounded(x, data)
        fixed = self.kernel is not None or self.floating
        return through(x.astype(jnp.float32), value) if fixed else value

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arrays that a weight stores for this format."""
        one = jax.ShapeDtypeStruct((1,), jnp.float32)
        return {"scale": one, "zero": one} if self.static else {}


def kernel_form(form: Activations | None) -> str:
    """Return the form of `pallas_kernels.activations.FORMS` in which kernels receive the rows.

    >>> [kernel_form(Activations.of(t)) for t in ("float", "int8", "int4", "float8")]
    ['float', 'int8', 'codes', 'float']
    """
    if form is None or form.floating:
        return "float"
    return form.kernel or "codes"


_WORDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "asymmetric": lambda _: {"symmetric": False},
    "static": lambda _: {"per": "tensor"},
    "mse": lambda _: {"mse": True},
    "clip": lambda value: {"clip": float(value)},
    "mean": lambda _: {"mean": True},
    "top": lambda value: {"top": float(value)},
}


@functools.lru_cache
def _parse(text: str) -> Activations | None:
    if text == "float":
        return None
    if text == "float8":
        return Activations(floating=True)
    name, *words = text.split(",")
    options: dict[str, Any] = {}
    try:
        kind, slash, block = name.partition("/")
        if not kind.startswith("int") or block != "256" * bool(slash):
            raise ValueError
        options = {"bits": int(kind[3:])} | ({"per": "block"} if slash else {})
        for word in words:
            key, _, value = word.partition("=")
            options |= _WORDS[key](value)
    except (ValueError, KeyError):
        raise ValueError(
            'activations must be "float", "float8", "int8/256" or "intB" with B from '
            '2 to 8, which ",asymmetric", ",clip=0.9", ",static", ",mse", ",mean" '
            f'and ",top=0.5" may follow; got {shown(text)}'
        ) from None
    return Activations(**options)


# --- rounding switched off ------------------------------------------------------------------------

_exact = Setting[bool]("exact activations", False)


@contextlib.contextmanager
def exact_activations() -> Iterator[None]:
    """Leave the inputs of matmuls traced inside unrounded, whatever format the weights ask for.

    Use it for the few tokens that are too large to round well, typically the first ones, whose keys
    and values every other token attends to (the idea of Liu et al. 2024, arXiv:2403.01241). It acts
    while a function is traced, so enter it inside the function.

    >>> import jaxquant as jq
    >>> w = jq.ptq.with_activations(jq.quantize_array(jnp.eye(4), jq.rtn(8, 4)), "int2")
    >>> def fn(w, x):
    ...     with jq.core.exact_activations():
    ...         return x @ w
    >>> jq.quantized(fn)(w, jnp.array([[1.0, 0.25, 0.0, 0.0]])).round(2).tolist()
    [[1.0, 0.25, 0.0, 0.0]]
    """
    with _exact.set(True):
        yield


def in_force(form: Activations | None) -> Activations | None:
    """Return the format to use at this point of the trace: None in `exact_activations`."""
    return None if _exact.get() else form


# --- products ------------------------------------------------------------------------------------


class Entered(NamedTuple):
    """Rows prepared for a matmul.

    Attributes:
      rows: the rows to multiply; the matmul must be linear in them, apart from its own rounding.
      form: how kernels treat the rows, one of `pallas_kernels.activations.FORMS`.
      leave: maps the product of `rows` to the product of the original rows.
    """

    rows: Float[Array, "r k"]
    form: str
    leave: Callable[[Float[Array, "r n"]], Float[Array, "m n"]]


def entered(form: Activations | None, x: Float[Array, "m k"], data: dict[str, Array]) -> Entered:
    """Prepare the rows of x for a matmul: round them, unless the kernels do that themselves.

    Rounding has straight-through gradients, while scales and clipping contribute gradients of their
    own. Where kernels round, and for float8, gradients are those of the unrounded product.

    Args:
      form: the activation format; None leaves x as it is.
      x: the rows, [m, k].
      data: the arrays "scale" and "zero" of a static format; not read otherwise.

    >>> rows, _, leave = entered(Activations(4), jnp.array([[7.0, 1.4]]), {})
    >>> leave(rows @ jnp.array([[2.0], [1.0]])).tolist()
    [[15.0]]
    """
    as_it_is = lambda y: y
    if form is None:
        return Entered(x, "float", as_it_is)
    if form.kernel is not None:
        return Entered(x, form.kernel, as_it_is)
    if form.floating:
        return Entered(through(x, form.rounded(x, data)), "float", as_it_is)
    code, scale, zero = form.codes(x, data)
    if form.symmetric or (form.bits < 8 and not form.static):
        return Entered(code - zero, "codes", lambda y: y * scale)
    rows = jnp.concatenate([code, jnp.ones_like(code[:1])])
    return Entered(rows, "codes", lambda y: scale * (y[:-1] - zero * y[-1:]))


def _largest(x: Float[Array, "m k"], share: float) -> Float[Array, "m k"]:
    """Set all but the largest entries of each row to 0; entries that tie with the last one stay."""
    size = jnp.abs(x)
    kept = max(1, round(share * x.shape[1]))
    return jnp.where(size >= jax.lax.top_k(size, kept)[0][:, -1:], x, 0.0)


def _float8(x: Float[Array, "m k"]) -> Float[Array, "m k"]:
    x, factor = forms.finite_rows(x)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / _E4M3)
    # The cast gives NaN above 464 instead of saturating.
    code = jnp.clip(x / scale, -_E4M3, _E4M3).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return code * scale * factor
