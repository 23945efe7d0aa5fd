"""Golden arrays of NF4, made by the real bitsandbytes, for test_bitsandbytes.py.

The tests only read what this has written. To write it again, install bitsandbytes and torch (for
CPUs) in an environment of their own, and run there, from the root of the repository:

  python tests/storage/bitsandbytes_goldens.py

The weights are not stored: `weights` draws them again, by the generator whose numbers NumPy has
promised to keep.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "bitsandbytes_nf4.npz"
# name: shape [out, in], block size, double quantization, dtype of the weight
CASES = {
    "double": ((8, 128), 64, True, "float32"),
    "plain": ((4, 128), 64, False, "float32"),
    "two_nested_blocks": ((33, 512), 64, True, "float32"),
    "blocks_of_128": ((3, 256), 128, True, "float32"),
    "blocks_of_32": ((6, 96), 32, False, "float32"),
    "bfloat16": ((3, 128), 64, True, "bfloat16"),
    "float16": ((3, 128), 64, True, "float16"),
    "one_block": ((1, 64), 64, True, "float32"),
}


def weights(name):
    """Normal weights [out, in], float32, in rows of different sizes."""
    shape = CASES[name][0]
    draw = np.random.RandomState(list(CASES).index(name))
    sizes = np.exp(0.3 * draw.standard_normal((shape[0], 1)))
    return (0.02 * sizes * draw.standard_normal(shape)).astype(np.float32)


def stored(name):
    """What a checkpoint of the package holds for a weight, and what the package decodes it to."""
    import torch
    from bitsandbytes import functional

    _, block, double, dtype = CASES[name]
    w = torch.from_numpy(weights(name)).to(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(
        w, blocksize=block, compress_statistics=double, quant_type="nf4"
    )
    arrays = {"weight": packed.numpy()}
    arrays |= {f"weight.{key}": a.numpy() for key, a in state.as_dict(packed=True).items()}
    return arrays, functional.dequantize_4bit(packed, state).float().numpy()


if __name__ == "__main__":
    found = {}
    for case in CASES:
        held, decoded = stored(case)
        found |= {f"{case}/{key}": a for key, a in held.items()} | {f"{case}/decoded": decoded}
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **found)
    print(f"{FILE}: {FILE.stat().st_size} bytes")
