"""Training from scratch on a text: BitNet b1.58, or the same transformer of floats.

Everything that decides a run is a `Run`; the step number says which rows a batch has (Grain) and
where the schedules are, so that what is kept of a killed run (parameters, optimizer state and
step) is all it takes to go on to the same bits.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

import jaxquant as jq
from jaxquant.core.paths import matches, replace_leaves
from jaxquant.durable.store import Finished
from jaxquant.evaluate import chunk
from jaxquant.training import stability
from jaxquant.training.schedules import decay_until_half, two_stage
from jaxquant.tuning.trainer import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.readers.registry import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.pipeline import LAYERS

# d_model, d_ff, layers, heads: about 1, 4 and 12 million weights in the layers.
SIZES = {"1m": (128, 344, 5, 4), "4m": (224, 608, 6, 7), "12m": (384, 1024, 7, 6)}
# Inputs of BitNet a4.8, where not int8 by the token.
A48 = {"attn/[qkv]/kernel": "int4,mean", "mlp/[gu]*/kernel": "int4,mean",
       "attn/o/kernel": "int8,top=0.5"}  # fmt: skip
HELD_OUT = 16  # rows kept apart to judge on
STATE = "state"  # what the last one is kept as


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides the result, but for the text.

    Attributes:
      size: one of `SIZES`.
      quantized: BitNet; False: floats.
      learning_rate: the peak; of BitNet's second stage two thirds of it, as in the authors' table.
      context, batch_size: tokens of a row, rows of a step.
      vocabulary: tokens of a byte-level BPE that is trained on the text.
      float_share: of the steps, the first ones, with floats: ternary from there on, the optimizer's
        state kept, is better than ternary throughout (Nielsen et al. 2025, arXiv:2502.11895).
      a48: share of the steps, the last ones, with the activations of BitNet a4.8 (`A48`); its
        authors' is 0.05 (arXiv:2411.04965). The optimizer's state stays.
    """

    size: str = "4m"
    quantized: bool = True
    steps: int = 1000
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    context: int = 256
    batch_size: int = 8
    vocabulary: int = 2048
    warmup: int = 50
    seed: int = 0
    float_share: float = 0.0
    a48: float = 0.0
    validate_every: int = 100
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        for name in ("steps", "context", "batch_size", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vocabulary < 256 + 1:
            raise ValueError(f"vocabulary must be above 256, all bytes, got {self.vocabulary}")
        for name in ("float_share", "a48"):
            share = getattr(self, name)
            if not 0 <= share <= 1 or (share and not self.quantized):
                raise ValueError(f"{name} is a share of the steps of BitNet, 0 to 1, got {share}")
        if self.float_share + self.a48 > 1:
            raise ValueError(f"float_share {self.float_share} and a48 {self.a48} exceed all steps")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def config(self, vocabulary: int) -> LlamaConfig:
        """The architecture: that of BitNet b1.58 2B4T, small."""
        d, ff, layers, heads = SIZES[self.size]
        return LlamaConfig(
            vocabulary, d, ff, layers, heads, heads, d // heads, tie_embeddings=True,
            sub_norms=True, activation="relu2", max_position=max(2048, self.context),
        )  # fmt: skip

    @property
    def ternary_from(self) -> int:
        """The step before which weights become latent; past the end for floats."""
        if not self.quantized:
            return self.steps + 1
        return min(round(self.float_share * self.steps), self.steps - 1)

    @property
    def a48_from(self) -> int:
        """The step before which activations become those of a4.8; past the end without."""
        if not self.a48:
            return self.steps + 1
        return min(round((1 - self.a48) * self.steps), self.steps - 1)

    @property
    def recipe(self) -> jq.Recipe:
        """The layers' matrices ternary; embedding and norms floats."""
        return jq.Recipe([(LAYERS, jq.bitnet()), ("*", jq.KEEP)])

    def optimizer(self) -> optax.GradientTransformation:
        """Adam; two stages and a decay that ends for BitNet, one line and a decay for floats."""
        second = self.learning_rate * (2 / 3 if self.quantized else 1)
        warmup = min(self.warmup, self.steps // 2)
        rate = two_stage(self.learning_rate, second, self.steps, warmup)
        decay = self.weight_decay
        if self.quantized:
            decay = decay_until_half(self.weight_decay, self.steps)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(decay, mask=_matrices),
            optax.scale_by_learning_rate(rate),
        )


class Texts(NamedTuple):
    """Rows [N, context] to train on and to judge on, and the tokenizer that made them."""

    training: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer


class Progress(NamedTuple):
    """After a step: the losses, the gradient's norm, the share of ternary codes that changed."""

    step: int
    loss: float
    gradient: float
    flips: float
    validation: float | None


def fingerprint(run: Run, data: Texts) -> dict[str, Any]:
    """Plain values that differ where results may."""
    digest = hashlib.sha256(data.training.tobytes() + data.held_out.tobytes()).hexdigest()
    return {**dataclasses.asdict(run), "text": digest, "jax": jax.__version__}


def texts(run: Run, text: str) -> Texts:
    """A tokenizer trained on the text, and its rows.

    Raises:
      ValueError: the text is shorter than the rows that are kept apart, and one batch.
    """
    tokenizer = trained_tokenizer(text, run.vocabulary)
    rows = chunk(tokenizer.encode(text), run.context)
    kept = min(HELD_OUT, len(rows) // 8)
    if kept < 1 or len(rows) - kept < run.batch_size:
        raise ValueError(
            f"the text has {len(rows)} rows of {run.context} tokens; a batch takes "
            f"{run.batch_size}, and an eighth is kept apart: give a longer text or a shorter row"
        )
    spread = np.linspace(0, len(rows) - 1, kept).astype(int)  # of all parts of the text
    return Texts(np.delete(rows, spread, axis=0), rows[spread], tokenizer)


def trained_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens."""
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return Tokenizer(backend)


class State(NamedTuple):
    """A run so far."""

    step: int
    params: Any
    slots: Any


SOME = np.zeros((1, 8), np.int32)  # tokens, to see shapes by


def begin(run: Run, config: LlamaConfig) -> State:
    """Parameters drawn by the seed, floats."""
    params = jax.jit(Llama(config).init)(jax.random.key(run.seed), SOME)["params"]
    return State(0, params, run.optimizer().init(params))


def turned(run: Run, config: LlamaConfig, state: State, steps: range) -> State:
    """The state with the changes of form before some steps; its numbers stay, the optimizer's too.

    So what is kept of a run is of one form, the start's.
    """
    params = state.params
    if run.ternary_from in steps:
        params = jq.latent(params, run.recipe, jq.sites(_apply(config), params, SOME))
    if run.a48_from in steps:
        params = _with_a48(params)
    if params is state.params:
        return state
    form = jax.tree.structure(jax.eval_shape(run.optimizer().init, params))
    return state._replace(
        params=params, slots=jax.tree.unflatten(form, jax.tree.leaves(state.slots))
    )


def _apply(config: LlamaConfig) -> Callable:
    model = Llama(config)
    return lambda params, tokens: model.apply({"params": params}, tokens)


def train(
    run: Run,
    data: Texts,
    kept: Finished | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[Any, float]:
    """The trained parameters, latent still, and their loss on the rows held out.

    Args:
      kept: where the run so far is kept, and gone on from: a `Folder` of its `fingerprint`.
    Raises:
      ValueError: the loss is no number.
    """
    config = run.config(data.tokenizer.vocab_size)
    state = begin(run, config)
    if kept is not None:
        state = _last(kept, state)
        state = turned(run, config, state, range(state.step))
    step, judge = _step(run, config), jax.jit(partial(_loss, config))
    rows = _rows(run, data.training)
    parts = max(1, len(data.held_out) // 8)
    judged = [jnp.asarray(r) for r in np.array_split(data.held_out, parts)]
    held_out = lambda: float(np.mean([judge(state.params, some) for some in judged]))
    while state.step < run.steps:
        state = turned(run, config, state, range(state.step, state.step + 1))
        batch = jnp.asarray(rows[state.step])
        params, slots, loss, norm, flips = step(state.params, state.slots, batch)
        state = State(state.step + 1, params, slots)
        if not np.isfinite(loss):
            raise ValueError(
                f"step {state.step}: the loss is {float(loss)}; lower the learning rate "
                f"({run.learning_rate}) or lengthen the warm-up ({run.warmup} steps)"
            )
        last, seen = state.step == run.steps, None
        if last or state.step % run.validate_every == 0:
            seen = held_out()
        if kept is not None and (last or state.step % run.save_every == 0):
            kept[STATE] = _arrays(state)
        if progress is not None:
            progress(Progress(state.step, float(loss), float(norm), float(flips), seen))
    return state.params, held_out()


def _matrices(params: Any) -> Any:
    """Which leaves decay: latent weights and the embedding, not the gains of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: not jax.tree_util.keystr(path).endswith("['scale']"), params
    )


def _with_a48(params: Any) -> Any:
    leaves = dict(jq.path_leaves(params))
    for path, w in leaves.items():
        form = next((text for glob, text in A48.items() if matches(path, f"*{glob}")), None)
        if form is not None and isinstance(w, jq.QTensor):
            leaves[path] = dataclasses.replace(w, activations=jq.Activations.of(form))
    return replace_leaves(params, leaves)


def _rows(run: Run, rows: np.ndarray) -> grain.MapDataset:
    """Batches by step: rows in orders of their own, epoch by epoch."""
    return (
        grain.MapDataset.source(rows)
        .seed(run.seed)
        .shuffle()
        .repeat()
        .batch(run.batch_size, drop_remainder=True)
    )


def _loss(config: LlamaConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return next_token_loss(jq.quantized(_apply(config))(params, tokens), tokens)


def _step(run: Run, config: LlamaConfig) -> Callable:
    optimizer = run.optimizer()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, slots, tokens):
        before = stability.codes_of(params)
        loss, slope = jax.value_and_grad(partial(_loss, config))(params, tokens)
        updates, slots = optimizer.update(slope, slots, params)
        params = optax.apply_updates(params, updates)
        changed = list(stability.flips(before, stability.codes_of(params)).values())
        flips = jnp.mean(jnp.stack(changed)) if changed else jnp.zeros(())
        return params, slots, loss, optax.tree.norm(slope), flips

    return step


def _last(kept: Finished, start: State) -> State:
    """The last state that was kept, or the start."""
    if STATE not in kept:
        return start
    arrays = kept[STATE]
    leaves = [jnp.asarray(arrays[str(i)]) for i in range(len(jax.tree.leaves(start[1:])))]
    return State(int(arrays["step"]), *jax.tree.unflatten(jax.tree.structure(start[1:]), leaves))


def _arrays(state: State) -> dict[str, Any]:
    leaves = {str(i): a for i, a in enumerate(jax.tree.leaves(state[1:]))}
    return {"step": np.int64(state.step), **leaves}


def exported(run: Run, params: Any, data: Texts) -> Model:
    """The trained model: ternary weights packed, the rest as it is."""
    return Model(f"bitnet-{run.size}", run.config(data.tokenizer.vocab_size),
                 jq.freeze(params), data.tokenizer)  # fmt: skip
