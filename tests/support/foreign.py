"""Parts as a user outside of the package would write them: a format, a transform, a rounder."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.formats.symbols import Symbols, symbols
from pallas_kernels.codecs import layout

LEVELS = np.array([s * 2.0**-e for s in (1, -1) for e in range(8)], np.float32)


class LogGrid(NamedTuple):
    """The scale of every column."""

    scale: jax.Array


@jq.recipes.register
@dataclasses.dataclass(frozen=True)
class SignLog(jq.formats.GridFormat):
    """Four bits: a sign and a power of two, times a scale for every output."""

    wide = True
    trained = ("scale",)

    def rows_per_group(self, k):
        return k

    def grids(self, w):
        largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
        return LogGrid(jnp.where(largest > 0, largest, 1.0).astype(jnp.float32))

    def round(self, target, row):
        distance = jnp.abs((target / row.scale)[..., None] - LEVELS)
        code = jnp.argmin(distance, axis=-1).astype(jnp.int8)
        return code, row.scale * jnp.asarray(LEVELS)[code]

    def rescaled(self, grid, factor):
        return LogGrid(grid.scale * factor)

    def pack(self, codes, grid):
        codes = codes.reshape(-1, codes.shape[-1])
        return {"codes": layout.pack(codes, 4), "scale": grid.scale}

    def encode(self, w):
        grid = self.grids(w)
        return self.pack(self.round(w, grid)[0], grid)

    def decode(self, data, k):
        codes = layout.unpack(data["codes"], 4, k) & 15  # as they are stored, with their sign
        return data["scale"] * jnp.asarray(LEVELS)[codes]

    def scaled(self, data, e):
        return data | {"scale": jnp.ldexp(data["scale"], e)}


@symbols.register
def _(format: SignLog, data, k):
    codes = np.asarray(layout.unpack(data["codes"], 4, k))
    columns = np.broadcast_to(np.arange(codes.shape[1]), codes.shape)
    return [Symbols(codes.ravel(), columns.ravel(), 16, 4)]


@jq.recipes.register
@dataclasses.dataclass(frozen=True)
class Reversal(jq.transforms.Transform):
    """Channels in reverse order, each times a number: no method needs it, any could have it."""

    factor: float = 2.0

    def fit(self, channels, key):
        return {"factors": jnp.full(channels.weights.shape[1], self.factor, jnp.float16)}

    def apply(self, x, arrays):
        return (x * arrays["factors"].astype(x.dtype))[..., ::-1]

    def transposed(self, y, arrays, n):
        return y[..., ::-1] * arrays["factors"].astype(y.dtype)

    def inverse(self, x, arrays):
        return (x / arrays["factors"].astype(x.dtype))[..., ::-1]


@jq.recipes.register
@dataclasses.dataclass(frozen=True)
class Coarse(jq.rounding.Rounder):
    """Rounds what is left of a matrix when its smallest entries are set to zero."""

    share: float = 0.01

    def __call__(self, w, format, moments, key=None):
        least = jnp.quantile(jnp.abs(w), self.share)
        data = format.encode(jnp.where(jnp.abs(w) < least, 0.0, w))
        return data, {"damping": jnp.float32(0), "dead": jnp.int32(0)}
