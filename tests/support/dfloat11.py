"""A minimal encoder of DFloat11, written from the layout; its bytes are those of dfloat11 0.5.0.

`python -m tests.benchmarks.dfloat11 --python VENV/bin/python` compares them.
"""

import heapq
import itertools
import re

import ml_dtypes
import numpy as np

from tests.support.tiny_llama import write_folder

LAYER = [
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
]
PATTERNS = {r"model\.embed_tokens": [], r"model\.layers\.\d+": LAYER, "lm_head": []}


def huffman(counts):
    """Symbol -> code as a string of 0 and 1; symbol None, of count 1, ends a stream.

    Of trees of equal count, the one whose first symbol is smallest is taken first, None before all.
    """
    heap = [(n, -1 if s is None else s, {s: ""}) for s, n in [*counts.items(), (None, 1)]]
    heapq.heapify(heap)
    while len(heap) > 1:
        (n, s, light), (m, _, heavy) = heapq.heappop(heap), heapq.heappop(heap)
        joined = {x: "0" + code for x, code in light.items()}
        joined |= {x: "1" + code for x, code in heavy.items()}
        heapq.heappush(heap, (n + m, s, joined))
    return heap[0][2]


def limited(counts):
    """The code of `huffman`; the rarest symbols count as one until no code exceeds 32 bits."""
    rare = sorted(counts, key=counts.get)
    for k in itertools.chain([0], range(2, len(counts))):
        code = huffman(counts | dict.fromkeys(rare[:k], 1))
        if max(map(len, code.values())) <= 32:
            return code
    raise AssertionError("a code of more than 32 bits is left")


def tables(code):
    """The luts of a code: tables of 8 bits, then the lengths."""
    code = {s: c for s, c in code.items() if s is not None}
    prefixes = {c[: 8 * i] for c in code.values() for i in range((len(c) + 7) // 8)}
    rows = sorted(prefixes, key=lambda p: (len(p), p))
    assert len(rows) <= 17
    luts = np.zeros((len(rows) + 1, 256), np.uint8)
    value = next((s for s in range(240) if s not in code), 0)  # the package fails for want of one
    for row, prefix in enumerate(rows):
        entries = {}
        for s, c in code.items():
            if c.startswith(prefix) and len(c) > len(prefix):
                rest = c[len(prefix) :]
                deeper = len(rest) > 8
                pointer = 256 - rows.index(c[: len(prefix) + 8]) if deeper else s
                entries[int(rest[:8].ljust(8, "0"), 2)] = pointer
        for i in range(256):
            value = luts[row, i] = entries.get(i, value)
    for s, c in code.items():
        luts[-1, s] = len(c)
    return luts


def encode(weights, threads=512, counts=None):
    """The arrays of a block by name.

    weights: arrays of uint16, the bits of bfloat16, which are joined; counts: of the exponents,
    where they are not to be counted.
    """
    words = np.concatenate([np.ravel(w) for w in weights]).astype(np.uint16)
    exponents = words >> 7 & 255
    seen = dict(zip(*map(np.ndarray.tolist, np.unique_counts(exponents)), strict=True))
    code = limited(counts or seen)
    codes = [code[e] for e in exponents.tolist()]
    ends = np.cumsum([len(c) for c in codes])
    starts, total = np.append(0, ends[:-1]), int(ends[-1])
    bits = "".join(codes)
    whole = -(-total // 8)
    bits = (bits + code[None]).ljust(8 * whole, "0")[: 8 * whole]
    blocks = -(-whole // (8 * threads))
    if total % 8:  # the end of the stream is marked, and starts where it does
        starts = np.append(starts, total)
    first = lambda unit, i: np.searchsorted(starts, unit * i)
    gaps = np.zeros(threads * blocks, np.int64)
    used = np.arange(starts[-1] // 64 + 1)
    gaps[used] = starts[first(64, used)] - 64 * used
    held = np.arange(starts[-1] // (64 * threads) + 1)
    positions = np.append(first(64 * threads, held), words.size)
    return {
        "luts": tables(code),
        "encoded_exponent": np.packbits(np.array([*bits], np.uint8)),
        "sign_mantissa": (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8),
        "output_positions": positions.astype(np.uint32).view(np.uint8),
        "gaps": np.packbits(gaps[:, None] >> np.arange(5)[::-1] & 1),
        "split_positions": np.cumsum([np.size(w) for w in weights])[:-1].astype(np.int64),
    }


def module_arrays(tensors, patterns=None, threads=512):
    """The tensors of a compressed model by name; what no pattern matches is left as it is."""
    out = dict(tensors)
    for pattern, parts in (PATTERNS if patterns is None else patterns).items():
        below = "|".join(map(re.escape, parts))
        found = re.compile(rf"({pattern}){rf'[.](?:{below})' if parts else ''}[.]weight")
        for module in dict.fromkeys(m[1] for n in tensors if (m := found.fullmatch(n))):
            names = [f"{module}.{part}.weight" for part in parts] or [f"{module}.weight"]
            arrays = encode([out.pop(name).view(np.uint16) for name in names], threads)
            out |= {f"{module}.{field}": value for field, value in arrays.items()}
    return out


def compressed_folder(folder, hf, tensors, threads=512, patterns=None):
    """A folder as the package writes it, of float arrays that are rounded to bfloat16; these."""
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    config = {"version": "0.5.0", "threads_per_block": [threads], "bytes_per_thread": 8}
    config |= {"pattern_dict": PATTERNS if patterns is None else patterns}
    arrays = module_arrays(rounded, patterns, threads)
    write_folder(folder, hf | {"dfloat11_config": config}, arrays)
    return rounded
