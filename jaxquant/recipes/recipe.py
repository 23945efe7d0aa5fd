"""Recipes: rules that assign a method to each weight, resolved to a plan before any computation."""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.core.arguments import check_arguments, described
from jaxquant.core.fields import shown
from jaxquant.core.paths import matches, path_leaves
from jaxquant.core.sites import Site, is_weight
from jaxquant.core.standin import is_array, is_standin
from jaxquant.core.tensor import View
from jaxquant.core.tree import leaf_bytes
from jaxquant.methods.method import KEEP, Keep, Method
from jaxquant.methods.registry import named_method
from jaxquant.recipes.guesses import is_vector, no_factors, warn_of_guesses
from jaxquant.recipes.serialize import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of rules, each a pair of a path glob and a method.

    `KEEP` in place of a method leaves a weight unquantized. The first rule that matches applies;
    every leaf must match a rule and every rule a leaf, so most recipes end with `("*", KEEP)`. `*`
    also matches "/".

    Args:
      rules: sequence of pairs (glob, method), where the method is a `Method` or `KEEP`.
    Raises:
      ValueError: `rules` is not a sequence of such pairs.

    >>> from jaxquant.methods.weights import rtn
    >>> r = Recipe([("*kernel", rtn(bits=4)), ("*", KEEP)])
    >>> Recipe.from_json(r.to_json()) == r
    True
    """

    rules: tuple[tuple[str, Method | Keep], ...]

    def __init__(self, rules: Sequence[tuple[str, Method | Keep]]) -> None:
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise ValueError(
                "a recipe must be a sequence of rules (path glob, method or KEEP), got "
                f"{described(rules)}"
            )
        for rule in rules:
            pair = isinstance(rule, Sequence) and len(rule) == 2
            if not pair or not isinstance(rule[0], str):
                raise ValueError(f"a rule must be (path glob, method or KEEP), got {rule!r}")
            if not isinstance(rule[1], Method | Keep):
                raise ValueError(f"rule {rule[0]!r}: expected a method or KEEP, got {rule[1]!r}")
        object.__setattr__(self, "rules", tuple((p, m) for p, m in rules))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the recipe as JSON values: [{"pattern": glob, "method": ...}]."""
        return [{"pattern": p, "method": to_json(m)} for p, m in self.rules]

    @staticmethod
    def from_json(value: Any) -> "Recipe":
        """Read a recipe from the output of `to_json` or from its short form.

        The short form of a rule is {"pattern": glob, "method": "gptq", "bits": 3}.

        Args:
          value: parsed JSON.
        Returns:
          The `Recipe`.
        Raises:
          ValueError: the structure is different, or a method or option is unknown.
        """
        if not isinstance(value, list):
            raise ValueError(f"a recipe must be a list of rules, got {type(value).__name__}")
        return Recipe([_rule(v) for v in value])


def _rule(value: Any) -> tuple[str, Method | Keep]:
    if not isinstance(value, dict) or not {"pattern", "method"} <= set(value):
        raise ValueError(f'a rule must be {{"pattern": ..., "method": ...}}, got {shown(value)}')
    if not isinstance(value["pattern"], str):
        raise ValueError(f"the pattern of a rule must be a string, got {shown(value['pattern'])}")
    options = {k: v for k, v in value.items() if k not in ("pattern", "method")}
    method = value["method"]
    if isinstance(method, dict):
        if options:
            raise ValueError(
                "a rule whose method is an object takes its options inside that object, "
                f"got {shown(min(options))} beside it"
            )
        return value["pattern"], from_json(method)
    if not isinstance(method, str):
        raise ValueError(f"a method must be a name or an object with a type, got {shown(method)}")
    if "name" in options or (method == "keep" and options):
        raise ValueError(f"method {shown(method)} has no option {shown(min(options))}")
    return value["pattern"], KEEP if method == "keep" else named_method(method, **options)


@dataclasses.dataclass(frozen=True)
class Entry:
    """The plan for one leaf.

    Attributes:
      path: path of the leaf.
      shape: shape of the leaf; () for a leaf that is not an array.
      method: `KEEP`, or the method that quantizes the leaf (`WeightEntry`).
      bytes: size of the result in bytes.
      size: number of weights; both are 0 for a leaf that is not an array.
    """

    path: str
    shape: tuple[int, ...]
    method: Method | Keep
    bytes: int
    size: int


@dataclasses.dataclass(frozen=True)
class WeightEntry(Entry):
    """The plan for a leaf that will be quantized, as one or more matrices.

    Attributes:
      method: method that quantizes the leaf.
      view: how the stored matrices map back to the leaf.
      order: axes of the leaf in the order [*batch, *contracted, *output].
    """

    method: Method
    view: View
    order: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape [*batch, k, n] of the leaf as matrices."""
        core = len(self.view.k) + len(self.view.n)
        batch = [self.shape[a] for a in self.order[: len(self.order) - core]]
        return (*batch, math.prod(self.view.k), math.prod(self.view.n))

    @property
    def count(self) -> int:
        """The number of matrices, counting each matrix of a stack."""
        return math.prod(self.matrix[:-2])

    def matrices(self, w: Array) -> Float[Array, "m k n"]:
        """Return the matrices of the leaf, stacked along a leading axis.

        Args:
          w: the leaf, of the planned shape.
        Returns:
          Array [m, k, n], where m is `count`.
        """
        return jnp.transpose(w, self.order).reshape(-1, *self.matrix[-2:])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan for every leaf of a tree; printing it shows bytes and bits before any computation.

    Attributes:
      entries: one `Entry` for each leaf, in tree order.
    """

    entries: tuple[Entry, ...]

    @property
    def weights(self) -> list[WeightEntry]:
        """The entries of the leaves to be quantized."""
        return [e for e in self.entries if isinstance(e, WeightEntry)]

    @property
    def bits_per_weight(self) -> float:
        """The average bits per weight over the leaves to be quantized; 0 if there are none."""
        return 8 * sum(e.bytes for e in self.weights) / max(1, sum(e.size for e in self.weights))

    @property
    def matrices(self) -> int:
        """The number of matrices to be quantized, counting each matrix of a stack."""
        return sum(e.count for e in self.weights)

    def __str__(self) -> str:
        lines = [
            f"{e.path:40} {e.shape!s:20} {e.method.name:8} {8 * e.bytes / max(1, e.size):7.3f} bits"
            f" {e.bytes:12,d} bytes"
            for e in self.entries
        ]
        total = sum(e.bytes for e in self.entries)
        return "\n".join(
            [*lines, f"{self.bits_per_weight:.3f} bits per quantized weight, {total:,d} bytes"]
        )


def resolve(
    recipe: Recipe | Method, params: PyTree, found: Mapping[str, Site] | None = None
) -> Plan:
    """Return the plan of a recipe for a tree of arrays or shapes.

    A single method applies to every floating-point leaf of rank >= 2 that the function contracts.
    Without sites, it applies to every floating-point leaf of rank >= 2, except for leaves named
    bias, scale or embedding, and for the biases and norms of stacked layers: leaves [layers, n]
    that stand beside stacks [layers, k, n] in the tree.

    Args:
      recipe: a `Recipe`, or a single `Method`.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      found: `Site` of each weight by path, which says how the function uses it; None if unknown.
    Returns:
      A `Plan` with an entry for each leaf.
    Raises:
      ValueError: a pattern matches no leaf, a leaf is matched by no pattern, a method is assigned
        to a leaf that cannot be quantized, a shape or group size does not fit, there is nothing to
        quantize, or the sites belong to another tree.
    Warns:
      UserWarning: a single method leaves weights in floating point, or the axes of weights are
        guessed where a guess often fails; the message says why.
    """
    check_arguments(resolve, locals())
    leaves = path_leaves(params)
    _check_sites(leaves, found)
    if isinstance(recipe, Method):
        kept = _unused(leaves, found)
        use = lambda p, w: recipe if is_weight(w) and p not in kept else KEEP
        chosen = [(p, w, use(p, w)) for p, w in leaves]
        if all(m is KEEP for _, _, m in chosen):
            raise ValueError(_nothing(leaves, found))
        _warn_of_kept(chosen, kept)
    else:
        chosen = _match(recipe, leaves)
    if found is None:
        guessed = [(p, tuple(w.shape)) for p, w, m in chosen if m is not KEEP]
        warn_of_guesses(guessed, stacklevel=3)
    return Plan(tuple(_entry(p, w, m, (found or {}).get(p)) for p, w, m in chosen))


def _unused(
    leaves: Sequence[tuple[str, PyTree]], found: Mapping[str, Site] | None
) -> dict[str, str]:
    """Return the weights that no product contracts, and why; "" for biases and scales."""
    if found is None:
        return no_factors(leaves)
    kept = [p for p, w in leaves if is_weight(w) and not found[p].contracted]
    return {p: "" if is_vector(p) else _why_kept(found[p]) for p in kept}


def _nothing(leaves: list[tuple[str, PyTree]], found: Mapping[str, Site] | None) -> str:
    """Say why a single method has nothing to quantize, and what the tree holds."""
    some = "; ".join(f"{p}: {_describe(w)}" for p, w in leaves[:4])
    more = f"; and {len(leaves) - 4} more" if len(leaves) > 4 else ""
    came = f"the tree holds {some}{more}" if leaves else "the tree holds no leaves"
    if any(is_standin(w) for _, w in leaves):
        came += " (already quantized: pass jaxquant.dequantize(params), or the floating tree)"
    what = "floating array of rank >= 2"
    if found is None and any(is_weight(w) for _, w in leaves):
        came += "; name what to round in a Recipe, or pass jq.sites(fn, params, x)"
        return f"nothing to quantize: no {what} looks like the weight of a matmul; {came}"
    if found is None or not any(is_weight(w) for _, w in leaves):
        return f"nothing to quantize: expected a {what}, but {came}"
    return f"nothing to quantize: the function multiplies by no {what} directly; {came}"


def _check_sites(leaves: list[tuple[str, PyTree]], found: Mapping[str, Site] | None) -> None:
    for path, w in leaves:
        if found is None or not is_weight(w):
            continue
        if path not in found or found[path].shape != tuple(w.shape):
            known = f"of shape {found[path].shape}" if path in found else "unknown"
            raise ValueError(
                f"the statistics (or sites) belong to another tree: {path!r} is "
                f"{_describe(w)} here, {known} there"
            )


def _warn_of_kept(
    chosen: list[tuple[str, PyTree, Method | Keep]], reasons: Mapping[str, str]
) -> None:
    """Warn about weights that a single method could quantize but leaves in floating point."""
    sizes = [w.size for _, w, _ in chosen if is_standin(w) or _floating(w)]
    kept: dict[str, list[tuple[str, int]]] = {}
    for path, w, _ in sorted(chosen, key=lambda one: -getattr(one[1], "size", 0)):
        if reasons.get(path):
            kept.setdefault(reasons[path], []).append((path, w.size))
    if kept:
        texts = [f"{named(which, sum(sizes))}: {why}" for why, which in kept.items()]
        warnings.warn(
            f"not quantized, with their shares of all weights: {'; '.join(texts)}. "
            "Name them in a Recipe to quantize them, or to keep them without this "
            "warning",
            stacklevel=4,
        )


def _why_kept(site: Site) -> str:
    if site.otherwise:
        return "the function uses them in an operation that jaxquant cannot follow (a reshape, ...)"
    if site.gathered is not None:
        return "the function only looks up their rows"
    return "the function does not multiply by them"


def _floating(w: PyTree) -> bool:
    return is_array(w) and jnp.issubdtype(w.dtype, jnp.floating)


def _match(
    recipe: Recipe, leaves: list[tuple[str, PyTree]]
) -> list[tuple[str, PyTree, Method | Keep]]:
    paths = [p for p, _ in leaves]
    for pattern, _ in recipe.rules:
        if not any(matches(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern.replace("*", ""), paths, 3, 0.0)
            raise ValueError(
                f"pattern {shown(pattern)} matches no leaf; nearest: {', '.join(near)}"
            )
    chosen = []
    for path, w in leaves:
        method = next((m for g, m in recipe.rules if matches(path, g)), None)
        if method is None:
            raise ValueError(f'no pattern matches {path!r}; end the recipe with ("*", KEEP)')
        if isinstance(method, Method) and not is_weight(w):
            raise ValueError(
                f"{path!r} cannot be quantized: expected a floating array of rank >= 2, got "
                f"{_describe(w)}; put a KEEP rule before the one that matches it"
            )
        chosen.append((path, w, method))
    return chosen


def _describe(w: PyTree) -> str:
    plain = is_standin(w) or not is_array(w)
    return repr(w) if plain else f"{w.dtype}{list(w.shape)}"


def _entry(path: str, w: PyTree, method: Method | Keep, site: Site | None) -> Entry:
    if not is_array(w):  # not an array, such as a number or a function: kept
        return Entry(path, (), KEEP, 0, 0)
    shape = tuple(w.shape)
    if isinstance(method, Keep):
        return Entry(path, shape, method, leaf_bytes(w), math.prod(shape))
    view, order = layout_of(shape, site)
    entry = WeightEntry(path, shape, method, 0, math.prod(shape), view, order)
    if entry.size == 0:
        raise ValueError(f"{path}: an empty array, {_describe(w)}, cannot be quantized")
    k, n = entry.matrix[-2:]
    try:
        rows, columns = method.stored(k, n)
        format = method.format
        bits: PyTree = jax.ShapeDtypeStruct((1, rows, columns), jnp.uint8)
        if format.exact:
            format = format.settled(w.dtype.name, bits)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    parts: PyTree = format.shapes(rows, columns)
    for name, side, size in (("input", method.input, k), ("output", method.output, n)):
        if side is not None:
            parts = {**parts, name: side.shapes(size)}
    per = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(parts))
    return dataclasses.replace(entry, bytes=per * entry.count)


def named(floating: Sequence[tuple[str, int]], weights: int) -> str:
    """Format paths with their shares of all weights: "table (13.5%), bias (0.2%)".

    Args:
      floating: pairs (path, number of weights); the first six are named, the others are summed.
      weights: total number of weights that the shares refer to.
    """
    parts = [f"{path} ({size / max(1, weights):.1%})" for path, size in floating[:6]]
    rest = sum(size for _, size in floating[6:])
    if rest:
        parts.append(f"{len(floating) - 6} more ({rest / max(1, weights):.1%})")
    return ", ".join(parts)


def layout_of(shape: tuple[int, ...], site: Site | None) -> tuple[View, tuple[int, ...]]:
    """Return the view of a leaf and its axes in the order [*batch, *contracted, *output].

    Without a site, the last axis is the output, the one before it is contracted, and all others are
    batch axes. For a table that is only looked up, the rows are the outputs.

    Args:
      shape: shape of the leaf.
      site: how the function uses the leaf; None if unknown.
    """
    ndim = len(shape)
    if site is not None and site.contracted:
        batch, k, n = site.batch, site.contracted, site.output
    elif site is not None and site.gathered is not None:
        n = (site.gathered,)
        k = tuple(a for a in range(ndim) if a != site.gathered)
        batch = ()
    else:
        batch, k, n = tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)
    order = (*batch, *k, *n)
    back = tuple(order.index(a) - ndim for a in range(ndim))
    return View(tuple(shape[a] for a in k), tuple(shape[a] for a in n), back), order
