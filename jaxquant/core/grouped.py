"""The rule for `jax.lax.ragged_dot` of tokens and a stack of packed weights: mixtures of experts.

The rows of the left operand are sorted by expert, and each is multiplied by the matrix of its
expert. If the format has an op, one grouped product reads the words of the experts that have rows.
Whatever else belongs to an expert (transforms, static scales of activations) is applied to tiles of
rows, each of which belongs to a single expert.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, PyTree

from jaxquant.core import activations
from jaxquant.core.activations import Activations
from jaxquant.core.contraction import Contraction
from jaxquant.core.explicit_axes import Axes, product_over_auto_axes
from jaxquant.core.jax_private import ragged_dot_general_p
from jaxquant.core.products import PRODUCT, _dtype_of_rows, _Layout
from jaxquant.core.shardings import splits
from jaxquant.core.standin import is_standin, note
from jaxquant.core.tensor import Arrays, QTensor
from pallas_kernels import dispatch as kernels
from pallas_kernels import partition, row_tiles
from pallas_kernels.grouped import by_experts, grouped_matmul

Rows = Float[Array, "m k"]
Sizes = Int32[Array, "e"]


@quax.register(ragged_dot_general_p)
def _product(x: Any, w: QTensor, group_sizes: Any, **params: PyTree) -> Array:
    """Compute the traced ragged_dot of x and w, from packed codes if the layout allows it."""
    if is_standin(x):
        x = x.materialise()
    dimensions = params["ragged_dot_dimension_numbers"]
    c = Contraction.of(dimensions.dot_dimension_numbers, x.ndim, w.ndim, weight_left=False)
    odd = params.get("group_offset") is not None or group_sizes.ndim != 1
    layout = None if odd else _layout(w, c, dimensions)
    if layout is None:
        return ragged_dot_general_p.bind(x, w.materialise(), group_sizes, **params)
    free = [("x", a) for a in c.x_free()]
    columns = [("w", a) for a in w.axes() if a != 0 and a not in layout.contracted]
    again = {**params, "out_sharding": None}
    split = product_over_auto_axes(
        lambda x, w, sizes: _product(x, w, sizes, **again),
        x, w, Axes(tuple(c.x_free()), {}, (*free, *columns)), params.get("out_sharding"),
        group_sizes,
    )  # fmt: skip
    if split is not None:
        return split
    dtype = jnp.promote_types(x.dtype, w.dtype)
    x_of = {w.axes()[b]: a for a, b in c.contract}
    rows = jnp.transpose(x, (*c.x_free(), *(x_of[a] for a in sorted(layout.contracted))))
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:])).astype(_dtype_of_rows(dtype))
    form = activations.in_force(w.activations) if layout.forward else None
    product, how = _of_group(w, form, layout.forward)
    parts = partial(_split, w) if layout.forward and _is_direct(w, form) else None
    with kernels.listening() as heard, partition.placed(_placement(w, form)):
        y = by_experts(product, rows, group_sizes.astype(jnp.int32), w.arrays, parts)
    rounds = [] if form is None else [form.describe()]
    reasons = dict.fromkeys(filter(None, [w.format.kernel(), how, *rounds, *heard]))
    note(layout.rule.replace("matmul", "grouped matmul"), "; ".join(reasons))
    y = y.reshape(len(rows), *(w.outputs if layout.forward else w.view.k))
    kept = [a for a in w.axes() if a != 0 and a not in layout.contracted]
    y = jnp.transpose(y, (0, *(1 + sorted(kept).index(a) for a in kept)))
    if params.get("out_sharding") is not None:  # on a mesh of one device
        y = jax.sharding.reshard(y, params["out_sharding"])
    return checkpoint_name(y.astype(params["preferred_element_type"] or dtype), PRODUCT)


def _layout(w: QTensor, c: Contraction, dimensions: Any) -> _Layout | None:
    """Return which axes of w are summed over, or None if the rule does not support the product.

    It supports rows along one ragged axis of x, and experts along the only leading axis of w.
    """
    ragged, experts = dimensions.lhs_ragged_dimensions, dimensions.rhs_group_dimensions
    rows = c.x_free()
    if c.batch or w.leading() != 1 or len(rows) != 1 or list(ragged) != rows or len(experts) != 1:
        return None
    return _Layout.of(w, c) if w.axes()[experts[0]] == 0 else None


def _of_group(
    w: QTensor, form: Activations | None, forward: bool
) -> tuple[Callable[[Rows, Sizes, Arrays], Array], str]:
    """Return a function that multiplies rows by the matrices of their experts, and a description.

    If `forward` is False, the function multiplies by the transposed matrices.
    """
    one_by_one = "one tile of rows after the other"
    if not forward:
        if _is_direct(w, None) and w.input is None and w.output is None:
            return partial(_grouped, w, "_transposed", k=w.rows_k), ""
        return partial(_by_tile, w.matmul_transposed), one_by_one
    if _is_direct(w, form):
        return lambda rows, sizes, of: _whole(w.with_arrays(of).local(), form, rows, sizes, of), ""
    return partial(_by_tile, partial(_one, w, form)), one_by_one


def _is_direct(w: QTensor, form: Activations | None) -> bool:
    """Return whether one grouped product of the stored matrices can compute the product.

    It cannot if x has static scales or 8-bit zero points: these, and the sums that zero points
    require, differ between experts.
    """
    by_token = form is None or not (form.static or (form.bits == 8 and not form.symmetric))
    return bool(w.format.storage) and not w.format.latent and by_token


def _placement(w: QTensor, form: Activations | None) -> partition.Placement | None:
    """Return how the matrices of experts are split, without the splits that have to be undone.

    A transform or rounding of the input needs all rows of a matrix, and a transform of the output
    needs all columns.
    """
    if w.placement is None:
        return None
    rows = w.placement.rows if w.input is None and form is None else ()
    columns = w.placement.columns if w.output is None else ()
    return dataclasses.replace(w.placement, rows=rows, columns=columns)


def _split(w: QTensor, placement: partition.Placement) -> PyTree:
    """Return the mesh axes that split the first and the last axis of every array of a matrix."""
    found = splits(w, placement.mesh, placement.rows, placement.columns)
    return w.with_named({name: found.get(name, ((), ())) for name in w.named}).arrays


def _whole(
    w: QTensor, form: Activations | None, rows: Rows, sizes: Sizes, of: Arrays
) -> Float[Array, "m n"]:
    """Return the products of all rows, by one grouped product of the stored matrices."""
    if w.input is not None:
        rows = _by_tile(w.input.apply, rows, sizes, of.input)
    rows, kernel_form, leave = activations.entered(form, rows, {})
    y = leave(_grouped(w, "", rows, sizes, of, activations=kernel_form))
    if w.output is not None:
        y = _by_tile(partial(w.output.transposed, n=math.prod(w.view.n)), y, sizes, of.output)
    # A row that belongs to no expert may hold any values, and so may its scale.
    return jnp.where(jnp.arange(len(y))[:, None] < jnp.sum(sizes), y, 0)


def _grouped(w: QTensor, way: str, rows: Rows, sizes: Sizes, of: Arrays, **static: Any) -> Array:
    """Return the product by the grouped op of the format."""
    found: dict[str, Any] = {}

    def arrays(data: dict[str, Array]) -> tuple:
        arrays, of_format = w.format.arguments(data, w.stored_rows)
        found.update(of_format)
        return arrays

    stacks = jax.vmap(arrays)(of.data)
    return grouped_matmul(
        f"{w.format.storage}_matmul{way}", rows, sizes, *stacks, **found, **static
    )


def _one(w: QTensor, form: Activations | None, rows: Rows, arrays: Arrays) -> Array:
    """Return the product of rows with one matrix."""
    rows = w.transformed(rows, arrays)
    if w.format.latent:
        y = w.format.product(form, rows, arrays.data, arrays.activations)
    else:
        rows, kernel_form, leave = activations.entered(form, rows, arrays.activations)
        y = leave(w.format.matmul(rows, arrays.data, kernel_form))
    return w.finished(y, arrays)


def _by_tile(
    fn: Callable[[Rows, Any], Array], rows: Rows, sizes: Sizes, arrays: PyTree
) -> Float[Array, "m n"]:
    """Return fn(rows, arrays of an expert) for the rows of every expert."""
    leaves, tree = jax.tree.flatten(arrays)
    if not leaves:
        return fn(rows, arrays)
    flat = lambda rows, *leaves: fn(rows, jax.tree.unflatten(tree, leaves))
    return row_tiles.over(flat, rows, *leaves, sizes)
