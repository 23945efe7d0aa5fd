"""Training from scratch on a text: BitNet b1.58, or the same transformer of floats.

A `PretrainingRequest` decides everything; the step number says which rows a batch has (Grain) and
where the schedules are, so that what is kept of a killed run (parameters, optimizer state and
step) is all it takes to go on to the same bits.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.core.paths import matches, replace_leaves
from jaxquant.durable.states import as_arrays, as_tree
from jaxquant.durable.store import Finished
from jaxquant.evaluate import chunk
from jaxquant.training import stability
from jaxquant.tuning.trainer import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.pretraining_request import PretrainingRequest
from jaxquant_models.runs.tokenizer_training import trained_tokenizer

# Inputs of BitNet a4.8, where not int8 by the token.
A48 = {"attn/[qkv]/kernel": "int4,mean", "mlp/[gu]*/kernel": "int4,mean",
       "attn/o/kernel": "int8,top=0.5"}  # fmt: skip
HELD_OUT = 16  # rows kept apart to judge on
STATE = "state"  # what the last one is kept as
EXAMPLE = np.zeros((1, 8), np.int32)  # tokens, to see shapes by


class TrainingData(NamedTuple):
    """Rows [N, context] to train on and to judge on, and the tokenizer that made them."""

    training: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer


class StepReport(NamedTuple):
    """What is told after a step.

    Attributes:
      loss: the loss on the step's batch.
      gradient: the norm of the gradient.
      flips: the share of ternary codes that changed.
      validation: the loss on the rows held out, if it was measured.
    """

    step: int
    loss: float
    gradient: float
    flips: float
    validation: float | None


class State(NamedTuple):
    """The state of a run after some steps."""

    step: int
    params: PyTree
    optimizer_state: PyTree


def training_data(request: PretrainingRequest, text: str) -> TrainingData:
    """A tokenizer trained on the text, and its rows.

    Raises:
      ValueError: the text is shorter than the rows that are kept apart, and one batch.
    """
    tokenizer = trained_tokenizer(text, request.vocabulary)
    rows = chunk(tokenizer.encode(text), request.context)
    kept = min(HELD_OUT, len(rows) // 8)
    if kept < 1 or len(rows) - kept < request.batch_size:
        raise ValueError(
            f"the text has {len(rows)} rows of {request.context} tokens; a batch takes "
            f"{request.batch_size}, and an eighth is kept apart: give a longer text or a shorter "
            f"row"
        )
    spread = np.linspace(0, len(rows) - 1, kept).astype(int)  # of all parts of the text
    return TrainingData(np.delete(rows, spread, axis=0), rows[spread], tokenizer)


def fingerprint(request: PretrainingRequest, data: TrainingData) -> dict[str, JsonValue]:
    """Plain values that differ wherever results may differ: the run's identity."""
    digest = hashlib.sha256(data.training.tobytes() + data.held_out.tobytes()).hexdigest()
    return {**dataclasses.asdict(request), "text": digest, "jax": jax.__version__}


def train(
    request: PretrainingRequest,
    data: TrainingData,
    progress: Callable[[StepReport], None] | None = None,
    finished: Finished | None = None,
) -> tuple[PyTree, float]:
    """Train from scratch.

    Args:
      finished: where the last state is kept, to go on from: a `Folder` of the `fingerprint`.
    Returns:
      The trained parameters, latent still, and their loss on the rows held out.
    Raises:
      ValueError: the loss is no number.
    """
    config = request.config(data.tokenizer.vocab_size)
    state = initial_state(request, config)
    if finished is not None:
        state = _last_state(finished, state)
        state = converted(request, config, state, range(state.step))
    step, judge = _step(request, config), _judge(config, data.held_out)
    rows = _rows(request, data.training)
    while state.step < request.steps:
        state = converted(request, config, state, range(state.step, state.step + 1))
        batch = jnp.asarray(rows[state.step])
        params, optimizer_state, loss, norm, flips = step(
            state.params, state.optimizer_state, batch
        )
        state = State(state.step + 1, params, optimizer_state)
        _check_loss(request, state.step, float(loss))
        last, validation = state.step == request.steps, None
        if last or state.step % request.validate_every == 0:
            validation = judge(state.params)
        if finished is not None and (last or state.step % request.save_every == 0):
            finished[STATE] = as_arrays(state)
        if progress is not None:
            progress(StepReport(state.step, float(loss), float(norm), float(flips), validation))
    return state.params, judge(state.params)


def packed_model(request: PretrainingRequest, params: PyTree, data: TrainingData) -> Model:
    """The trained model: ternary weights packed, the rest as it is."""
    return Model(f"bitnet-{request.size}", request.config(data.tokenizer.vocab_size),
                 jq.freeze(params), data.tokenizer)  # fmt: skip


def initial_state(request: PretrainingRequest, config: LlamaConfig) -> State:
    """The state before the first step: float parameters, drawn by the seed."""
    params = jax.jit(Llama(config).init)(jax.random.key(request.seed), EXAMPLE)["params"]
    return State(0, params, request.optimizer().init(params))


def converted(
    request: PretrainingRequest, config: LlamaConfig, state: State, steps: range
) -> State:
    """The state with the changes of form that come before some steps.

    Its numbers stay, the optimizer's too: what is kept of a run is of one form, the start's.
    """
    params = state.params
    if request.ternary_from in steps:
        params = jq.latent(params, request.recipe, jq.sites(_apply(config), params, EXAMPLE))
    if request.a48_from in steps:
        params = _with_a48(params)
    if params is state.params:
        return state
    form = jax.tree.structure(jax.eval_shape(request.optimizer().init, params))
    optimizer_state = jax.tree.unflatten(form, jax.tree.leaves(state.optimizer_state))
    return state._replace(params=params, optimizer_state=optimizer_state)


def _with_a48(params: PyTree) -> PyTree:
    leaves = dict(jq.path_leaves(params))
    for path, w in leaves.items():
        form = next((text for glob, text in A48.items() if matches(path, f"*{glob}")), None)
        if form is not None and isinstance(w, jq.QTensor):
            leaves[path] = dataclasses.replace(w, activations=jq.Activations.of(form))
    return replace_leaves(params, leaves)


def _rows(request: PretrainingRequest, rows: np.ndarray) -> grain.MapDataset:
    """Batches by step: rows in orders of their own, epoch by epoch."""
    return (
        grain.MapDataset.source(rows)
        .seed(request.seed)
        .shuffle()
        .repeat()
        .batch(request.batch_size, drop_remainder=True)
    )


def _apply(config: LlamaConfig) -> Callable[[PyTree, jax.Array], jax.Array]:
    model = Llama(config)
    return lambda params, tokens: model.apply({"params": params}, tokens)


def _loss(config: LlamaConfig, params: PyTree, tokens: jax.Array) -> jax.Array:
    return next_token_loss(jq.quantized(_apply(config))(params, tokens), tokens)


def _judge(config: LlamaConfig, held_out: np.ndarray) -> Callable[[PyTree], float]:
    """The mean loss of parameters on rows held out."""
    loss = jax.jit(partial(_loss, config))
    parts = max(1, len(held_out) // 8)
    judged = [jnp.asarray(rows) for rows in np.array_split(held_out, parts)]
    return lambda params: float(np.mean([loss(params, rows) for rows in judged]))


def _check_loss(request: PretrainingRequest, step: int, loss: float) -> None:
    if not np.isfinite(loss):
        raise ValueError(
            f"step {step}: the loss is {loss}; lower the learning rate "
            f"({request.learning_rate}) or lengthen the warm-up ({request.warmup} steps)"
        )


def _step(request: PretrainingRequest, config: LlamaConfig) -> Callable[..., tuple]:
    optimizer = request.optimizer()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, optimizer_state, tokens):
        before = stability.codes_of(params)
        loss, gradient = jax.value_and_grad(partial(_loss, config))(params, tokens)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        changed = list(stability.flips(before, stability.codes_of(params)).values())
        flips = jnp.mean(jnp.stack(changed)) if changed else jnp.zeros(())
        return params, optimizer_state, loss, optax.tree.norm(gradient), flips

    return step


def _last_state(finished: Finished, start: State) -> State:
    """The state that was kept last, or the start."""
    if STATE not in finished:
        return start
    state = as_tree(finished[STATE], start)
    return state._replace(step=int(state.step))
