"""Gaussian error of every trellis code, and weights per second of the search.

Run: python tests/benchmarks/trellis_distortion.py [--quick]. The scale of the table is the best of
a grid on other sequences. Weights per second are of wall time and of CPU time (all threads).
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import viterbi
from pallas_kernels.codecs import trellis

SCALES = [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def encoded(x, table, scale, L, K, V):
    return viterbi.encode(x / scale, table, L=L, K=K, V=V)[1] * scale


def mse(x, table, scale, L, K, V):
    """Mean squared error and its standard error."""
    errors = jnp.mean((encoded(x, table, scale, L, K, V) - x) ** 2, axis=1)
    return float(errors.mean()), float(errors.std() / len(x) ** 0.5)


def row(code, L, K, sequences):
    V = trellis.CODES[code]
    table = jnp.asarray(trellis.values(code, L, V))
    rng = np.random.default_rng(0)
    x, other = (jnp.asarray(rng.standard_normal((sequences, 256)), jnp.float32) for _ in range(2))
    errors = [mse(other, table, scale, L, K, V)[0] for scale in SCALES]
    scale = SCALES[int(np.argmin(errors))]
    error, spread = mse(x, table, scale, L, K, V)
    gap = 10 * np.log10(error * 4**K)
    print(
        f"{code:6} L={L} V={V} K={K}  {error:.5f} ({spread:.5f})  scale {scale:.2f}  "
        f"gap {gap:.2f} dB  at scale 1 {mse(x, table, 1.0, L, K, V)[0]:.5f}",
        flush=True,
    )


def speed(L, K, V, native):
    n = max(2, (1 << 20 if native else 1 << 17) >> L - 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((n, 256)), jnp.float32)
    table, valid = jnp.asarray(trellis.values("mul1", L, V)), jnp.ones(n, bool)
    search = viterbi._native if native else viterbi._search
    run = jax.jit(lambda x: search(x, table, valid, L, K, V))
    jax.block_until_ready(run(x))
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run(x))
    return x.size / (time.perf_counter() - wall), x.size / (time.process_time() - cpu)


def main():
    quick = "--quick" in sys.argv
    print(f"encode: {viterbi.backend()}")
    for L in (12, 16):
        for code in trellis.CODES if not quick else ("mul1",):
            for K in (1, 2, 3, 4) if not quick else (2,):
                if K * trellis.CODES[code] <= 8:
                    row(code, L, K, (64 if quick else 512) if L == 12 else (16 if quick else 128))
    print("search, weights/s          native wall (CPU)       JAX wall (CPU)      ratio of CPU")
    for L in (12, 16):
        for K in (1, 2, 3, 4) if not quick else (2,):
            slow = speed(L, K, 1, native=False)
            fast = speed(L, K, 1, native=True) if viterbi.backend() == "native" else slow
            print(
                f"L={L} V=1 K={K}  {fast[0]:12,.0f} ({fast[1]:11,.0f})  "
                f"{slow[0]:12,.0f} ({slow[1]:9,.0f})  {fast[1] / slow[1]:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
