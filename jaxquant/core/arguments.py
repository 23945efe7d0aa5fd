"""Checks of the arguments of public functions against their annotations.

A number passed as a key, or an array passed as statistics, gives a one-line message instead of an
`AttributeError` deep inside. Values are judged by what they can do rather than by class: any
mapping is accepted for `Mapping`, anything callable for `Callable`.
"""

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Union

import jax
import numpy as np
from jaxtyping import PyTree

_ABLE = {  # attributes that a value needs to match an annotation
    collections.abc.Callable: ("__call__",),
    collections.abc.Mapping: ("keys", "__getitem__"),
    collections.abc.MutableMapping: ("keys", "__getitem__", "__setitem__"),
    collections.abc.Sequence: ("__len__", "__getitem__"),
    collections.abc.Iterable: ("__iter__",),
    int: ("__index__",),
    float: ("__float__",),
}
_NAMES = {
    collections.abc.Callable: "a function",
    collections.abc.Mapping: "a mapping",
    collections.abc.MutableMapping: "a mutable mapping",
    collections.abc.Sequence: "a sequence",
    collections.abc.Iterable: "an iterable",
    type(None): "None",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
}
_CLASSES = {
    "Method": "a method, such as gptq(bits=4)",
    "Stats": "the result of calibrate",
    "Recipe": "a Recipe",
}
_KEY = "a key (such as jax.random.key(0), no number)"


def check_arguments(fn: Callable[..., PyTree], given: Mapping[str, Any]) -> None:
    """Raise ValueError unless every argument matches its annotation.

    Args:
      fn: the public function; call this on its first line.
      given: its arguments by name, that is `locals()` on the first line.

    >>> def scaled(x: jax.Array, by: float, name: str | None = None) -> jax.Array:
    ...     check_arguments(scaled, locals())
    ...     return x * by
    >>> scaled([1.0, 2.0], 3.0)
    Traceback (most recent call last):
    ValueError: scaled: x: expected an array, got [1.0, 2.0] (list)
    """
    for name, wanted in _annotations(fn).items():
        if name in given and not _fits(given[name], wanted):
            texts = [_named(kind, name) for kind in _kinds(wanted)]
            raise ValueError(
                f"{fn.__name__}: {name}: expected {' or '.join(dict.fromkeys(texts))}, got "
                f"{described(given[name])}"
            )


def described(value: Any) -> str:
    """Describe a value for an error message: short, with its type."""
    if _is_array(value):
        return f"an array {value.dtype}{list(value.shape)}"
    text = repr(value)
    return "None" if value is None else f"{text[:60]}{'...' * (len(text) > 60)} ({_class(value)})"


def differentiated(value: Any) -> bool:
    """Return whether the value is being differentiated by `jax.grad` or `jax.jvp`."""
    return type(value).__name__ in ("JVPTracer", "LinearizeTracer")


def _class(value: Any) -> str:
    return value.__name__ if inspect.isclass(value) else type(value).__name__


@functools.cache
def _annotations(fn: Callable[..., PyTree]) -> dict[str, Any]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in inspect.signature(fn).parameters.values() if p.kind not in kinds]
    hints = typing.get_type_hints(fn)
    return {p.name: hints[p.name] for p in plain if p.name in hints}


def _kinds(wanted: Any) -> tuple[Any, ...]:
    """Return the members of a union; for other annotations the annotation itself."""
    union = typing.get_origin(wanted) in (Union, types.UnionType)
    return typing.get_args(wanted) if union else (wanted,)


def _fits(value: Any, wanted: Any) -> bool:
    return any(_fits_one(value, kind) for kind in _kinds(wanted))


def _fits_one(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:  # the function itself checks which one
        return isinstance(value, tuple({type(one) for one in typing.get_args(kind)}))
    if kind is Any or isinstance(kind, typing.TypeVar):
        return True
    if _array_kind(kind):
        return _is_array(value)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if origin in _ABLE:
        text = isinstance(value, str) or (isinstance(value, bool) and kind in (int, float))
        able = not text and all(hasattr(value, name) for name in _ABLE[origin])
        return able and _elements_fit(value, kind)
    if getattr(kind, "_is_protocol", False):
        wanted = [n for n, v in vars(kind).items() if callable(v) and not n.startswith("_")]
        return all(hasattr(value, name) for name in wanted)
    return not inspect.isclass(origin) or isinstance(value, origin)


def _elements_fit(value: Any, kind: Any) -> bool:
    """Check the elements of a sequence, and the values of a mapping, against a class they name."""
    origin, of = typing.get_origin(kind), (typing.get_args(kind) or (Any,))[-1]
    of = typing.get_origin(of) or of
    if of is Any or not inspect.isclass(of) or isinstance(value, str):  # Any is a class
        return True
    if origin is collections.abc.Sequence:
        return all(isinstance(one, of) for one in value)
    return origin is not collections.abc.Mapping or all(isinstance(value[k], of) for k in value)


def _array_kind(kind: Any) -> bool:
    return inspect.isclass(kind) and (issubclass(kind, jax.Array) or hasattr(kind, "array_type"))


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _named(kind: Any, name: str) -> str:
    if _array_kind(kind):
        return _KEY if name == "key" else "an array"
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    class_name = getattr(origin, "__name__", str(origin))
    text = _NAMES.get(origin, _CLASSES.get(class_name, f"a {class_name}"))
    of = (typing.get_args(kind) or (Any,))[-1]
    of_class = of is not Any and inspect.isclass(of)
    if of_class and origin in (collections.abc.Sequence, collections.abc.Mapping):
        return f"{text} of {of.__name__}"
    return text
