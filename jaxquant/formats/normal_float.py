"""NormalFloat: a table of normal quantiles, scaled by the largest magnitude of each group."""

import dataclasses
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.formats.op_format import WHOLE_BITS
from jaxquant.formats.scales import as_stored, lost, rescaled, through
from jaxquant.formats.table import Scales, Table, search

# The published values (bitsandbytes): float32, computed with the offset rounded to 0.9677083.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 256  # number of scales that share a second-level scale under double quantization


@dataclasses.dataclass(frozen=True)
class NormalFloat(Table):
    """NF4 and, by the same construction, NF3 and NF2, scaled by each group's largest magnitude.

    Attributes:
      bits: number of bits per code: 2, 3 or 4.
      group_size: consecutive rows (input channels) that share a scale; -1 or "channel" for one
        scale per output channel, "tensor" for one per matrix.
      scale_dtype: storage dtype of the scales; codes are chosen with the stored scale.
      double_quant: store each scale, minus the mean over the matrix, as an 8-bit code of the
        dynamic map. Every 256 scales, counted output by output, share a second-level scale in
        `scale_dtype`, as does the mean. At groups of 64 this takes 8 / 64 + 32 / (64 * 256) bits
        per weight instead of 32 / 64.
      pad: allow a group size that does not divide k; the last group is then short.

    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314. Under double quantization, the codes of
    the scales are those of its released code (Dettmers et al. 2022, arXiv:2110.02861); its text
    says float8.

    >>> import jax.numpy as jnp
    >>> f = NormalFloat(bits=2, group_size=-1)
    >>> q = f.encode(jnp.array([[2.0], [0.8], [-2.0], [0.1]]))
    >>> f.dequantize(q, 4).ravel().round(3).tolist()
    [2.0, 0.872..., -2.0, 0.0]
    """

    bits: int = dataclasses.field(default=4, metadata=WHOLE_BITS)
    group_size: int | Literal["channel", "tensor"] = 64
    scale_dtype: str = "float32"
    double_quant: bool = False
    pad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits must be 2, 3 or 4, got {self.bits}")

    @property
    def learnable(self) -> bool:  # type: ignore[override]
        """Whether scales can be learned; scales that are themselves quantized cannot."""
        return not self.double_quant

    @property
    def trained(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the arrays that healing may train."""
        return () if self.double_quant else ("scale",)

    @property
    def table(self) -> tuple[float, ...]:
        return NF4 if self.bits == 4 else normal_quantiles(self.bits)

    def fit(self, w: Float[Array, "g n"]) -> Scales:
        if self.double_quant:
            raise ValueError(
                "double_quant shares scales between outputs, so groups cannot be fitted "
                "one at a time: use LDLQ(act_order=True)"
            )
        return super().fit(w)

    def stored(self, scale: Float[Array, "g n"]) -> Scales:
        if not self.double_quant:
            return super().stored(scale)
        mean = through(jnp.mean(scale, keepdims=True), self.scale_dtype)
        top = as_stored(jnp.max(jnp.abs(_blocks(scale - mean)), -1), self.scale_dtype)
        top = _spread(top, scale.shape)
        _, _, between = search(dynamic_map())
        code = jnp.searchsorted(between, (scale - mean) / top).astype(jnp.uint8)
        # A scale far below the mean may round to 0 or less; the next code is above it.
        code = code + (_combined(code, top, mean) <= jnp.finfo(jnp.float32).tiny)
        parts = {"code": code, "top": top, "mean": jnp.broadcast_to(mean, (len(scale), 1))}
        return Scales(_combined(code, top, mean), parts)

    def check(self, w: Float[Array, "k n"]) -> str:
        """Return a warning if scales lose precision in their storage on these weights, else "".

        Raises:
          ValueError: the weights are outside the range of the scales.
        """
        found = super().check(w)
        if found or not self.double_quant:
            return found
        groups = self.groups(w)  # codes hold the distance to the mean: far smaller scales are lost
        return lost(groups, groups.mean() / 512, "8-bit codes", "use double_quant=False")

    def scaled(self, data: dict[str, Array], e: Array) -> dict[str, Array]:
        return rescaled(data, e, *(("block_scale", "mean") if self.double_quant else ("scale",)))

    def pack_scales(self, grid: Scales) -> dict[str, Array]:
        if not self.double_quant:
            return super().pack_scales(grid)
        return {
            "scale": grid.parts["code"],
            "block_scale": _blocks(grid.parts["top"])[:, :1].astype(self.scale_dtype),
            "mean": grid.parts["mean"][:1].astype(self.scale_dtype),
        }

    def opened(self, data: dict[str, Array]) -> dict[str, Array]:
        if not self.double_quant:
            return data
        code = data["scale"]
        top = _spread(data["block_scale"][..., 0].astype(jnp.float32), code.shape)
        scale = _combined(code, top, data["mean"].astype(jnp.float32))
        return {"codes": data["codes"], "scale": scale}


def _combined(code: Array, top: Array, mean: Array) -> Array:
    """Decode scales; the result is positive, however the smallest was rounded."""
    offset = jnp.asarray(dynamic_map(), jnp.float32)[code] * top
    # No value of the map is below -1, so this changes nothing. Without it, compilers fuse the
    # product and the sum in some programs only, and the sum then differs in its last bit.
    offset = jnp.maximum(offset, -top)
    return jnp.maximum(offset + mean, jnp.finfo(jnp.float32).tiny)


def _blocks(scale: Float[Array, "g n"]) -> Float[Array, "b block"]:
    """Return blocks of consecutive scales, with all groups of one output before the next output."""
    flat = scale.T.ravel()
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def _spread(top: Float[Array, "... b"], shape: tuple[int, ...]) -> Float[Array, "... g n"]:
    """Return the value of each scale's block: the inverse of `_blocks`."""
    g, n = shape[-2:]
    if top.shape[-1] != -(-g * n // BLOCK):
        raise ValueError(
            f"{g * n} doubly quantized scales need {-(-g * n // BLOCK)} scales of their own, got "
            f"{top.shape[-1]}; blocks span outputs, so do not split outputs in shard_map"
        )
    return top[..., (jnp.arange(g)[:, None] + g * jnp.arange(n)) // BLOCK]


@lru_cache
def normal_quantiles(bits: int) -> tuple[float, ...]:
    """Return the 2**bits values of NormalFloat, ascending.

    Zero is exact, and there is one more positive value than negative ones. With h = 2^(bits - 1)
    and p = 1 - (1 / (2^bits - 1) + 1 / 2^bits) / 4, the positive values are the normal quantiles at
    h equal steps from p towards 1/2. The negative values mirror those at h - 1 steps. All are
    divided by the largest.

    Args:
      bits: number of bits per code.

    >>> [round(v, 4) for v in normal_quantiles(3)]
    [-1.0, -0.535, -0.2469, 0.0, 0.1833, 0.382, 0.623, 1.0]
    """
    quantile, half = NormalDist().inv_cdf, 1 << (bits - 1)
    p = 1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4
    above = [quantile(q) for q in np.linspace(p, 0.5, half + 1)[:-1]]
    below = [-quantile(q) for q in np.linspace(p, 0.5, half)[:-1]]
    return tuple(sorted(v / above[0] for v in (*below, 0.0, *above)))


@lru_cache
def dynamic_map() -> tuple[float, ...]:
    """Return the 256 values of the signed 8-bit dynamic map, ascending.

    For i = 0 ... 6, the map holds the midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6),
    with both signs; and 0 and 1. It does not hold -1. The values are, to the last bit, those that
    bitsandbytes computes in float32 on a CPU with fused multiply-add.

    Source: Dettmers et al. 2022, arXiv:2110.02861.

    >>> m = dynamic_map()
    >>> len(m), round(m[0], 4), m[127], m[-1]
    (256, -0.993, 0.0, 1.0)
    """
    powers = [np.float32(10.0 ** (i - 6)) for i in range(7)]
    edges = [_edges(1 << i) for i in range(7)]
    parts = [p * ((e[:-1] + e[1:]) / 2) for p, e in zip(powers, edges, strict=True)]
    positive = np.concatenate(parts)
    return tuple(sorted([*(-positive).tolist(), 0.0, *positive.tolist(), 1.0]))


def _edges(parts: int) -> Float[np.ndarray, "..."]:
    """Return the ends of equal parts of [0.1, 1], as torch rounds them on CPUs that fuse sums.

    It counts steps from the nearer end; each product and sum is rounded once, as here by float64.
    """
    low, high = np.float32(0.1), np.float32(1)
    step, i = np.float64((high - low) / np.float32(parts)), np.arange(parts + 1)
    near = i < (parts + 1) // 2
    return np.where(near, low + step * i, high - step * (parts - i)).astype(np.float32)
