"""What a matmul or a look-up does with a `QTensor`: rules that quax dispatches to."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.lax import GatherScatterMode
from jaxtyping import Array, PyTree

from jaxquant.core import activations, indexing
from jaxquant.core.contraction import Contraction
from jaxquant.core.standin import is_standin, note, once
from jaxquant.core.tensor import Arrays, QTensor
from pallas_kernels import dispatch as kernels


def _product(x: Array, w: QTensor, c: Contraction) -> Array | None:
    """x . w as the traced dot_general states it; None where w is not laid out for it."""
    batch = w.leading()
    split = batch + len(w.view.k)
    core_k, core_n = set(range(batch, split)), set(range(split, len(w.stored_shape())))
    touched = c.contracted(w.axes()) | c.batched(w.axes())
    if core_k <= c.contracted(w.axes()) and not core_n & touched:
        rule, forward = "packed matmul", True
    elif core_n <= c.contracted(w.axes()) and not core_k & touched:
        rule, forward = "packed matmul, transposed", False
    else:
        return None
    rows = x.astype(jnp.promote_types(x.dtype, w.dtype))  # a plain dot takes mixed operands
    # Only where no batch axis is mapped over is an input the same for every weight.
    inner = tuple(a for _, a in sorted((w.axes()[b], a) for a, b in c.contract))  # of x, as k
    key = (w.shared, w.input, rows.dtype, inner) if w.shared and not batch else None
    # Weights whose products are served by an op may share a call.
    family = w.siblings() if key and w.format.storage else [w]

    form = activations.in_force(w.activations)

    def matmul(rows: Array, arrays: Arrays) -> Array:
        if not forward:
            return w.matmul_transposed(rows, arrays)
        rows = once(key, x, lambda: w.transformed(rows, arrays))
        if w.format.latent:  # it rounds rows itself, as training needs it
            y = w.format.product(form, rows, arrays.data, arrays.activations)
            return w.finished(y, arrays)
        meet = partial(activations.product, form, rows, arrays.activations)
        if len(family) == 1:
            return w.finished(meet(lambda x, form: w.format.matmul(x, arrays.data, form)), arrays)
        several = [other.data for other in family]

        def products() -> tuple:
            with kernels.listening() as heard:
                return meet(lambda x, form: w.format.matmuls(x, several, form)), heard

        ys, heard = once((*key, w.format, form), x, products)
        served.extend(heard)
        return w.finished(ys[next(i for i, other in enumerate(family) if w.same(other))], arrays)

    with kernels.listening() as served:
        y = c.apply(
            matmul,
            rows,
            w.arrays,
            axes=w.axes(),
            leading=batch,
            contracted=core_k if forward else core_n,
            out_shape=w.outputs if forward else w.view.k,
        )
    rounds = [form.describe()] if forward and form is not None else []
    note(rule, "; ".join([w.format.kernel(), *rounds, *served]))
    return y


@quax.register(jax.lax.dot_general_p)
def _(x: Any, w: QTensor, **params: PyTree) -> Array:
    if is_standin(x):
        x = x.materialise()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=False)
    y = _product(x, w, c)
    return _finish(y, x, w, params) if y is not None else _plain(x, w.materialise(), params)


@quax.register(jax.lax.dot_general_p, precedence=1)
def _(w: QTensor, x: Any, **params: PyTree) -> Array:
    if is_standin(x):
        x = x.materialise()
    c = Contraction.of(params["dimension_numbers"], x.ndim, w.ndim, weight_left=True)
    y = _product(x, w, c)
    return _finish(y, x, w, params) if y is not None else _plain(w.materialise(), x, params)


def _finish(y: Array, x: Array, w: QTensor, params: dict[str, Any]) -> Array:
    dtype = params.get("preferred_element_type") or jnp.promote_types(x.dtype, w.dtype)
    return y.astype(dtype)


def _plain(a: Array, b: Array, params: dict[str, Any]) -> Array:
    return jax.lax.dot_general_p.bind(a, b, **params)


@quax.register(jax.lax.gather_p)
def _(w: QTensor, ids: Any, **params: PyTree) -> Any:
    dn, fills = params["dimension_numbers"], params["mode"] == GatherScatterMode.FILL_OR_DROP
    matrices = indexing.looked_up(w, ids, params)
    if matrices is not None:
        note("look-up", "takes matrices of the stack, packed")
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
    """(axis, "columns" | "rows") if the gather takes whole slices along one core axis.

    It may name the other axes too (`vmap` of w[i] does), where only one start is possible.
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
