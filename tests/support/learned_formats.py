"""What the tests of learned codebooks share: a layer, encoded matrices, bits."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.protocols import Moments
from jaxquant.rounding.beam import Beam
from tests.support.arrays import draw
from tests.support.layer import made_layer

ONE = Beam(sweeps=1)


@lru_cache
def layer(seed=0):
    return tuple(jnp.asarray(a) for a in made_layer(seed, n=128, k=64, tokens=1024))


def bits(data, k, n):
    return sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(data)) / (k * n)


def rounded(w, h, format, rounder=ONE, key=0):
    data, _ = rounder(w, format, Moments(h), jax.random.key(key))
    return data, decode(format, data)


@partial(jax.jit, static_argnums=(0, 2))
def decode(format, data, k=64):
    return format.dequantize(data, k)


@lru_cache
def encoded(format):
    """A Gaussian matrix [48, 40], its grid, its packed data, the matrix that they decode to."""
    w = draw(48, 40)
    data = format.encode(w)
    return w, format.grids(w), data, np.asarray(decode(format, data, 48))
