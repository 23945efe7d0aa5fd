"""Rate and quality from 1 to 4 bits: every family on a hard layer, the best on SmolLM2-135M.

Run: python -m tests.benchmarks.rate_quality layer|model|heal|draw [--text TEXT] [--tokens N]
     [--rates 1,1.25] [--families NAME,NAME] [--steps N] [--learning-rate R] [--batch N] [--out DIR]
"layer" quantizes the layer of `tests.support.layer` by every family (minutes), "model" SmolLM2
(hours for all of it), "heal" trains what "model" left in DIR, "draw" prints the tables of what DIR
holds, says where more bits lost, and draws it. Results go to DIR/rate_quality.json, a point at a
time; a point that is there, of the same text, tokens, recipe and healing, is not run again, and a
killed run goes on where it stopped. On a GPU (JAX_PLATFORMS=cuda,cpu) healing takes minutes where
it takes hours.

The model is calibrated on the last N tokens of the text, healed on what lies between and scored on
its first 16 chunks of 512.
"""

import argparse
import dataclasses
import hashlib
import json
import pickle
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.core.paths import replace_leaves
from jaxquant.core.standin import is_standin
from jaxquant.durable.store import Folder
from jaxquant.evaluation import chunk, evaluate
from jaxquant.formats import entropy_coded
from jaxquant_models import load
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.healing import heal_model
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks import report
from tests.support.layer import made_layer, relative_loss

CHUNKS, CONTEXT, HELD_OUT = 16, 512, 8
LOW, WHOLE = (1.0, 1.25, 1.5, 1.75), (2, 3, 4)
# Bits above the average, at 2 bits or more, that kinds of weights get "by kind": half the logarithm
# of the KL that each, rounded alone to 2 bits, causes per weight.
SHARES = {"q": -0.92, "k": 0.0, "v": 0.9, "o": 0.06, "gate": 0.0, "up": 0.14, "down": 0.1}


def by_kind(rate):
    """A recipe of this average."""
    bits = lambda kind: rate + SHARES[kind] * min(1, rate / 2)
    method = lambda kind: jq.entropy_coded(bits(kind), two_sided=True)
    return jq.Recipe([*((f"layers/*/{kind}/kernel", method(kind)) for kind in SHARES),
                      ("*", jq.KEEP)])  # fmt: skip


# What these kinds were found to deserve above what the statistics say (`jq.ptq.shares`).
MORE = {"v": 0.38, "o": 0.37, "down": -0.19}
LEAST = 0.25  # bits
GRAIN = 4  # parts of a bit: rates of few kinds are few programs to compile


def by_matrix(rate, params, stats):
    """A recipe of at most this average for a tree whose layers are apart."""
    found = jq.ptq.shares(params, stats, [LAYER_MATRICES])
    rows, sizes = (
        {p: f(w) for p, w in jq.core.path_leaves(params) if p in found} for f in (len, np.size)
    )
    more = {p: bits + MORE.get(p.split("/")[-2], 0) for p, bits in found.items()}
    share = {p: round(GRAIN * bits * min(1, rate / 2)) / GRAIN for p, bits in more.items()}
    rates = lambda base: {p: max(LEAST, base + bits) for p, bits in share.items()}

    def average(base):
        words = {p: jq.formats.EntropyCoded(bits=b).words(rows[p]) for p, b in rates(base).items()}
        used = sum(entropy_coded.WORD * words[p] * sizes[p] / rows[p] for p in words)
        return used / sum(sizes.values())

    base = max(b for b in (rate + i / 256 for i in range(-256, 256)) if average(b) <= rate)
    method = lambda bits: jq.entropy_coded(bits, two_sided=True)
    return jq.Recipe([*((p, method(b)) for p, b in rates(base).items()), ("*", jq.KEEP)])


FAMILIES = {
    "entropy_coded": (LOW + WHOLE, lambda b: jq.entropy_coded(b, two_sided=True)),
    "entropy_coded by kind": (LOW + WHOLE, by_kind),
    "entropy_coded by matrix": (LOW + WHOLE, by_matrix),
    "trellis": (LOW + WHOLE, lambda b: jq.trellis(b, L=12)),
    "qtip": ((1, *WHOLE), lambda b: jq.qtip(b, L=12)),
    "qtip two-sided": ((2, 3), lambda b: jq.qtip(b, L=12, two_sided=True)),
    "quip_sharp": (WHOLE, jq.quip_sharp),
    "aqlm": ((1, 2), lambda b: jq.aqlm(codebooks=b)),
    "vptq": ((1, 2), lambda b: jq.vptq(residual_bits=8 * b - 8)),
    "gptq": (WHOLE, lambda b: jq.gptq(b, 64)),
    "ternary": ((2,), lambda b: jq.ternary(64, feedback=True)),
    "normal_float": (WHOLE, lambda b: jq.normal_float(b, 64, scale_dtype="float16", feedback=True)),
    "mxfp4": ((4,), lambda b: jq.mxfp4(feedback=True)),
    "nvfp4": ((4,), lambda b: jq.nvfp4(feedback=True)),
}
# On a layer there are no loss gradients, and H is no estimate.
NOT_ON_A_LAYER = ("qtip two-sided", "entropy_coded by kind", "entropy_coded by matrix")
ON_A_LAYER = {"entropy_coded": lambda b: jq.entropy_coded(b, damping=1e-4)}


class Results:
    """Points by name, in a file; of each, the run that it came from."""

    def __init__(self, out):
        self.path = Path(out) / "rate_quality.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.points = json.loads(self.path.read_text()) if self.path.exists() else {}

    def has(self, name, run):
        return name in self.points and self.points[name]["run"] == run

    def add(self, name, run, **point):
        self.points[name] = {**point, "run": run}
        aside = self.path.with_suffix(".aside")
        aside.write_text(json.dumps(self.points, indent=1) + "\n")
        aside.replace(self.path)
        print(name, {k: round(v, 5) if isinstance(v, float) else v for k, v in point.items()},
              flush=True)  # fmt: skip


def points(args):
    for family, (rates, method) in FAMILIES.items():
        for rate in rates:
            wanted = not args.families or family in args.families
            if wanted and (not args.rates or rate in args.rates):
                yield family, rate, method


def layer(args, results):
    w, h = map(jnp.asarray, made_layer(0))
    for family, rate, method in points(args):
        name, run = f"layer {family} {rate:g}", {}
        if results.has(name, run) or family in NOT_ON_A_LAYER:
            continue
        q = jq.quantize_array(w, ON_A_LAYER.get(family, method)(rate), h, key=jax.random.key(0))
        loss = relative_loss(w, q.dequantize(), h)
        results.add(name, run, family=family, rate=rate, bits=q.bits_per_weight, loss=loss)


class Text:
    """The model and a text's sequences: scored on, healed on, held out, calibrated on."""

    def __init__(self, args):
        self.source = load("smollm2-135m")
        text = read_text(args.text)
        ids = self.source.tokenizer.encode(text)
        count = args.tokens // CONTEXT
        sequences = chunk(ids, CONTEXT)
        self.scored, between = sequences[:CHUNKS], sequences[CHUNKS : len(sequences) - count - 1]
        self.fit, self.held_out = between[:-HELD_OUT], between[-HELD_OUT:]
        self.calibration = chunk(ids[-count * CONTEXT :], CONTEXT)
        self.run = {"text": digest(text), "tokens": args.tokens}

    def perplexity(self, params):
        fn = jq.quantized(self.source.apply_fn)
        with jax.default_matmul_precision("highest"):
            return evaluate(fn, jq.dequantize(jq.tuning.decoded(params)), self.scored).perplexity


def model(args, results):
    data = Text(args)
    out, source, whole = results.path.parent, data.source, data.run
    if not results.has("model float", whole):
        found = data.perplexity(source.params)
        results.add("model float", whole, family="float", perplexity=found)
    stats = None
    for family, rate, method in points(args):
        stats = stats or statistics(source, data.calibration, whole, out)
        tree, known = source, stats
        if method is by_matrix:
            tree = dataclasses.replace(source, params=jq.ptq.unstack(source.params, "layers"))
            known = jq.ptq.unstack_stats(stats, "layers")
            recipe = by_matrix(rate, tree.params, known)
        else:
            chosen = method(rate)
            recipe = chosen if isinstance(chosen, jq.Recipe) else recipe_of(chosen)
        run = whole | {"recipe": digest(json.dumps(recipe.to_json())), "jax": jax.__version__}
        name, start = f"model {family} {rate:g}", time.monotonic()
        folder = Folder(out / f"{name}.partial", run)
        if not (results.has(name, run) and kept(out, name, run)):
            fresh = not len(folder)
            params = quantize_model(tree, recipe, known, finished=folder).params
            took = time.monotonic() - start if fresh else None
            keep(out, name, run, params)
            results.add(name, run, family=family, rate=rate, bits=jq.bits_per_weight(params),
                        perplexity=data.perplexity(params), seconds=took)  # fmt: skip
        folder.remove()
        jax.clear_caches()  # a program for every shape and rate: there are only so many memory maps


def heal(args, results):
    data, out = Text(args), results.path.parent
    healing = jq.tuning.Healing(args.steps, args.learning_rate, args.batch)
    tell = lambda done: done.step % 10 or print(done, flush=True)
    for family, rate, _ in points(args):
        name = f"model {family} {rate:g}"
        packed = kept(out, name, data.run)
        if not packed:
            print(f"{name}: nothing to heal in {out}; run model first, on this text and tokens")
            continue
        run = packed["run"] | dataclasses.asdict(healing)
        folder, start = Folder(out / f"{name}.healing", run), time.monotonic()
        if not results.has(f"{name} healed", run):
            fresh, params = not len(folder), data.source.params
            if any(path.startswith("layers/0/") for path in packed["leaves"]):
                params = jq.ptq.unstack(params, "layers")
            result = replace_leaves(params, packed["leaves"])
            result = dataclasses.replace(data.source, params=result)
            params = heal_model(
                data.source,
                result,
                data.fit,
                data.held_out,
                healing,
                progress=tell,
                finished=folder,
            ).params
            took = time.monotonic() - start if fresh else None
            results.add(f"{name} healed", run, family=f"{family}, healed", rate=rate,
                        bits=jq.bits_per_weight(params), perplexity=data.perplexity(params),
                        seconds=took, device=jax.devices()[0].device_kind)  # fmt: skip
        folder.remove()
        jax.clear_caches()


def kept(out, name, run):
    """What `keep` has written of a run that agrees with this one, or {}."""
    path = out / f"{name}.pickle"
    found = pickle.loads(path.read_bytes()) if path.exists() else {"run": {}}
    return found if run.items() <= found["run"].items() else {}


def keep(out, name, run, params):
    """A point's packed weights in a file."""
    leaves = {
        p: jax.tree.map(np.asarray, w) for p, w in jq.core.path_leaves(params) if is_standin(w)
    }
    path = out / f"{name}.pickle"
    aside = path.with_suffix(".aside")
    aside.write_bytes(pickle.dumps({"run": run, "leaves": leaves}))
    aside.replace(path)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def statistics(source, calibration, run, out):
    """Statistics on the calibration sequences, kept in a file of their run's name."""
    path = out / f"statistics-{run['text']}-{run['tokens']}.pickle"
    if not path.exists():
        stats = calibrate_model(source, calibration, output=[LAYER_MATRICES])
        aside = path.with_suffix(".aside")
        aside.write_bytes(pickle.dumps(stats))
        aside.replace(path)
    return pickle.loads(path.read_bytes())


def draw(args, results):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    kinds = {"layer": "loss", "model": "perplexity"}
    for axis in axes:
        axis.set_prop_cycle(color=(*plt.get_cmap("tab20").colors[::2], "black"))
    for axis, (kind, measure) in zip(axes, kinds.items(), strict=True):
        found = [p for n, p in results.points.items() if n.startswith(f"{kind} ")]
        for family in dict.fromkeys(p["family"] for p in found if p["family"] != "float"):
            curve = sorted((p["bits"], p[measure]) for p in found if p["family"] == family)
            axis.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=family)
        axis.set(xlabel="bits per weight, everything counted", ylabel=measure, yscale="log")
        axis.set_title({"layer": "one hard layer", "model": "SmolLM2-135M, WikiText-2"}[kind])
        table(kind, measure, found)
    curve = report.load(report.BOUND)["curve"]
    drawn = [at for at in zip(curve["bits"], curve["loss"], strict=True) if 1 <= at[0] <= 4]
    axes[0].plot(*zip(*drawn, strict=True), color="gray", linewidth=0.7, label="bound (Gaussian)")
    floats = results.points.get("model float")
    if floats:
        axes[1].axhline(floats["perplexity"], color="gray", linewidth=0.7, label="float32")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(results.path.with_suffix(".svg"), metadata={"Date": None})
    print(f"drawn: {results.path.with_suffix('.svg')}")


def table(kind, measure, found):
    """The curve as a table; the best at each rate; and where more bits lost."""
    rates = sorted({p["rate"] for p in found if "rate" in p})
    families = list(dict.fromkeys(p["family"] for p in found if "rate" in p))
    print(f"\n| {kind}: {measure} | " + " | ".join(f"{r:g}" for r in rates) + " |")
    print("|---" * (len(rates) + 1) + "|")
    for family in families:
        row = {p["rate"]: p for p in found if p["family"] == family}
        cells = [f"{row[r][measure]:.5g} ({row[r]['bits']:.3f})" if r in row else "" for r in rates]
        print(f"| {family} | " + " | ".join(cells) + " |")
        values = [row[r][measure] for r in sorted(row)]
        if values != sorted(values, reverse=True):
            print(f"MORE BITS LOST: {family}")
    for rate in rates:
        best = min((p for p in found if p.get("rate") == rate), key=lambda p: p[measure])
        print(f"best at {rate:g} bits: {best['family']}, {best[measure]:.5g}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["layer", "model", "heal", "draw"])
    parser.add_argument("--text", default=BUILTIN)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    split = lambda kind: lambda text: [kind(t) for t in text.split(",")]
    parser.add_argument("--rates", type=split(float), default=())
    parser.add_argument("--families", type=split(str), default=())
    parser.add_argument("--out", default="build/rate_quality")
    args = parser.parse_args()
    {"layer": layer, "model": model, "heal": heal, "draw": draw}[args.what](args, Results(args.out))


if __name__ == "__main__":
    main()
