"""Hidden arguments of what is traced: all of them, in one context variable.

A function that JAX traces calls through code that is not ours, so some arguments cannot be passed
down by hand: which kernels to use, who listens, by which key to round. Each is a `Setting` with a
name and a default; their values lie in one mapping, which threads and tests can copy or clear.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")

_values: ContextVar[Mapping[str, Any]] = ContextVar("jaxquant", default={})  # noqa: B039  never changed


class Setting(Generic[T]):
    """One hidden argument.

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
        """The value in force."""
        return _values.get().get(self.name, self.default)

    @contextlib.contextmanager
    def set(self, value: T) -> Iterator[T]:
        """Inside, this is the value."""
        token = _values.set({**_values.get(), self.name: value})
        try:
            yield value
        finally:
            _values.reset(token)
