"""Rules that quax dispatches to when a matmul or a look-up meets a `QTensor`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import quax
from jax.ad_checkpoint import checkpoint_name
from jax.lax import GatherScatterMode
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxquant.core import activations, indexing, jax_private
from jaxquant.core.activations import Activations
from jaxquant.core.contraction import Contraction
from jaxquant.core.explicit_axes import Axes, product_over_auto_axes
from jaxquant.core.shardings import packed_sharding
from jaxquant.core.standin import is_standin, note, once
from jaxquant.core.tensor import Arrays, QTensor
from pallas_kernels import dispatch as kernels
from pallas_kernels import partition
from pallas_kernels.checks import FLOATS

# Name of the results of products with packed weights, for policies of `jax.checkpoint`: policies
# that save the results of matrix products do not know those of kernels.
PRODUCT = "jaxquant product"


@quax.register(jax.lax.dot_general_p)
def _product(
    x: Any, w: QTensor, *, weight_left: bool = False, read: Any = None, **params: PyTree
) -> Array:
    """Compute the traced dot_general of x and w, from packed codes where the layout of w allows.

    `read` is the input in the user's function, if x is that input on other axes.
    """
    if is_standin(x):
        x = x.materialise()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=weight_left)
    layout = _Layout.of(w, c)
    if layout is None:
        sides = (w.materialise(), x) if weight_left else (x, w.materialise())
        return jax.lax.dot_general_p.bind(*sides, **params)
    again = {**params, "out_sharding": None, "weight_left": weight_left, "read": x}
    split = product_over_auto_axes(
        lambda x, w: _product(x, w, **again),
        x, w, _axes_of_product(c, w), params.get("out_sharding"),
    )  # fmt: skip
    if split is not None:
        return split
    dtype = jnp.promote_types(x.dtype, w.dtype)  # dot_general accepts operands of two dtypes
    rows = x.astype(_dtype_of_rows(dtype))
    form = activations.in_force(w.activations) if layout.forward else None
    read = x if read is None else read
    call = _SharedCall.of(read, rows, w, c) if layout.forward else None

    def matmul(rows: Array, arrays: Arrays) -> Array:
        if call is None:
            return w.matmul_transposed(rows, arrays)
        rows = once(call.key, read, lambda: w.transformed(rows, arrays))
        if w.format.latent:  # it rounds the rows itself, for training
            y = w.format.product(form, rows, arrays.data, arrays.activations)
        elif len(call.family) > 1:
            y = call.product(form, rows, arrays)
        else:
            rows, kernel_form, leave = activations.entered(form, rows, arrays.activations)
            y = leave(w.format.matmul(rows, arrays.data, kernel_form))
        return w.finished(y, arrays)

    axes, leading, out = w.axes(), w.leading(), w.outputs if layout.forward else w.view.k
    with kernels.listening() as served, partition.placed(w.placement):
        stacked = c.mapped(matmul, axes, leading)
        given = c.rows(rows, axes, leading, layout.contracted)
        if leading:
            y = partition.stack(stacked, given, w.arrays, leading, c.paired(axes, leading))
        else:
            y = stacked(given, w.arrays)
    y = c.result(y, x, out, axes, leading, layout.contracted)
    heard = served if call is None else [*served, *call.heard]
    rounds = [] if form is None else [form.describe()]
    note(layout.rule, "; ".join([w.format.kernel(), *rounds, *heard]))
    if params.get("out_sharding") is not None:  # on a mesh of one device
        y = jax.sharding.reshard(y, params["out_sharding"])
    return checkpoint_name(y.astype(params.get("preferred_element_type") or dtype), PRODUCT)


def _axes_of_product(c: Contraction, w: QTensor) -> Axes:
    """Return which axes of x and of w are split alike, and which the result has."""
    paired = {w.axes()[b]: a for a, b in c.batch}
    return Axes(tuple(c.x_free()), paired, tuple(c.output_labels(w.axes())))


@quax.register(jax_private.reshard_p)
def _(w: QTensor, *, dst_sharding: Any, **_: PyTree) -> QTensor:
    """Move the packed arrays to another mesh, such as the same one with Auto axes."""
    mesh, spec = dst_sharding.mesh, dst_sharding.spec
    if AxisType.Explicit not in mesh.axis_types:
        return jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(mesh, P())), w)
    return jax.tree.map(jax.sharding.reshard, w, packed_sharding(w, mesh, spec))


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: QTensor, x: Any, **params: PyTree) -> Array:
    return _product(x, w, weight_left=True, **params)


def _dtype_of_rows(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which rows enter kernels, which multiply neither float64 nor float8."""
    taken = dtype.name in FLOATS or not jnp.issubdtype(dtype, jnp.floating)
    return dtype if taken else jnp.dtype("float32")


class _Layout(NamedTuple):
    """Which stored axes of the weight are summed over: those of k, or (transposed) those of n."""

    forward: bool
    contracted: set[int]

    @property
    def rule(self) -> str:
        return "packed matmul" if self.forward else "packed matmul, transposed"

    @staticmethod
    def of(w: QTensor, c: Contraction) -> "_Layout | None":
        """Return None if the product sums over some axes of both, or over only a part of either."""
        batch, ndim = w.leading(), len(w.stored_shape())
        split = batch + len(w.view.k)
        k, n = set(range(batch, split)), set(range(split, ndim))
        summed = c.contracted(w.axes())
        touched = summed | c.batched(w.axes())
        if k <= summed and not n & touched:
            return _Layout(True, k)
        if n <= summed and not k & touched:
            return _Layout(False, n)
        return None


@dataclasses.dataclass
class _SharedCall:
    """What products of one input share: the transformed input and, if an op allows it, the call.

    Attributes:
      x: the input in the user's function.
      w: one of the weights.
      key: identifies the input, its transform and the order in which it is read; None if nothing is
        shared.
      family: the weights, including w, whose products may be computed in one call.
      heard: notes on what runs the call.
    """

    x: Array
    w: QTensor
    key: tuple | None
    family: list[QTensor]
    heard: list[str] = dataclasses.field(default_factory=list)

    @staticmethod
    def of(x: Array, rows: Array, w: QTensor, c: Contraction) -> "_SharedCall":
        """Build it for a product of x; `rows` is x in the dtype of the product."""
        # Weights read one and the same input only if no batch axis is mapped over.
        if not w.shared or w.leading():
            return _SharedCall(x, w, None, [w])
        inner = tuple(a for _, a in sorted((w.axes()[b], a) for a, b in c.contract))  # in k's order
        key = (w.shared, w.input, rows.dtype, inner)
        return _SharedCall(x, w, key, w.siblings() if w.format.storage else [w])

    def product(self, form: Activations | None, rows: Array, arrays: Arrays) -> Array:
        """Return this weight's product from the family's products, which are computed once."""
        several = [other.data for other in self.family]

        def products() -> tuple[list[Array], list[str]]:
            with kernels.listening() as heard:
                entered, kernel_form, leave = activations.entered(form, rows, arrays.activations)
                ys = self.w.format.matmuls(entered, several, kernel_form)
            return [leave(y) for y in ys], heard

        ys, self.heard = once((*self.key, self.w.format, form), self.x, products)
        return ys[next(i for i, other in enumerate(self.family) if self.w.same(other))]


@quax.register(jax.lax.gather_p)
def _(w: QTensor, ids: Any, **params: PyTree) -> Any:
    dn, fills = params["dimension_numbers"], params["mode"] == GatherScatterMode.FILL_OR_DROP
    matrices = indexing.looked_up(w, ids, params)
    if matrices is not None:
        note("look-up", "takes matrices of the stack, which stay packed")
        return matrices
    taken = _take_axis(w, dn, params["slice_sizes"], fills)
    if taken is None:
        return jax.lax.gather_p.bind(w.materialise(), ids, **params)
    axis, kind = taken
    note("look-up", f"unpacks only the {kind} it takes")
    index = ids[..., dn.start_index_map.index(axis)]
    size = w.shape[axis]
    flat = jnp.clip(index.reshape(-1), 0, size - 1)
    if kind == "columns":
        rows = jnp.swapaxes(w.format.columns(w.data, flat, w.rows_k), 0, 1)
    else:
        rows = w.format.rows(w.data, flat, w.rows_k)
    rest = [1 if i == axis else d for i, d in enumerate(w.shape)]
    if dn.collapsed_slice_dims:
        rest.pop(axis)
    out = rows.reshape(*index.shape, *rest).astype(w.dtype)
    if fills:
        valid = (index >= 0) & (index < size)
        fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
        out = jnp.where(valid.reshape(*index.shape, *(1 for _ in rest)), out, fill)
    return jnp.moveaxis(out, range(index.ndim, out.ndim), dn.offset_dims)


def _take_axis(w: QTensor, dn: Any, sizes: tuple[int, ...], fills: bool) -> tuple[int, str] | None:
    """Return (axis, "columns" or "rows") if the gather takes slices along one core axis.

    Otherwise return None. The gather may also name the other axes (`vmap` of w[i] does), along
    which only one start is possible.
    """
    if w.input is not None or w.output is not None:
        return None
    if w.leading() or len(w.view.k) != 1 or len(w.view.n) != 1 or dn.operand_batching_dims:
        return None
    cut = [i for i, d in enumerate(w.shape) if sizes[i] != d]
    if len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in dn.start_index_map:
        return None
    if dn.collapsed_slice_dims not in ((), tuple(cut)) or (fills and len(dn.start_index_map) > 1):
        return None
    return cut[0], "columns" if w.axes()[cut[0]] == 1 else "rows"
