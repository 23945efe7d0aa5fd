"""Lower bounds on the loss of the hard layer from 1 to 4 bits, beside which its tables put losses.

Run: python -m tests.benchmarks.layer_bound [--json FILE]. The layer is `tests.support.layer`'s, the
bounds are those of `jaxquant.theory.shannon_bounds`. FILE also gets the Gaussian bound on a fine
grid of rates, its "curve", from which `report.py` takes the gap in bits of every entry.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from jaxquant.theory.shannon_bounds import LayerBound, layer_bound
from jaxquant.theory.water_filling import component_energies
from tests.benchmarks.record import Record, add_option
from tests.support.layer import made_layer

RATES = (1, 1.25, 1.5, 1.75, 2, 3, 4)
GRID = np.arange(0, 6.01, 1 / 8)


def one_scale(w, h):
    """The bound for a Gaussian matrix of this mean square, as full rotations make any matrix."""
    w, (k, n) = np.asarray(w, np.float64), w.shape
    energies = np.repeat(component_energies(h, np.full(k, np.mean(w**2)))[::-1], n)
    return LayerBound(energies, float(np.sum(w * (h @ w))), gaussian=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_option(parser)
    args = parser.parse_args()
    w, h = made_layer()
    known = layer_bound(w, h)
    bounds = {
        "Gaussian, row and column scales known": known,
        "Student-t, row and column scales known": layer_bound(w, h, degrees=None),
        "Gaussian, one scale, as after rotations": one_scale(w, h),
    }
    rows = Record(args.json, "source, bits per weight", *(f"{rate:g}" for rate in RATES))
    for name, bound in bounds.items():
        cells = [f"{bound.loss(rate):.4g}" for rate in RATES]
        rows.add(name, *cells)
        print(f"{name:40}", *cells)
    if args.json:
        file = Path(args.json)
        losses = [float(f"{known.loss(rate):.6g}") for rate in GRID]
        found = json.loads(file.read_text()) | {"curve": {"bits": GRID.tolist(), "loss": losses}}
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
