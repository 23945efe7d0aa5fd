"""What compiled programs take."""

from typing import Any


def program_memory(function: Any, *args: Any, **static: Any) -> int:
    """Return the bytes that a call of a jitted function takes besides its arguments.

    The function is compiled for this, but not run. They are those of its results, except those
    that take the place of donated arguments, and of everything that exists in between.

    Args:
      function: result of `jax.jit`.
      *args: arguments, which may be `jax.ShapeDtypeStruct`s.
      **static: keyword arguments.

    >>> import jax, jax.numpy as jnp
    >>> program_memory(jax.jit(lambda x: x + 1), jax.ShapeDtypeStruct((1024,), jnp.float32))
    4096
    """
    found = function.lower(*args, **static).compile().memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.temp_size_in_bytes + max(0, results)
