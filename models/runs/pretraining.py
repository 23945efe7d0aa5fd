"""Training from scratch on a text: BitNet b1.58, or the same transformer in floating point.

A `PretrainingRequest` determines everything. The step number determines the rows of a batch (Grain)
and the position in the schedules, so the saved state of a killed run (parameters, optimizer state
and step) suffices to continue bit-identically.
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
from jaxquant.evaluation import chunk
from jaxquant.training import stability
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.pretraining_request import PretrainingRequest
from jaxquant_models.runs.tokenizer_training import trained_tokenizer

# Activation formats of BitNet a4.8 for the inputs that are not int8 per token.
A48 = {"attn/[qkv]/kernel": "int4,mean", "mlp/[gu]*/kernel": "int4,mean",
       "attn/o/kernel": "int8,top=0.5"}  # fmt: skip
HELD_OUT = 16  # maximum number of rows held out for validation
STATE = "state"  # key under which the last state is saved
EXAMPLE = np.zeros((1, 8), np.int32)  # tokens with which shapes are determined


class TrainingData(NamedTuple):
    """Rows of tokens [N, context], and the tokenizer that produced them.

    Attributes:
      training: the rows to train on.
      held_out: the rows for validation.
      tokenizer: the tokenizer.
    """

    training: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer


class StepReport(NamedTuple):
    """The report of one step.

    Attributes:
      step: number of steps done.
      loss: the loss on the step's batch.
      gradient: the norm of the gradient.
      flips: the fraction of ternary codes that changed.
      validation: the loss on the held-out rows, or None if it was not measured.
    """

    step: int
    loss: float
    gradient: float
    flips: float
    validation: float | None


class State(NamedTuple):
    """The state of a run after some number of steps."""

    step: int
    params: PyTree
    optimizer_state: PyTree


def training_data(request: PretrainingRequest, text: str) -> TrainingData:
    """Return a tokenizer trained on the text, and the text's rows of tokens.

    Args:
      request: the request.
      text: the text.
    Raises:
      ValueError: the text is too short for the held-out rows and one batch.
    """
    tokenizer = trained_tokenizer(text, request.vocabulary)
    rows = chunk(tokenizer.encode(text), request.context)
    kept = min(HELD_OUT, len(rows) // 8)
    if kept < 1 or len(rows) - kept < request.batch_size:
        raise ValueError(
            f"the text has {len(rows)} rows of {request.context} tokens, but one "
            f"batch needs {request.batch_size} besides the eighth that is held out: "
            "give a longer text or a shorter context"
        )
    spread = np.linspace(0, len(rows) - 1, kept).astype(int)  # from all parts of the text
    return TrainingData(np.delete(rows, spread, axis=0), rows[spread], tokenizer)


def fingerprint(request: PretrainingRequest, data: TrainingData) -> dict[str, JsonValue]:
    """Return the identity of a run: plain values that differ wherever results may differ.

    Args:
      request: the request.
      data: the rows.
    """
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
      request: the request.
      data: the rows to train on and to validate on.
      progress: called with a report after each step.
      finished: where the last state is saved and resumed from, a `Folder` of the `fingerprint`;
        None saves nothing.
    Returns:
      The trained parameters, still latent, and their loss on the held-out rows.
    Raises:
      ValueError: the loss is not finite.
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
    """Return the trained model with packed ternary weights; other parameters are unchanged.

    Args:
      request: the request.
      params: the trained, latent parameters.
      data: the data, for its tokenizer.
    """
    return Model(f"bitnet-{request.size}", request.config(data.tokenizer.vocab_size),
                 jq.freeze(params), data.tokenizer)  # fmt: skip


def initial_state(request: PretrainingRequest, config: LlamaConfig) -> State:
    """Return the state before the first step: floating-point parameters drawn from the seed.

    Args:
      request: the request.
      config: the architecture.
    """
    params = jax.jit(Llama(config).init)(jax.random.key(request.seed), EXAMPLE)["params"]
    return State(0, params, request.optimizer().init(params))


def converted(
    request: PretrainingRequest, config: LlamaConfig, state: State, steps: range
) -> State:
    """Return the state with the changes of form applied that precede any of the given steps.

    The numerical values stay the same, also in the optimizer, so that a saved state always has the
    form of the initial state.

    Args:
      request: the request.
      config: the architecture.
      state: the state.
      steps: the steps before which changes of form are applied.
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
    leaves = dict(jq.core.path_leaves(params))
    for path, w in leaves.items():
        form = next((text for glob, text in A48.items() if matches(path, f"*{glob}")), None)
        if form is not None and isinstance(w, jq.QTensor):
            leaves[path] = dataclasses.replace(w, activations=jq.Activations.of(form))
    return replace_leaves(params, leaves)


def _rows(request: PretrainingRequest, rows: np.ndarray) -> grain.MapDataset:
    """Return the batches by step; rows are shuffled anew in each epoch."""
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
    """Return a function from parameters to their mean loss on the held-out rows."""
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
    """Return the last saved state, or the initial one if none was saved."""
    if STATE not in finished:
        return start
    state = as_tree(finished[STATE], start)
    return state._replace(step=int(state.step))
