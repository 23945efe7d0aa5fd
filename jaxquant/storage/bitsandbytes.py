"""NF4 weights as bitsandbytes serializes them: read and written byte for byte, without torch.

A torch weight is [out, in]; here it is a matrix [k, n] with k = in and n = out. bitsandbytes cuts
the flat [out, in] array into blocks, which are groups of rows of [k, n] if the block size divides
in. For a layer whose name is removed, a checkpoint holds:

  weight                 uint8 [out * in / 2, 1], two codes per byte, the first in the high bits
  weight.absmax          float32 [blocks], or uint8 codes of the dynamic map (double quantization)
  weight.quant_map       float32 [16], the values of NF4
  weight.nested_absmax, weight.nested_quant_map
                         float32 [ceil(blocks / 256)] and [256], under double quantization only
  weight.quant_state.bitsandbytes__nf4
                         uint8, the bytes of a JSON object: type of the codes, shape, dtype, block
                         sizes, offset

Under double quantization, the scale of a block is map[absmax] * nested_absmax + offset.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, Shaped, UInt8

from jaxquant.core.arguments import check_arguments
from jaxquant.core.tensor import QTensor, View
from jaxquant.formats.normal_float import BLOCK, NF4, NormalFloat, dynamic_map

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes accepts
DTYPES = ("float32", "float16", "bfloat16")
STATE = "weight.quant_state.bitsandbytes__nf4"
CODE_OF_ZERO = NF4.index(0.0)
# torch computes the dynamic map in float32, and rounds differently on CPUs without fused sums.
SAME_MAP = 2.0**-21

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]


def from_bitsandbytes(arrays: Arrays) -> QTensor:
    """Return a weight that bitsandbytes serialized in NF4, as a matrix [in, out].

    It decodes to the floats that dequantize_4bit of bitsandbytes returns, bit for bit, if the
    file's dynamic map is the one that torch computes on CPUs with AVX2 or AVX-512. The map of a CPU
    without them differs by at most 2 units in the last place; it is read, and the scales then
    differ by as much.

    Args:
      arrays: the arrays of one layer, by name, without the name of the layer: "weight",
        "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4" and, under
        double quantization, "weight.nested_absmax" and "weight.nested_quant_map". Others, such as
        "bias", are ignored.

    Returns:
      The weight, in the format `NormalFloat(4)`, whose groups are the blocks. It has the dtype that
      the file gives, and the codes and scales of the file, in another order.

    Raises:
      ValueError: an array is missing or has a wrong dtype or shape, the weight is not in NF4, its
        blocks extend over several rows of [out, in], or double quantization left a block of
        nonzero weights with a scale of 0 or less.

    Source: bitsandbytes 0.50.2; Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w = jq.quantize_array(jnp.ones((128, 3)), jq.nf4(double_quant=True))
    >>> back = from_bitsandbytes(to_bitsandbytes(w))
    >>> back.shape, back.format == w.format, bool((back.dequantize() == w.dequantize()).all())
    ((128, 3), True, True)
    """
    check_arguments(from_bitsandbytes, locals())
    state = _state(arrays)
    n, k = state["shape"]
    block = state["blocksize"]
    groups = k // block
    double = "weight.nested_absmax" in arrays or "nested_offset" in state
    codes = _array(arrays, "weight", np.uint8, n * k // 2)
    _check_map(_array(arrays, "weight.quant_map", np.float32, 16), NF4, 0.0, "weight.quant_map")
    absmax = _array(arrays, "weight.absmax", np.uint8 if double else np.float32, n * groups)
    data = {"codes": _words(codes.reshape(n, -1)), "scale": absmax.reshape(n, groups).T}
    if double:
        data |= _second_level(arrays, state, absmax, codes.reshape(len(absmax), -1))
    elif not (np.isfinite(absmax) & (absmax >= 0)).all():
        raise ValueError("weight.absmax must be finite and not negative; is the file damaged?")
    return QTensor(
        {name: jnp.asarray(a) for name, a in data.items()},
        NormalFloat(4, group_size=block, double_quant=double),
        View((k,), (n,), (-2, -1)),
        logical_dtype=state["dtype"],
        method="nf4",
    )


def to_bitsandbytes(w: QTensor) -> dict[str, np.ndarray]:
    """Return the arrays that bitsandbytes would store for a weight in NF4.

    bitsandbytes decodes them to the floats that w decodes to, transposed, bit for bit. Of arrays
    that `from_bitsandbytes` has read, this returns the same bytes.

    Args:
      w: one matrix [k, n] in the format `NormalFloat` with 4 bits, float32 scales, and groups of
        32, 64, 128, ... or 4096 rows, with or without double quantization.

    Returns:
      Arrays by name, without the name of the layer, as `from_bitsandbytes` takes them.

    Raises:
      ValueError: bitsandbytes cannot hold the weight, for the reason given, or would take the
        scale of a block for negative where `NormalFloat` takes it for 0.

    Source: bitsandbytes 0.50.2.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w = jq.quantize_array(jnp.ones((128, 3)), jq.nf4(double_quant=True))
    >>> arrays = to_bitsandbytes(w)
    >>> {name.removeprefix("weight."): a.shape for name, a in arrays.items() if "state" not in name}
    {'weight': (192, 1), 'absmax': (6,), 'quant_map': (16,), 'nested_absmax': (1,), ...}
    >>> bytes(arrays["weight.quant_state.bitsandbytes__nf4"]).decode()
    '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [3, 128], ...}'
    """
    check_arguments(to_bitsandbytes, locals())
    block, double = _check_weight(w)
    data = {name: np.asarray(a) for name, a in w.data.items()}
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": w.logical_dtype,
        "shape": [data["codes"].shape[-1], w.rows_k],
    }
    arrays = {
        "weight": _bytes(data["codes"]).reshape(-1, 1),
        "weight.absmax": data["scale"].T.ravel(),
        "weight.quant_map": np.asarray(NF4, np.float32),
    }
    if double:
        top, values = data["block_scale"].ravel(), np.asarray(dynamic_map(), np.float32)
        absmax, offset = arrays["weight.absmax"], data["mean"].item()
        scales = values[absmax] * _spread(top, absmax) + np.float32(offset)
        _check_positive(scales, arrays["weight"].reshape(absmax.size, -1))
        arrays |= {"weight.nested_absmax": top, "weight.nested_quant_map": values}
        state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return arrays | {STATE: np.frombuffer(json.dumps(state).encode(), np.uint8).copy()}


# --- codes ----------------------------------------------------------------------------------


def _words(packed: UInt8[np.ndarray, "n half"]) -> Int32[np.ndarray, "w n"]:
    """Return codes, packed along rows of [out, in], as int32 words packed along k."""
    return np.ascontiguousarray(_swapped(packed)).view("<i4").T


def _bytes(words: Int32[np.ndarray, "w n"]) -> UInt8[np.ndarray, "n half"]:
    """Return the bytes of codes: the inverse of `_words`."""
    return _swapped(np.ascontiguousarray(words.T, "<i4").view(np.uint8))


def _swapped(packed: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Exchange the two codes of every byte: theirs has the first in the high bits, ours in the low.

    >>> _swapped(np.array([0x1F], np.uint8)).tolist() == [0xF1]
    True
    """
    return packed << 4 | packed >> 4


# --- checks ---------------------------------------------------------------------------------


def _state(arrays: Arrays) -> dict[str, Any]:
    """Return what the JSON object of a layer says, checked."""
    other = [key for key in arrays if "bitsandbytes__" in key and key != STATE]
    if other:
        raise ValueError(f"only NF4 can be read, got {other[0]!r}: quantize with quant_type='nf4'")
    try:
        state = json.loads(bytes(_array(arrays, STATE, np.uint8)))
        kind, dtype = state["quant_type"], state["dtype"]
        shape, block = state["shape"], state["blocksize"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{STATE} is not the JSON of a quantization state: {error!r}") from None
    if kind != "nf4":
        raise ValueError(f"only NF4 can be read, got {kind!r}: quantize with quant_type='nf4'")
    if not (isinstance(shape, list) and len(shape) == 2 and all(_positive(s) for s in shape)):
        raise ValueError(f"the weight must be a matrix [out, in], got shape {shape}")
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of the weight must be one of {DTYPES}, got {dtype!r}")
    if block not in BLOCK_SIZES:
        raise ValueError(f"the block size must be one of {BLOCK_SIZES}, got {block!r}")
    if shape[1] % block:
        raise ValueError(
            f"blocks of {block} extend over several rows of the weight, which have {shape[1]} "
            "entries: use a block size that divides the number of inputs"
        )
    return state


def _positive(size: Any) -> bool:
    return type(size) is int and size > 0


def _array(arrays: Arrays, key: str, dtype: type, size: int | None = None) -> np.ndarray:
    """Return an array as one axis, after checking its dtype and size."""
    if key not in arrays:
        raise ValueError(f"no array {key!r}; there are {sorted(arrays)}")
    a = np.asarray(arrays[key])
    if a.dtype != dtype:
        raise ValueError(f"{key!r} must be {np.dtype(dtype).name}, got {a.dtype.name}")
    if size is not None and a.size != size:
        raise ValueError(f"{key!r} must have {size} entries, by the shape in {STATE}, got {a.size}")
    return a.ravel()


def _check_map(found: np.ndarray, wanted: tuple[float, ...], within: float, key: str) -> None:
    values = np.asarray(wanted, np.float32)
    if not (np.abs(found - values) <= within * np.abs(values)).all():
        raise ValueError(f"{key!r} is not the table that bitsandbytes has for NF4")


def _second_level(
    arrays: Arrays,
    state: dict[str, Any],
    absmax: UInt8[np.ndarray, "blocks"],
    codes: UInt8[np.ndarray, "blocks half"],
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return the second-level scales of a layer and their mean, checked."""
    size, dtype, mean = (state.get(f"nested_{s}") for s in ("blocksize", "dtype", "offset"))
    if (size, dtype) != (BLOCK, "float32") or type(mean) is not float or not math.isfinite(mean):
        raise ValueError(
            f"{STATE} must give nested_blocksize {BLOCK}, nested_dtype 'float32' and a finite "
            f"nested_offset, got {size!r}, {dtype!r} and {mean!r}"
        )
    offset = np.float32(mean)
    key = "weight.nested_quant_map"
    values = _array(arrays, key, np.float32, 256)
    _check_map(values, dynamic_map(), SAME_MAP, key)
    top = _array(arrays, "weight.nested_absmax", np.float32, -(-len(absmax) // BLOCK))
    if not (np.isfinite(top) & (top >= 0)).all():
        raise ValueError("weight.nested_absmax must be finite and not negative; is it damaged?")
    _check_positive(values[absmax] * _spread(top, absmax) + offset, codes)
    return {"block_scale": top[:, None], "mean": offset.reshape(1, 1)}


def _spread(top: Float[np.ndarray, "t"], absmax: Shaped[np.ndarray, "blocks"]) -> np.ndarray:
    """Return the second-level scale of every block."""
    return top[np.arange(absmax.size) // BLOCK]


def _check_positive(
    scales: Float[np.ndarray, "blocks"], codes: UInt8[np.ndarray, "blocks half"]
) -> None:
    """Raise ValueError if a block of nonzero codes has a scale that `NormalFloat` cannot hold."""
    lost = (scales <= 0) & (codes != CODE_OF_ZERO << 4 | CODE_OF_ZERO).any(1)
    if lost.any():
        raise ValueError(
            f"double quantization left {lost.sum()} of {len(lost)} blocks with a scale of 0 or "
            "less, which bitsandbytes takes as it is and NormalFloat as 0, because the weights "
            "there are far smaller than elsewhere: quantize without double quantization"
        )


def _check_weight(w: QTensor) -> tuple[int, bool]:
    """Return a weight's block size, and whether its scales are quantized.

    Raises:
      ValueError: bitsandbytes cannot hold the weight.
    """
    f = w.format
    if not isinstance(f, NormalFloat) or (f.bits, f.scale_dtype) != (4, "float32"):
        raise ValueError(f"the format must be NormalFloat(bits=4) with float32 scales, got {f}")
    if w.input is not None or w.output is not None or w.activations is not None:
        raise ValueError("bitsandbytes has no transforms and no formats of inputs, but w has one")
    if w.leading() or len(w.view.k) != 1 or len(w.view.n) != 1:
        raise ValueError(f"w must be one matrix [k, n], got shape {w.shape}: pass its matrices")
    if w.logical_dtype not in DTYPES:
        raise ValueError(f"the dtype of w must be one of {DTYPES}, got {w.logical_dtype!r}")
    block = w.rows_k if f.group_size in (-1, "channel") else f.group_size
    if block not in BLOCK_SIZES or w.rows_k % block:
        raise ValueError(
            f"group_size must be one of {BLOCK_SIZES} and divide k, got {f.group_size!r} for "
            f"k = {w.rows_k}"
        )
    return int(block), f.double_quant
