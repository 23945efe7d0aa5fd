"""Viterbi search for the tail-biting path of a bit-shift trellis nearest to 256 weights.

Two successive states share a *node*: the low L - K V bits of one state are the top bits of the
next. For a state s = (d, node), with d its top K V bits, the previous node is s >> K V. With costs
kept per node, a step is

    cost'[node] = min over d of cost[s >> K V] + |g(s) - x|^2,

which visits every state once, in order, without a gather. The sequence of d along the best path is
its bit stream. In the packed form, d replaces the low bits of a cost, so that one minimum yields
both the value and the argument.

The path is closed at a node chosen by a free search of one lap that starts half a lap earlier; a
second search then starts and ends at that node (QTIP, Tseng et al. 2024, arXiv:2406.11235). Shorter
laps cost accuracy: at K = 2, 128 steps instead of 256 lose 0.2 % (L = 12) or 0.8 % (L = 16).

On the CPU a C++ kernel does the same where a compiler is available; see `backend`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.codecs import trellis
from pallas_kernels.cpu import native

BATCH_BYTES = 1 << 28  # temporary memory that the JAX version may use
_FAR = 1e30  # cost of a node from which no path may start


def encode(
    x: Float[Array, "s 256"],
    table: Float[Array, "states V"],
    *,
    L: int,
    K: int,
    V: int,
    valid: Bool[Array, " s"] | None = None,
) -> tuple[Int32[Array, "s words"], Float32[Array, "s 256"]]:
    """Return the streams whose weights are nearest to x, as found by two Viterbi passes.

    Args:
      x: [s, 256], s sequences of 256 weights, scaled to match the table (rms about 1).
      table: [2**L, V], the weights of every state.
      L: number of bits of a state.
      K: number of bits per weight.
      V: number of weights per step.
      valid: bool [s], the sequences to search for; the others are returned as zeros, at no cost in
        the native version. None, the default, searches for all.
    Returns:
      int32 words [s, 8 K] for `trellis.decode`, and their weights, float32 [s, 256].
    Raises:
      ValueError: the shapes do not match L, K and V.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.codecs import trellis
    >>> table = jnp.asarray(trellis.values("mul1", 8, 1))
    >>> words, weights = encode(jnp.ones((1, 256)), table, L=8, K=2, V=1)
    >>> bool((weights == trellis.decode(words, 8, 2, 1, table)).all())
    True
    """
    trellis.check(L, K, V)
    if table.shape != (1 << L, V) or x.ndim != 2 or x.shape[1] != trellis.WEIGHTS:
        raise ValueError(
            f"expected x [s, 256] and a table [{1 << L}, {V}] for L = {L}, V = {V}, "
            f"got {x.shape} and {table.shape}"
        )
    x, table = x.astype(jnp.float32), table.astype(jnp.float32)
    valid = jnp.ones(len(x), bool) if valid is None else valid
    search = lambda x, table, valid: _search(x, table, valid, L, K, V)
    if not _serves(L, K, V):
        return search(x, table, valid)
    fast = lambda x, table, valid: _native(x, table, valid, L, K, V)
    return jax.lax.platform_dependent(x, table, valid, cpu=fast, default=search)


def backend(L: int = 16, K: int = 2, V: int = 1) -> str:
    """Return which implementation of `encode` runs on this machine, and why no faster one does.

    Args:
      L, K, V: as in `encode`.

    >>> backend().split()[0].rstrip(":") in ("native", "jax")
    True
    """
    if jax.default_backend() != "cpu":
        return f"jax: XLA on {jax.default_backend()}"
    if reason := native.load():
        return f"jax: no native kernel ({reason})"
    return "native" if _serves(L, K, V) else f"jax: no native kernel for L={L}, K={K}, V={V}"


def _serves(L: int, K: int, V: int) -> bool:
    """Return whether the native kernel is available and supports this trellis.

    It requires d to fit a byte, and at least 16 nodes.
    """
    fits = K * V <= 8 and L - K * V >= 4
    return fits and jax.default_backend() == "cpu" and not native.load()


def _native(
    x: Array, table: Array, valid: Array, L: int, K: int, V: int, lanes: int = 16
) -> tuple[Array, Array]:
    """Run the C++ kernel; `lanes` limits the number of floats in a vector."""
    shapes = (
        jax.ShapeDtypeStruct((len(x), 8 * K), jnp.int32),
        jax.ShapeDtypeStruct(x.shape, jnp.float32),
    )
    call = jax.ffi.ffi_call("jaxquant_viterbi", shapes, vmap_method="sequential")
    sizes = {"L": np.int32(L), "K": np.int32(K), "V": np.int32(V), "lanes": np.int32(lanes)}
    words, weights = call(x, table, valid, **sizes)
    return words, weights


# --- the JAX version ------------------------------------------------------------------------


def batch_size(L: int, K: int, V: int) -> int:
    """Return how many sequences the JAX version searches at a time within BATCH_BYTES.

    Args:
      L, K, V: as in `encode`.

    >>> batch_size(16, 2, 1)
    36
    """
    nodes = 1 << L - K * V
    back = trellis.WEIGHTS // V * nodes * _back(K * V).itemsize
    # The d of both passes (half a lap and a whole lap), and a few arrays of one float per state.
    return max(1, BATCH_BYTES // (back * 3 // 2 + 16 * (1 << L)))


def _back(bits: int) -> np.dtype:
    return np.dtype(np.uint8 if bits <= 8 else np.uint16)


def _search(x: Array, table: Array, valid: Array, L: int, K: int, V: int) -> tuple[Array, Array]:
    s, size = len(x), min(batch_size(L, K, V), len(x))
    if s == 0:
        return jnp.zeros((0, 8 * K), jnp.int32), x
    steps = jnp.pad(x, ((0, -s % size), (0, 0))).reshape(-1, size, trellis.WEIGHTS // V, V)
    states = jax.lax.map(lambda x: _paths(x.swapaxes(0, 1), table, L, K * V), steps)
    states = states.reshape(-1, trellis.WEIGHTS // V)[:s]
    words = jnp.where(valid[:, None], trellis.pack(states, L, K, V), 0)
    return words, jnp.where(valid[:, None], table[states].reshape(x.shape), 0.0)


def _paths(x: Array, table: Array, L: int, bits: int) -> Array:
    """Return the states [s, steps] of the paths found for x [steps, s, V]."""
    steps, s = x.shape[:2]
    nodes = 1 << L - bits

    def step(cost: Array, x: Array) -> tuple[Array, Array]:
        error = sum((table[:, v] - x[:, v, None]) ** 2 for v in range(x.shape[1]))
        cost = jnp.repeat(cost, 1 << bits, axis=1) + error
        cost, d = _least(cost.reshape(s, 1 << bits, nodes))
        return cost - cost.min(axis=1, keepdims=True), d.astype(_back(bits))

    def before(node: Array, back: Array) -> tuple[Array, Array]:
        state = jnp.take_along_axis(back, node[:, None], 1)[:, 0].astype(jnp.int32) * nodes + node
        return state >> bits, state

    half, start = steps // 2, jnp.zeros((s, nodes))
    cost, _ = jax.lax.scan(lambda cost, x: (step(cost, x)[0], None), start, x[half:])
    cost, back = jax.lax.scan(step, cost, x[:half])
    cut, _ = jax.lax.scan(before, jnp.argmin(cost, axis=1), back, reverse=True)
    cost = jnp.where(jnp.arange(nodes) == cut[:, None], 0.0, _FAR)
    _, back = jax.lax.scan(step, cost, x)
    _, states = jax.lax.scan(before, cut, back, reverse=True)
    return states.T


def _least(cost: Array) -> tuple[Array, Array]:
    """Return the minimum over axis 1 of non-negative costs, and its index."""
    count = cost.shape[1]
    index = jnp.arange(count)[:, None]
    if count > 256:  # the index would leave too few bits for the cost
        least = cost.min(axis=1)
        return least, jnp.where(cost == least[:, None], index, count - 1).min(axis=1)
    # Non-negative floats are ordered like their bit patterns.
    key = jax.lax.bitcast_convert_type(cost, jnp.int32) & ~(count - 1)
    key = (key | index).min(axis=1)
    return jax.lax.bitcast_convert_type(key, jnp.float32), key & (count - 1)
