"""Products of quantized weights from integers alone: codes times codes, summed in int32.

`integer_only` changes the format of packed weights so that any function wrapped by
`jaxquant.quantized` computes

    a[r, n] = sum over k of q[r, k] (c[k, n] - z[n])    in int32,
    y[r, n] = s[r] t[n] a[r, n]                         in float32,

with codes q and scales s of the rounded inputs, and codes c, scales t and zero points z of the
weights, separately for each run of rows that shares scales. What is bit-exact: the sums a are the
same integers in whatever order they are added, here and in every kernel. The kernel of CPUs scales
after every 128 rows and adds the results in float32, so it rounds once per run; `segment=128` does
the same here. With one run (k of at most 128, one group) both are equal to the last bit anyway.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, PyTree

from jaxquant.core.activations import kernel_form
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.protocols import Data, Format
from jaxquant.core.tensor import QTensor
from jaxquant.formats.integer import Integer
from jaxquant.theory.integer_products import INPUT, accumulator_bits
from pallas_kernels import activations as forms
from pallas_kernels import reference
from pallas_kernels.codecs import layout


class Accumulated(NamedTuple):
    """A product before and after it is scaled.

    Attributes:
      codes: int8 codes of the inputs, [m, k].
      sums: int32 sums of every group of rows that shares scales, [groups, m, n].
      scales: float32 factors of these sums, [groups, m, n].
    """

    codes: Int8[Array, "m k"]
    sums: Int32[Array, "g m n"]
    scales: Float[Array, "g m n"]

    def scaled(self) -> Float[Array, "m n"]:
        """Return the product, float32: every sum times its factor, added up in their order."""
        add = lambda y, of: (y + of[0].astype(jnp.float32) * of[1], None)
        y = jnp.zeros(self.sums.shape[1:], jnp.float32)
        y, _ = jax.lax.scan(add, y, (self.sums, self.scales))
        # Behind a barrier, so that XLA does not merge this rounding with an addition that follows.
        return jax.lax.optimization_barrier(y)


def accumulated(
    x: Float[Array, "m k"],
    data: Data,
    format: Integer,
    form: str = "int8",
    segment: int | None = None,
) -> Accumulated:
    """Return the integer sums of a product of rounded inputs and packed integer codes.

    Args:
      x: the inputs, one per row, [m, k].
      data: the packed arrays of one matrix [k, n].
      format: their format: `Integer` or `Ternary`.
      form: how inputs are rounded, "int8", "int8/256" or "codes" of `pallas_kernels.activations`.
      segment: largest number of rows that are summed before they are scaled, a positive multiple
        of 8; None (the default) sums all rows that share scales.
    Returns:
      Codes, sums and scales.
    Raises:
      ValueError: an argument is invalid, the form keeps floats, or a sum may exceed int32.

    >>> from jaxquant.formats import Ternary
    >>> format = Ternary(group_size="tensor")
    >>> data = format.encode(jnp.array([[2.0], [0.0], [-2.0]]))
    >>> found = accumulated(jnp.array([[127.0, 5.0, 27.0]]), data, format)
    >>> found.sums.tolist(), found.scaled().tolist()
    ([[[100]]], [[200.0]])
    """
    check_arguments(accumulated, locals())
    _check_segment(segment)
    if form == "float":
        raise ValueError(
            "the weight's inputs are not rounded to integers: give it an activation format, with "
            "jaxquant.ptq.with_activations(params, 'int8')"
        )
    q, s = forms.quantize(jax.lax.optimization_barrier(x), form)
    k = x.shape[-1]
    group, block = format.rows_per_group(k), forms.BLOCK if s.shape[1] > 1 else k
    # All runs have one size, and none may cross a row at which scales change.
    shared = [n for n in (group, block) if n < k]
    size = math.gcd(*shared, segment or 0) if shared else min(segment or k, k)
    low, high = format.limits
    ends = (low, high) if format.symmetric else (low - high, high - low)
    if accumulator_bits(size, ends, INPUT) > 32:
        raise ValueError(f"sums of {size} products of codes from {ends} may exceed int32")
    sums = _sums(q, _codes(data, format, k), size, wide=max(map(abs, ends)) > 127)
    first = jnp.arange(sums.shape[0]) * size
    of_inputs = s[:, jnp.minimum(first // block, s.shape[1] - 1)].T[:, :, None]
    of_weights = data["scale"].astype(jnp.float32)
    rows = jnp.minimum(first // group, of_weights.shape[0] - 1)
    shape = (*sums.shape[:2], sums.shape[2])
    return Accumulated(q, sums, jnp.broadcast_to(of_weights[rows][:, None] * of_inputs, shape))


@dataclasses.dataclass(frozen=True)
class IntegerProducts(Format):
    """A format whose products are computed from integer codes, and scaled after the sum.

    Attributes:
      format: the format of the packed arrays, `Integer` or `Ternary`.
      segment: as in `accumulated`.
    """

    format: Integer
    segment: int | None = None

    def encode(self, w: Float[Array, "k n"]) -> Data:
        return self.format.encode(w)

    def decode(self, data: Data, k: int) -> Float[Array, "k n"]:
        return self.format.decode(data, k)

    def outputs(self, data: Data) -> int:
        return self.format.outputs(data)

    def matmul(
        self, x: Float[Array, "m k"], data: Data, activations: str = "float"
    ) -> Float[Array, "m n"]:
        return accumulated(x, data, self.format, activations, self.segment).scaled()

    def matmul_transposed(self, g: Float[Array, "m n"], data: Data, k: int) -> Float[Array, "m k"]:
        raise ValueError(
            "a product with the transpose of a packed weight, as of a tied embedding, has float "
            "inputs; leave that weight out of the recipe"
        )

    def kernel(self) -> str:
        """Describe what runs a matmul, for `explain`."""
        return "integer codes, int32 sums, scaled after the sum"


def integer_only(params: PyTree, segment: int | None = None) -> PyTree:
    """Return a tree whose packed weights compute their products from integers alone.

    Run it like the tree it came from, `jaxquant.quantized(fn)(integer_only(params), ...)`. Weights
    that are not packed stay as they are, and so do products that need no weight, such as those of
    attention; `jaxquant.theory.jaxpr_products.float_products` lists them. It shows what integer
    hardware would compute; XLA's own integer products are slower than the kernels.

    Args:
      params: tree with at least one packed weight: `Integer` or `Ternary`, with inputs rounded to
        integers, such as a BitNet checkpoint. Stacks of experts keep float products.
      segment: largest number of rows that are summed before they are scaled, a positive multiple
        of 8; None (the default) sums all rows that share scales. 128 gives the sums of the CPU's
        kernel.
    Returns:
      The tree; the packed arrays are the same.
    Raises:
      ValueError: a packed weight has another format or keeps its inputs in floats, or the tree has
        no packed weights.

    >>> import jaxquant as jq
    >>> q = jq.quantize({"w": jnp.eye(64)}, jq.ternary(activations="int8"))
    >>> run = jq.quantized(lambda p, x: x @ p["w"])
    >>> bool(jnp.array_equal(run(integer_only(q), jnp.ones((1, 64))), run(q, jnp.ones((1, 64)))))
    True
    """
    check_arguments(integer_only, locals())
    _check_segment(segment)
    packed = {path: w for path, w in path_leaves(params) if isinstance(w, QTensor)}
    if not packed:
        raise ValueError("expected packed weights, but the tree has none; quantize it first")
    return replace_leaves(params, {path: _changed(path, w, segment) for path, w in packed.items()})


def _check_segment(segment: int | None) -> None:
    if segment is not None and (segment < 8 or segment % 8):
        raise ValueError(f"segment must be a positive multiple of 8, or None, got {segment}")


def _changed(path: str, w: QTensor, segment: int | None) -> QTensor:
    if not isinstance(w.format, Integer):
        hint = "; pack it with jaxquant.freeze" if w.format.latent else ""
        raise ValueError(f"{path}: expected an Integer or Ternary format, got {w.format}{hint}")
    if kernel_form(w.activations) == "float":
        raise ValueError(
            f"{path}: its inputs are not rounded to integers; give it an activation format, with "
            "jaxquant.ptq.with_activations(params, 'int8')"
        )
    return dataclasses.replace(w, format=IntegerProducts(w.format, segment))


def _codes(data: Data, format: Integer, k: int) -> Int32[Array, "k n"]:
    """Return the codes less their zero points, as int32."""
    codes = layout.unpack(data["codes"], format.bits, k)
    if format.symmetric:
        return codes
    zero = reference.zero_points(data["zero"], format.bits, data["scale"].shape[-1])
    rows = jnp.minimum(jnp.arange(k) // format.rows_per_group(k), zero.shape[0] - 1)
    return codes - zero.astype(jnp.int32)[rows]


def _sums(
    q: Int8[Array, "m k"], codes: Int32[Array, "k n"], size: int, wide: bool
) -> Int32[Array, "g m n"]:
    """Return int32 sums over runs of `size` rows, from operands of int8, or int16 if `wide`."""
    dtype = jnp.int16 if wide else jnp.int8
    (m, k), n = q.shape, codes.shape[-1]
    short = -k % size
    left = jnp.pad(q, ((0, 0), (0, short))).astype(dtype).reshape(m, -1, size)
    right = jnp.pad(codes, ((0, short), (0, 0))).astype(dtype).reshape(-1, size, n)
    numbers = (((2,), (1,)), ((1,), (0,)))
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.int32)
