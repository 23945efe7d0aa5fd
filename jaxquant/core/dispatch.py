"""Run functions on quantized parameters (`quantized`), and report how they run (`explain`)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import quax
from jaxtyping import Array, PyTree

from jaxquant.core import grouped, products  # noqa: F401  the import registers their rules
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.shardings import with_placements, without_placements
from jaxquant.core.standin import StandIn, dispatching, is_standin, listening
from jaxquant.core.text_table import aligned
from pallas_kernels import dispatch as table
from pallas_kernels.cost.chips import CHIPS
from pallas_kernels.lowering import devices_of

OPTIONS = "jaxquant_options"  # attribute of the functions that `quantized` returns, for `explain`


def quantized(
    fn: Callable[..., PyTree],
    *,
    kernels: str = "auto",
    shardings: PyTree = None,
    data_axes: Sequence[str] | None = None,
) -> Callable[..., PyTree]:
    """Return a version of `fn` that accepts stand-ins such as `QTensor` in its arguments.

    A stand-in is an object that takes the place of an array leaf.

    Calls are dispatched on JAX primitives (by quax): a matmul or look-up of a `QTensor` reads its
    packed codes, and a primitive without a rule dequantizes the `QTensor` first (see `explain`).

    The result composes with `jax.jit`, `jax.grad` and `jax.vmap` inside and outside; derivatives
    taken outside must be reverse-mode (`jax.grad`, `jax.vjp`). It composes with `jax.shard_map`
    outside, with the weights split along their outputs, or along their inputs if every device holds
    whole groups (weights that share a scale) and whole words (integers, mostly int32, that each
    hold several packed codes).

    Kernels run in programs for a single device, even on a machine with several, and inside
    `shard_map`. The compiler cannot partition a kernel, so in a program for several devices every
    product runs in its own `shard_map`. For this, it has to know how its arrays are split. If the
    axes of the mesh are Explicit (the default of `jax.make_mesh`), the types of the arrays state
    it. If they are Auto, pass `shardings`; without them, a jitted function of the weights runs the
    reference implementations in plain JAX.

    Outside a function wrapped by `quantized`, a stand-in is not an array, and code that uses it as
    one raises TypeError. So you must also wrap functions that take a model and call it, as in
    `jq.quantized(nnx.tabulate)(model, x)`.

    Args:
      fn: any function of parameter trees and arrays: Flax, Equinox, plain JAX. If `quantized`
        returned it, it keeps its options, except those that are given again. Functions such as
        `jaxquant.qat`, which apply `quantized` to their argument, therefore also accept
        `quantized(fn, shardings=...)`.
      kernels: "auto" (default) uses the kernels of the platform for which the program is lowered,
        where they support the matmul; "reference" uses plain JAX only; "cpu", "tpu" or "cuda" uses
        that backend's kernels only, and raises ValueError for a matmul that they do not support.
      shardings: how the first argument is split over a mesh with Auto axes: a tree like the first
        argument with a `NamedSharding` in place of every array, as `jaxquant.distributed.sharding`
        returns it. Default (None): the shardings of the arrays themselves, which are known unless
        the weights are arguments of a function under `jax.jit`.
      data_axes: a sequence of the names of those axes of that mesh that split the rows (tokens) of
        the inputs. If one of them also splits a weight, the weight is all-gathered for its product,
        in packed form. Default (None): the axes that split no weight.

    Returns:
      A function of the same arguments as `fn`.

    Raises:
      ValueError: an argument has the wrong type. When the function is called: `shardings` is not a
        tree like the first argument; the mesh lacks one of `data_axes`; or another mesh is in force
        (`jax.set_mesh`).

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> w = jq.quantize_array(jnp.eye(4), jq.rtn(bits=8, group_size=-1))
    >>> y = jax.jit(jq.quantized(lambda p, x: x @ p["w"]))({"w": w}, jnp.ones((2, 4)))
    >>> y.shape
    (2, 4)
    """
    check_arguments(quantized, locals())
    if (before := _options(fn)) is not None:
        if kernels == "auto" and shardings is None and data_axes is None:
            return fn
        fn = fn.__wrapped__  # type: ignore[attr-defined]
        kernels = before.kernels if kernels == "auto" else kernels
        shardings = before.shardings if shardings is None else shardings
        data_axes = before.data_axes if data_axes is None else data_axes

    def entering(called: tuple) -> tuple:
        args, kwargs = called
        first = with_placements(args[:1], None if shardings is None else (shardings,), data_axes)
        others, kwargs = with_placements((args[1:], kwargs), None, data_axes)
        return (*first, *others), kwargs

    run = dispatching(fn, lambda: table.using(kernels), entering, without_placements)
    call = functools.wraps(fn)(run)
    call.__dict__[OPTIONS] = _Options(call, kernels, shardings, data_axes)
    return call


class _Options(NamedTuple):
    """The options of `call`, a function that `quantized` returned."""

    call: Callable[..., PyTree]
    kernels: str
    shardings: PyTree
    data_axes: Sequence[str] | None


def _options(fn: Callable[..., PyTree]) -> _Options | None:
    """Return the options of `fn` if `quantized` returned it; None for wrappers that copied them."""
    found = getattr(fn, OPTIONS, None)
    return found if found is not None and found.call is fn else None


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight: its path, the primitive, the rule that handles it, and the reason."""

    path: str
    primitive: str
    rule: str
    why: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """All uses of all quantized weights, in the order of the trace.

    Attributes:
      uses: one `Use` per primitive that meets a quantized weight. `str` prints them as a table.
    """

    uses: tuple[Use, ...]

    @property
    def materialised(self) -> tuple[str, ...]:
        """Paths of the weights that some primitive dequantizes."""
        return tuple(dict.fromkeys(u.path for u in self.uses if u.rule == "materialised"))

    def __str__(self) -> str:
        rows = [("weight", "primitive", "rule", "why")]
        rows += [(u.path, u.primitive, u.rule, u.why) for u in self.uses]
        return "\n".join(aligned(rows))


def explain(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    platform: str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Report which kernel or rule handles each use of a quantized weight in `fn(params, *args)`.

    The function is only traced; nothing is computed. Values that are not arrays (such as a flag)
    are passed on unchanged.

    Args:
      fn: the function that would be passed to `quantized`, or the function that `quantized`
        returned, whose options are then considered.
      params: tree with `QTensor` leaves, or the same tree with `jax.ShapeDtypeStruct`s in place of
        the arrays (`jax.eval_shape`).
      *args, **kwargs: the other arguments: arrays, `jax.ShapeDtypeStruct`s or other values. If an
        argument or a weight is sharded over several devices, the report is for a program that the
        compiler partitions.
      platform: the platform whose kernels are considered: "cpu", "tpu", "cuda", or "rocm" (which
        has none). The name of a chip ("v5e", "h100", ...) selects its platform, since all chips of
        a platform have the same kernels. Default: the platform of this machine.

    Returns:
      An `Explanation`; `print` shows it as a table.

    Raises:
      ValueError: `platform` is unknown, or as for the function that `quantized` returns.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w = jq.quantize_array(jnp.eye(4), jq.rtn(bits=8, group_size=-1))
    >>> found = explain(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 4)))
    >>> [(use.path, use.primitive, use.rule) for use in found.uses]
    [('w', 'dot_general', 'packed matmul')]
    """
    check_arguments(explain, locals())
    platform = _platform(platform)
    log = _Log([])
    options = _options(fn)
    if options is None:
        options = _Options(fn, "auto", None, None)
    else:
        fn = fn.__wrapped__  # type: ignore[attr-defined]
    devices = devices_of(params, args, kwargs)
    if options.shardings is not None:
        params = with_placements(params, options.shardings, options.data_axes)
        params, args, kwargs = jax.tree.map(_untyped, (params, args, kwargs))
    run = dispatching(fn, lambda: table.using(options.kernels))
    spied = replace_leaves(
        params, {p: _Spy(w, p, log) for p, w in path_leaves(params) if is_standin(w)}
    )
    with table.describing(platform, devices):
        eqx.filter_eval_shape(lambda p, a, k: run(p, *a, **k), spied, args, kwargs)
    return Explanation(tuple(dict.fromkeys(log.uses)))


def _untyped(a: Any) -> Any:
    """Return the shape of an array without its sharding, as in a traced function on Auto axes."""
    return jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, jax.Array) else a


def _platform(name: str | None) -> str | None:
    """Return the platform of this name, or the platform of the chip of this name."""
    if name is None or name in (*table.BACKENDS, "rocm"):
        return name
    if name.lower() in CHIPS:
        return CHIPS[name.lower()].platform
    raise ValueError(
        f"platform must be a platform (cpu, tpu, cuda, rocm) or a chip ({', '.join(CHIPS)}), got "
        f"{name!r}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Log:
    """The uses found so far. It is hashed by identity, so that every `explain` traces anew."""

    uses: list


class _Spy(quax.ArrayValue):
    """A wrapper around a stand-in: forwards every primitive and records which rule handled it."""

    inner: Any
    path: str = eqx.field(static=True)
    log: _Log = eqx.field(static=True)

    def aval(self) -> jax.core.ShapedArray:
        return self.inner.aval()

    def materialise(self) -> Array:
        self.log.uses.append(Use(self.path, "custom_vjp_call", "materialised", "custom_vjp"))
        return self.inner.dequantize()

    @staticmethod
    def default(primitive: Any, values: Any, params: dict[str, Any]) -> Any:
        spies = [v for v in values if isinstance(v, _Spy)]
        inner = [v.inner if isinstance(v, _Spy) else v for v in values]
        with listening() as heard:
            out = quax.quaxify(lambda *a: primitive.bind(*a, **params))(*inner)
        spy = spies[0]
        spy.log.uses.extend(Use(spy.path, str(primitive), rule, why) for rule, why in heard)
        rewrap = lambda x: _Spy(x, spy.path, spy.log) if isinstance(x, StandIn) else x
        return [rewrap(x) for x in out] if primitive.multiple_results else rewrap(out)
