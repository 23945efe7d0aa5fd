"""Random rows and stacks of packed matrices, for kernels of grouped products."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.codecs import layout


def made(experts, m, k, n, bits, group, zero, dtype, activations):
    """x and the stacks of a case."""
    rng = np.random.default_rng([experts, m, k])
    words = lambda *shape: jnp.asarray(rng.integers(-(2**31), 2**31, shape).astype(np.int32))
    groups = -(-k // group)
    x = rng.normal(size=(m, k))
    if activations == "codes":
        x = np.clip(np.round(40 * x), -127, 127)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (experts, groups, n)), "float16")
    zero = words(experts, groups, layout.words(n, bits)) if zero else None
    return jnp.asarray(x, dtype), (words(experts, layout.words(k, bits), n), scale, zero)
