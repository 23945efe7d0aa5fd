"""A rounder and a format of one's own beside GPTQ: one product predicts the next byte of text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.core.protocols import GridFormat, Rounder
from jaxquant_models.readers.text import builtin_text
from pallas_kernels.codecs import layout

LEVELS = np.array([sign * 1.6**-e for e in range(8) for sign in (1, -1)], np.float32)


@dataclasses.dataclass(frozen=True)
class Logarithmic(GridFormat):  # four bits: a sign and a power of 1.6, a scale for each output
    def rows_per_group(self, k):
        return k

    def grids(self, w):
        return jnp.max(jnp.abs(w), axis=0, keepdims=True).astype("float16").astype("float32")

    def round(self, target, scale):
        code = jnp.argmin(jnp.abs(target[..., None] - scale[..., None] * LEVELS), axis=-1)
        return code.astype("int8"), scale * jnp.asarray(LEVELS)[code]

    def pack(self, codes, scale):
        codes = layout.pack(codes.reshape(-1, codes.shape[-1]), 4)
        return {"codes": codes, "scale": scale.astype("float16")}

    def encode(self, w):
        return self.pack(self.round(w, self.grids(w))[0], self.grids(w))

    def decode(self, data, k):
        return data["scale"] * jnp.asarray(LEVELS)[layout.unpack(data["codes"], 4, k) & 15]


@dataclasses.dataclass(frozen=True)
class Descent(Rounder):  # each row in turn to its best codes, eight times: arXiv:2309.01885
    needs_gram = True

    def __call__(self, w, format, moments, key=None):
        grid, k, h = format.grids(w), len(w), moments.input + 1e-6 * jnp.eye(len(w))
        entry = lambda i: jax.tree.map(lambda a: a[i // format.rows_per_group(k)], grid)

        def better(i, q):
            target = q[i] - h[i] @ (q - w) / h[i, i]
            return q.at[i].set(format.round(target[None], entry(i))[1][0])

        q = jax.lax.fori_loop(0, 8 * k, lambda i, q: better(i % k, q), w)
        codes = format.round(q, entry(jnp.arange(k)))[0]
        return format.pack(codes, grid), {"damping": jnp.float32(0), "dead": jnp.int32(0)}


text = np.frombuffer(builtin_text()[0].encode(), np.uint8)
windows = np.lib.stride_tricks.sliding_window_view(text, 17)[::20]
table = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
x = table[windows[:, :16]].reshape(-1, 256)
w = jnp.linalg.solve(x.T @ x, x.T @ jnp.eye(256)[windows[:, 16]])  # the least-squares predictor
params, fn = {"w": w}, lambda params, x: x @ params["w"]
stats = jq.calibrate(fn, params, [x[::2]])
gptq = jq.gptq(bits=4, group_size=-1, symmetric=True)
methods = {"gptq": gptq, "my rounder": dataclasses.replace(gptq, rounder=Descent())}
for name, method in methods.items():
    for form in (method.format, Logarithmic()):
        q = jq.quantize(params, dataclasses.replace(method, format=form), stats)
        lost = fn(params, x[1::2]) - jax.jit(jq.quantized(fn))(q, x[1::2])
        share = jnp.sum(lost**2) / jnp.sum(fn(params, x[1::2]) ** 2)
        print(f"{name}, {type(form).__name__}: {q['w'].bits_per_weight} bits, error {share:.4f}")
