"""The outliers of SmolLM2-135M on the first 512 tokens of WikiText-2's test text, beside others'.

Run: python -m tests.benchmarks.outliers TEXT   (without one: our own figures, on CPython's help
topics). The others': a float32 forward pass outside this project; 0.1 % is what it promises.
"""

import argparse
import time

import numpy as np

from jaxquant_models import load
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.outliers import outliers_of
from jaxquant_models.runs.sequences import token_sequences

CONTEXT = 512
FIRST = (1116, 446)  # the tokens that WikiText-2's test text begins with
Q, O, GATE, DOWN = (
    f"layers/{name}/kernel" for name in ("attn/{k,q,v}", "attn/o", "mlp/{gate,up}", "mlp/down")
)
# After a layer: max, median, token and channel (None: not said).
RESIDUAL = {
    1: (147.12, 0.8940, 33, 507),
    2: (751.34, 1.0310, 33, 507),
    3: (750.2, 1.21, 33, 507),
    8: (684.5, 1.70, 33, 507),
    9: (378.34, 1.7532, 33, 507),
    11: (24851.28, 1.7136, 0, 507),
    12: (24842, 1.72, 0, 507),
    26: (24716, 9.53, 0, 507),
    27: (24461.5, 11.41, 0, 507),
    28: (10292.2, 12.54, 0, 507),
    29: (4498.5, 15.54, 0, 507),
}
# Of a layer: max, median and channel of the inputs of q, o, gate, down; down without token 0.
INPUTS = {
    0: ((1.240, 0.0107, 471), (0.402, 0.0063), (1.407, 0.0496, 260), (7.65, 0.0197), 7.65),
    2: ((4.849, 0.0705, 507), (2.84, 0.0571), (1.205, 0.0581), (67.07, 0.0355, 90), 64.07),
    5: ((4.540, 0.0901, 507), (3.07, 0.0676), (1.769, 0.0744, 507), (6.21, 0.0550), 6.21),
    9: ((5.773, 0.0774, 247), (4.32, 0.0781), (2.486, 0.0735, 507), (66.34, 0.0624, 200), 53.08),
    10: ((6.036, 0.0751, 247), (3.99, 0.1009), (2.957, 0.0723, 507), (38.82, 0.0637, 222), 38.82),
    11: ((4.929, 0.0721, 247), (4.87, 0.1543), (2.581, 0.0727, 247), (3068.95, 0.0608, 1229), 9.35),
    12: ((11.630, 0.0782, 247), (3.34, 0.1134), (2.373, 0.0685, 247), (6.40, 0.0597), 6.40),
    20: ((8.389, 0.1278, 247), (5.20, 0.1433), (2.727, 0.0856, 247), (17.61, 0.1091), 17.61),
    24: ((6.599, 0.1446, 247), (9.08, 0.2121), (2.573, 0.1122, 199), (37.42, 0.1404), 37.42),
    27: ((6.691, 0.1501, 17), (6.83, 0.2809), (3.209, 0.1232), (105.95, 0.1818, 903), 63.40),
    28: ((5.998, 0.1575, 17), (8.86, 0.2462), (14.03, 0.1252, 507), (2347.12, 0.1838, 678), 60.56),
    29: ((7.610, 0.1664, 17), (10.33, 0.4166), (31.61, 0.1345, 507), (478.04, 0.2650, 999), 85.54),
}
# More entries: site, layer, token, channel, value.
ENTRIES = (
    ("residual", 2, 0, 507, 669.55),
    ("residual", 2, 39, 507, 560.21),
    ("residual", 2, 53, 507, 497.70),
    ("residual", 11, 0, 247, 1818.2),
    ("residual", 11, 0, 14, 896.9),
    ("residual", 11, 0, 100, -819.5),
    (DOWN, 2, 33, 430, -64.07),
    (DOWN, 11, 0, 1487, 1093.4),
)


class Differences:
    """Prints ours beside theirs, which are rounded to the digits that they are written with."""

    def __init__(self):
        self.relative, self.beyond = [], []

    def add(self, what, ours, theirs):
        apart = abs(ours - theirs)
        half = 0.5 * 10.0 ** -len(f"{theirs:.10g}".partition(".")[2])
        self.relative.append(apart / abs(theirs))
        self.beyond.append(max(apart - half, 0.0) / abs(theirs))
        wrong = "  differs" if self.beyond[-1] > 1e-3 else ""
        print(f"{what:44} {ours:12.6g} {theirs:12.6g} {self.relative[-1]:9.1e}{wrong}")


def compare(found):
    profiles = {(p.site, p.layer): p for p in (*found.hidden, *found.inputs)}
    out = Differences()
    for layer, (largest, median, token, channel) in RESIDUAL.items():
        p = profiles["residual", (layer,)]
        out.add(f"residual {layer}, max", p.max, largest)
        out.add(f"residual {layer}, median", p.median, median)
        place(f"residual {layer}", (token, channel), p.top[0][1:])
    for layer, (*sites, rest) in INPUTS.items():
        for site, (largest, median, *channel) in zip((Q, O, GATE, DOWN), sites, strict=True):
            p = profiles[site, (layer,)]
            out.add(f"{site} {layer}, max", p.max, largest)
            out.add(f"{site} {layer}, median", p.median, median)
            place(f"{site} {layer}", channel, p.top[0][2:] if channel else ())
        out.add(f"{site} {layer}, max w/o first", p.rest, rest)
    for site, layer, token, channel, value in ENTRIES:
        top = {e[1:]: e.value for e in profiles[site, (layer,)].top}
        out.add(f"{site} {layer} at {token}, {channel}", top.get((token, channel), np.nan), value)
    massive = sorted({m.layer for m in found.massive if m.channel == 507})
    place("massive after layers", range(11, 28), massive)
    print(
        f"{len(out.relative)} figures, {sum(r < 1e-3 for r in out.relative)} within 0.1 %; beyond "
        f"what theirs are rounded to, {sum(b > 0 for b in out.beyond)} differ, by at most "
        f"{max(out.beyond):.1e}"
    )


def place(what, theirs, ours):
    if list(theirs) != list(ours):
        print(f"{what}: at {list(ours)}, theirs at {list(theirs)}  differs")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    args = parser.parse_args()
    model = load("smollm2-135m")
    tokens = token_sequences(model, read_text(args.text), CONTEXT, 1)[0]
    start = time.monotonic()
    found = outliers_of(model, tokens)
    print(f"{time.monotonic() - start:.1f} s")
    if tuple(tokens[:2]) == FIRST:
        compare(found)
    print("\n".join(found.findings()))


if __name__ == "__main__":
    main()
