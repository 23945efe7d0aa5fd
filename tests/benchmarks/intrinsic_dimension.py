"""The intrinsic dimension of hidden states: under quantization, and while a small model overfits.

Run: python -m tests.benchmarks.intrinsic_dimension [TEXT] --part layers|training

layers: TwoNN and Levina-Bickel (k = 64) after every layer of SmolLM2-135M, with float weights and
with weights rounded to the nearest of 8, 4, 3 and 2 bits in groups of 64, on 2,000 of the tokens of
the first 4 chunks of 512 of TEXT (else of CPython's help topics); and of 3,000 word embeddings of
MiniLM, one scale per row. Rounding points is noise at the smallest scale: it raises TwoNN, which
looks at two neighbors, and lowers the estimate at 64. Does rounding weights do the same?

training: a Llama of 1 million weights is trained on rows of 128 tokens of CPython's help topics,
from scratch or after 300 steps on docstrings of the standard library. At some steps it prints the
losses on training and held-out rows, and the mean local TwoNN (64 neighbors, 2,000 tokens) of the
last layer's normalized states on 24 of either. Is it true that the dimension falls at first, and
rises when the model overfits (arXiv:2506.01034)?
"""

import argparse
import dataclasses
import functools
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from jaxquant.evaluation import chunk
from jaxquant.theory.dimension import levina_bickel, two_nn
from jaxquant.theory.layer_dimension import DimensionHistory, dimension_by_layer, drawn_points
from jaxquant.theory.neighbors import neighbor_distances
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models import load
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.hidden_states import hidden_states
from jaxquant_models.architectures.llama import Llama, stacked
from jaxquant_models.readers.encoder import load_encoder
from jaxquant_models.readers.text import BUILTIN, docstrings, read_text
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import token_sequences
from jaxquant_models.runs.tokenizer_training import trained_tokenizer
from tests.benchmarks.record import Record, add_option

KEY = jax.random.key(0)
BITS = (None, 8, 4, 3, 2)
CHUNKS, CONTEXT, POINTS, GROUP = 4, 512, 2000, 64
NAMES = ("TwoNN", "MLE")


def rounded(weights, bits):
    """Rows rounded to signed integers whose largest magnitude is that of the row."""
    steps = np.abs(weights).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(weights / steps) * steps


def embeddings(record):
    """MiniLM's word embeddings, 3,000 rows of them drawn at random."""
    weights = np.asarray(load_encoder("minilm").params["embed"]["embedding"], np.float64)
    weights, _ = drawn_points(weights, 3000, KEY)
    found = {}
    for bits in (None, 8, 6, 4, 3, 2):
        x = weights if bits is None else rounded(weights, bits)
        known = neighbor_distances(x, 64)
        found[bits] = (two_nn(known).value, levina_bickel(known, 64).value)
        print(
            f"MiniLM's embeddings, {bits or 'float'}: {found[bits]}, {known.duplicates} equal rows"
        )
    record.add("MiniLM's embeddings", *(f"{found[b][i]:.2f}" for i in range(2) for b in BITS))


def layers(args):
    model = load("smollm2-135m")
    texts = jnp.asarray(token_sequences(model, read_text(args.text), CONTEXT, CHUNKS))
    states = jax.jit(hidden_states(model.config, model.dtype))
    found = {}
    for bits in BITS:
        clock = time.monotonic()
        recipe = None if bits is None else recipe_of(jq.rtn(bits, GROUP))
        made = model if recipe is None else quantize_model(model, recipe, None)
        params = stacked(jq.dequantize(made.params))
        hidden = np.stack([np.asarray(states(params, t).residual) for t in texts], axis=1)
        found[bits] = dimension_by_layer(hidden, KEY, points=POINTS)
        shown = "; ".join(f"{n} {found[bits].values(n).round(2).tolist()}" for n in NAMES)
        print(f"{bits or 'float'}: {time.monotonic() - clock:.0f} s; {shown}", flush=True)
    names = [f"{n}, {f'{b} bits' if b else 'float'}" for n in NAMES for b in BITS]
    record = Record(args.json, "layer", *names)
    for i in range(model.config.n_layers):
        record.add(str(i), *(f"{found[b].values(n)[i]:.2f}" for n in NAMES for b in BITS))
    for name in NAMES:
        ratios = [found[b].values(name) / found[None].values(name) for b in BITS[1:]]
        medians = [f"{np.median(r):.3f} ({r.min():.3f}-{r.max():.3f})" for r in ratios]
        print(f"{name} relative to float, median over layers: {', '.join(medians)}")
    embeddings(record)


ROW, SHOWN, VOCABULARY, BATCH = 128, 24, 1024, 8
STEPS = (0, 5, 10, 20, 40, 80, 160)
PRETRAINING = 300


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model is trained; `rows` is the number of training rows."""

    rows: int
    rate: float = 1e-3
    decay: float = 0.0
    scratch: bool = False

    def __str__(self):
        start = "from scratch" if self.scratch else "fine-tuned"
        return f"{start}, {self.rows} rows, rate {self.rate:g}, weight decay {self.decay:g}"


SETTINGS = (
    Setting(SHOWN, 2e-3, scratch=True),
    Setting(1000, 2e-3, scratch=True),
    Setting(SHOWN),
    Setting(SHOWN, 1e-4),
    Setting(SHOWN, decay=1.0),
    Setting(1000),
)


class Training:
    """A tiny Llama, its texts and its training."""

    def __init__(self):
        self.topics = "\n\n".join(topics.values())
        self.other = docstrings().removeprefix(self.topics)
        tokenizer = trained_tokenizer(self.other + self.topics, VOCABULARY)
        self.config = LlamaConfig(VOCABULARY, 128, 344, 4, 4, 4, 32, tie_embeddings=True)
        self.model = Llama(self.config)
        self.pretraining = chunk(tokenizer.encode(self.other), ROW)
        rows = np.random.default_rng(0).permutation(chunk(tokenizer.encode(self.topics), ROW))
        self.held_out, self.rows = rows[:SHOWN], rows[SHOWN:]
        self.judge = jax.jit(self.loss)

    def loss(self, params, tokens):
        return next_token_loss(self.model.apply({"params": params}, tokens), tokens)

    def start(self):
        example = np.zeros((1, 8), np.int32)
        return jax.jit(self.model.init)(jax.random.key(0), example)["params"]

    @functools.cached_property
    def pretrained(self):
        return self.run(self.start(), self.pretraining, Setting(0, 2e-3, 0.1), PRETRAINING)

    def run(self, params, rows, how, steps, seen=lambda step, params: None):
        """The parameters after some steps, of which `seen` sees those before each step."""
        rate = optax.linear_schedule(0.0, how.rate, 10)
        descent = optax.adamw(rate, b2=0.95, weight_decay=how.decay)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), descent)

        @jax.jit
        def update(params, state, tokens):
            slope = jax.grad(self.loss)(params, tokens)
            change, state = optimizer.update(slope, state, params)
            return optax.apply_updates(params, change), state

        state, random = optimizer.init(params), np.random.default_rng(0)
        epochs = -(-steps * BATCH // len(rows))
        order = np.concatenate([random.permutation(len(rows)) for _ in range(epochs)])
        for step in range(steps):
            seen(step, params)
            batch = rows[order[step * BATCH : (step + 1) * BATCH]]
            params, state = update(params, state, batch)
        seen(steps, params)
        return params

    def history(self, rows):
        """A history of the dimension of the last layer's normalized states on some rows."""
        of = jax.vmap(hidden_states(self.config, first_query=1), (None, 0))

        @jax.jit
        def states(params):
            h = of(params, rows).residual[:, -1]
            h *= jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.config.norm_eps)
            return h * params["norm"]["scale"]

        return DimensionHistory(states, KEY, points=POINTS)


def training(args):
    lab = Training()
    columns = ("loss, training", "loss, held out", "dimension, training", "dimension, held out")
    record = Record(args.json, "setting", *columns)
    print(f"{len(lab.rows)} rows of topics, {len(lab.pretraining)} of docstrings; steps {STEPS}")
    for how in SETTINGS:
        clock, rows = time.monotonic(), lab.rows[: how.rows]
        texts = (rows[:SHOWN], lab.held_out)
        histories, losses = [lab.history(jnp.asarray(t)) for t in texts], ([], [])

        def seen(step, params, texts=texts, histories=histories, losses=losses):
            if step not in STEPS:
                return
            for text, history, loss in zip(texts, histories, losses, strict=True):
                history.measure(step, params)
                loss.append(float(lab.judge(params, text)))

        start = lab.start() if how.scratch else lab.pretrained
        lab.run(start, rows, how, STEPS[-1], seen)
        cells = [" ".join(f"{v:.2f}" for v in series) for series in
                 (*losses, *(h.values for h in histories))]  # fmt: skip
        record.add(str(how), *cells)
        print(f"{how} ({time.monotonic() - clock:.0f} s)")
        for name, cell in zip(columns, cells, strict=True):
            print(f"  {name:20} {cell}", flush=True)


PARTS = {"layers": layers, "training": training}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--part", choices=PARTS, required=True)
    add_option(parser)
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
