"""Every method on one hard layer: bits, relative proxy loss, seconds, beside the peers' figures.

Run: python -m tests.benchmarks.layer_task [--seed S] [--json FILE] [NAME ...]. The layer is
`tests.support.layer`'s; the peers were measured on it with their own code (undamped H, all side
information counted). NAME is part of a row's name; without any, every row is run. The trellis of
16-bit states takes minutes.
"""

import argparse
import time

import jax
import jax.numpy as jnp

import jaxquant as jq
from tests.benchmarks.record import Record, add_option
from tests.support.layer import made_layer, relative_loss

PEERS = {  # bits -> the least loss of a peer of this class
    "gptq": {2: 0.0273, 3: 0.00598, 4: 0.00134},
    "quip_sharp": {2: 0.00304},
    "qtip": {2: 0.00215, 3: 0.00051, 4: 0.000129},
    "trellis": {},
    "aqlm": {2: 0.0081},
    "vptq": {2: 0.0162},
    "entropy_coded": {2: 0.00208, 3: 0.000513, 4: 0.000126},
}
ROWS = [
    *(("gptq", b, lambda b=b: jq.gptq(b, 128)) for b in (2, 3, 4)),
    ("quip_sharp", 2, lambda: jq.quip_sharp(passes=8)),
    *(("qtip", b, lambda b=b: jq.qtip(b, L=16, passes=1)) for b in (2, 3, 4)),
    *(("trellis", b, lambda b=b: jq.trellis(b, L=16, block=32)) for b in (1, 1.5, 2, 3, 4)),
    ("aqlm", 2, jq.aqlm),
    ("vptq", 2, jq.vptq),
    *(
        ("entropy_coded", b, lambda b=b: jq.entropy_coded(b, damping=1e-4))
        for b in (1, 1.5, 2, 3, 4)
    ),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    seed, names = args.seed, args.names
    rows = Record(args.json, "method", "bits per weight", "loss", "best peer")
    w, h = map(jnp.asarray, made_layer(seed))
    print("method             bits    loss       peer      ratio   seconds")
    for name, bits, method in ROWS:
        if names and not any(n in name for n in names):
            continue
        start = time.monotonic()
        q = jq.quantize_array(w, method(), h, key=jax.random.key(seed))
        loss = relative_loss(w, q.dequantize(), h)
        peer = PEERS[name].get(bits) if seed == 0 else None
        told = f"{peer:.6f}" if peer else ""
        rows.add(f"`{name}`", f"{q.bits_per_weight:.3f}", f"{loss:.6f}", told)
        beside = f"{peer:.6f}  {loss / peer:5.2f}" if peer else " " * 15
        took = time.monotonic() - start
        print(f"{name:16} {q.bits_per_weight:6.3f}  {loss:.6f}  {beside}  {took:6.1f}", flush=True)


if __name__ == "__main__":
    main()
