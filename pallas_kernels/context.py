"""Dynamically scoped settings for traced functions, all stored in one context variable.

A function traced by JAX calls through code outside this library, so some arguments cannot be
passed down explicitly: which kernels to use, who records them, which key to round with. Each is a
`Setting` with a name and a default. Their values live in one mapping, which threads and tests can
copy or clear.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar

import jax

T = TypeVar("T")

_values: ContextVar[Mapping[str, Any]] = ContextVar("jaxquant", default={})  # noqa: B039  never changed


class Setting(Generic[T]):
    """One dynamically scoped setting.

    Args:
      name: its key in the shared mapping.
      default: the value outside of any `set` block.

    >>> verbosity = Setting("verbosity", 0)
    >>> with verbosity.set(2):
    ...     verbosity.get()
    2
    >>> verbosity.get()
    0
    """

    names: ClassVar[set[str]] = set()

    def __init__(self, name: str, default: T) -> None:
        self.name, self.default = name, default
        self.names.add(name)

    def get(self) -> T:
        """Return the value in force."""
        return _values.get().get(self.name, self.default)

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[T]:
        """Set the value inside a `with` block.

        Args:
          value: the value in force inside the block.
        """
        token = _values.set({**_values.get(), self.name: value})
        try:
            yield value
        finally:
            _values.reset(token)


def compiled(fn: Callable[..., T], static_argnums: int | tuple[int, ...] = ()) -> Callable[..., T]:
    """Return `fn` as one compiled program, for calls outside of `jax.jit`.

    A program keeps the settings that it was traced with, so `fn` itself is called where any setting
    is in force. In a function that is being traced, its operations are inlined.

    Args:
      fn: function of arrays and of static arguments.
      static_argnums: positions of the static arguments, which must be hashable.

    >>> double = compiled(lambda x: 2 * x)
    >>> float(double(3.0)), float(double(x=3.0))
    (6.0, 6.0)
    """
    program = jax.jit(fn, static_argnums=static_argnums, inline=True)
    signature = inspect.signature(fn)

    @functools.wraps(fn)
    def call(*args: Any, **named: Any) -> T:
        if _values.get():
            return fn(*args, **named)
        given = signature.bind(*args, **named)
        given.apply_defaults()
        return program(*given.args)

    return call
