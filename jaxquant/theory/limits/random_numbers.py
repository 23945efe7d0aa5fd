"""NumPy's random numbers from a JAX key, for experiments on the host."""

import jax
import numpy as np
from jaxtyping import Array

from jaxquant.core.arguments import check_arguments


def generator(key: Array) -> np.random.Generator:
    """Return a NumPy generator that a JAX key seeds.

    Args:
      key: the key, such as `jax.random.key(0)`. Equal keys give equal numbers.
    Returns:
      The generator.
    Raises:
      ValueError: it is not a key.

    >>> import jax
    >>> generator(jax.random.key(0)).random() == generator(jax.random.key(0)).random()
    True
    """
    check_arguments(generator, locals())
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
