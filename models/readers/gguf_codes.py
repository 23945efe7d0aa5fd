"""The codes of quantized GGUF tensors as integers, and the bytes of their scales.

The `gguf` library dequantizes blocks whose scales are replaced by 1 and whose offsets by 0; what it
returns are the codes, up to a shift, or the entries of the type's table.
"""

from collections.abc import Iterator

import gguf
import numpy as np
from jaxtyping import Int, UInt8

from jaxquant_models.readers.gguf_file import Tensor

CHUNK = 1 << 14  # number of blocks that are expanded at a time
_ONE, _ZERO = b"\x00\x3c", b"\x00\x00"  # in float16
# type -> {place of the scales in a block: bytes that stand for a scale of 1 and an offset of 0}
SIDE: dict[str, dict[int, bytes]] = {
    "Q4_0": {0: _ONE},
    "Q4_1": {0: _ONE + _ZERO},
    "Q5_0": {0: _ONE},
    "Q5_1": {0: _ONE + _ZERO},
    "Q8_0": {0: _ONE},
    "Q2_K": {0: b"\x01" * 16, 80: _ONE + _ZERO},
    "Q3_K": {96: b"\x11" * 8 + b"\xaa" * 4 + _ONE},  # scales of six bits, 32 too large
    "Q4_K": {0: _ONE + _ZERO + b"\x01" * 4 + b"\x00" * 4 + b"\x01" * 4},
    "Q5_K": {0: _ONE + _ZERO + b"\x01" * 4 + b"\x00" * 4 + b"\x01" * 4},
    "Q6_K": {192: b"\x01" * 16 + _ONE},
    "IQ4_NL": {0: _ONE},
    "TQ1_0": {52: _ONE},
    "TQ2_0": {64: _ONE},
}


def has_codes(tensor: Tensor) -> bool:
    """Return whether the codes of a tensor can be told apart from its scales.

    Args:
      tensor: the tensor.
    """
    return tensor.kind.name in SIDE


def code_bits(tensor: Tensor) -> float:
    """Return the number of bits that the type of a tensor stores for the code of a weight.

    Args:
      tensor: a tensor that has codes.
    """
    weights, nbytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    return 8 * (nbytes - sum(map(len, SIDE[tensor.kind.name].values()))) / weights


def codes(tensor: Tensor) -> Iterator[Int[np.ndarray, " n"]]:
    """Yield the codes of all weights of a tensor in order, as integers from -128 to 127.

    Args:
      tensor: a tensor that has codes.
    """
    side, size = SIDE[tensor.kind.name], gguf.GGML_QUANT_SIZES[tensor.kind][1]
    blocks = tensor.data.reshape(-1, size)
    for at in range(0, len(blocks), CHUNK):
        bare = blocks[at : at + CHUNK].copy()
        for place, scales in side.items():
            bare[:, place : place + len(scales)] = np.frombuffer(scales, np.uint8)
        yield gguf.quants.dequantize(bare, tensor.kind).reshape(-1).astype(np.int64)


def scales(tensor: Tensor) -> tuple[UInt8[np.ndarray, " n"], int]:
    """Return the bytes of the scales and offsets of all blocks, and how many a block has.

    Args:
      tensor: a tensor that has codes.
    """
    side, size = SIDE[tensor.kind.name], gguf.GGML_QUANT_SIZES[tensor.kind][1]
    blocks = tensor.data.reshape(-1, size)
    parts = [blocks[:, place : place + len(ones)] for place, ones in side.items()]
    found = np.concatenate(parts, axis=1)
    return found.reshape(-1), found.shape[1]
