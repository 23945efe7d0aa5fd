"""A language model through the spine: calibrate, quantize, save, load."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.evaluate import chunk, evaluate
from jaxquant.ptq.folding import Folded
from jaxquant.ptq.layer_stacks import is_apart, layers_of
from jaxquant.rounding import Clipped, Nearest
from jaxquant.storage import checkpoint
from jaxquant.transforms import Channels
from jaxquant.tuning.learned_transforms import Transforms
from jaxquant.tuning.trainer import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import (
    Llama,
    blockwise,
    check_tokens,
    folds,
    residual,
    untied,
    whole,
)
from jaxquant_models.architectures.prefix import after_prefix, exact_prefix
from jaxquant_models.readers import registry
from jaxquant_models.readers.registry import Model
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.schemas.files import LanguageModel
from jaxquant_models.schemas.strict import checked

CONTEXT = 512  # tokens of one calibration sequence
LAYERS = "layers/*kernel"  # the matrices of every layer
STREAM = ("layers/attn/[qkv]/kernel", "layers/mlp/[gu]*/kernel")  # those that read the residual
CLIPPED_NOT = "layers/*attn/[qk]/kernel"
NORMS = "*norm/scale"
BLOCK_DATA = 24  # sequences to heal single blocks on


def load_any(spec: str | os.PathLike[str], widen: bool = True) -> Model:
    """A model by name, a GGUF file, a Hugging Face folder, or a jaxquant checkpoint.

    Args:
      widen: make the kept matrices of a checkpoint float32, faster token by token; else they stay
        in the dtype they are stored in, so that bytes are those of the checkpoint.
    """
    if not checkpoint.is_checkpoint(spec):
        return registry.load(spec)
    params, _, metadata = checkpoint.load(spec)
    kept = checked(
        LanguageModel, metadata, f"{spec} is a checkpoint of no language model: its metadata"
    )
    config = LlamaConfig.from_json(kept.config)
    tokenizer = Tokenizer.from_json(kept.tokenizer, f"the tokenizer of {spec}")
    tokenizer.check_rows(config.vocab_size)
    if widen:
        params = jax.tree.map(
            lambda w: w if _packed(w) else w.astype(jnp.float32), params, is_leaf=_packed
        )
    return Model(str(spec), config, params, tokenizer, prefix=kept.prefix)


def serving(params: Any) -> tuple[Any, str]:
    """Parameters as products take them, entropy-coded weights in words (`jaxquant.transcoded`).

    Returns:
      The parameters; and a line that says what these weights take, or "" where there are none.
    """
    before, new = dict(jq.path_leaves(params)), jq.transcoded(params)
    pairs = [(before[path], w) for path, w in jq.path_leaves(new) if w is not before[path]]
    if not pairs:
        return new, ""
    disk, memory = (sum(w.nbytes for w in side) / 1e6 for side in zip(*pairs, strict=True))
    words = " and ".join(f"{bits}-bit" for bits in sorted({w.format.bits for _, w in pairs}))
    return new, (
        f"entropy-coded: {disk:.1f} MB on disk, {memory:.1f} MB in memory as {words} words"
    )


def beginning(model: Model) -> list[int]:
    """The token that every text begins with, [bos], or [] for a model trained without."""
    first = model.tokenizer.encode("", special=True)[:1]
    return first if first == [model.config.bos_id] else []


def pieces(model: Model, text: str, ctx: int, count: int | None = None) -> np.ndarray:
    """Chunks [N, ctx] of a text; each begins with the model's [bos], if any, as in llama.cpp.

    Raises:
      ValueError: the text is too short, or ctx exceeds the positions the model was made for.
    """
    if ctx > model.config.max_position:
        raise ValueError(f"ctx {ctx} exceeds the model's {model.config.max_position} positions")
    chunks = chunk(model.tokenizer.encode(text), ctx, count)
    if first := beginning(model):
        chunks[:, 0] = first[0]
    return chunks


def context(model: Model) -> int:
    """Tokens of one sequence to calibrate or train on: 512, or all positions the model has."""
    return min(CONTEXT, model.config.max_position)


def distance(model: Model, params: Any, sequences: np.ndarray) -> float:
    """Mean KL (nats per token) of the model's predictions to those with other parameters."""
    teacher = (model.apply_fn, model.params)
    return evaluate(jq.quantized(model.apply_fn), params, sequences, against=teacher).kl


def recipe_of(method: jq.Method, rotated: bool = False) -> jq.Recipe:
    """The matrices of every layer by one method; embedding, head and norms as they are.

    Queries and keys are not clipped: what they lose is multiplied.

    Args:
      rotated: of a model whose residual stream is rotated (`turned`): what reads the stream needs
        no rotation of its own. Others have the method's (QuaRot, SpinQuant "had") or none.
    """
    rules: list[tuple[str, Any]] = [(LAYERS, method), ("*", jq.KEEP)]
    if rotated:
        rules[:0] = [(glob, _not_rotating(method)) for glob in STREAM]
    if isinstance(method.rounder, Clipped):
        whole = dataclasses.replace(method, rounder=method.rounder.rounder)
        rules.insert(0, (CLIPPED_NOT, whole))
    return jq.Recipe(rules)


def _not_rotating(method: jq.Method) -> jq.Method:
    """Without rotations of inputs, but those that sort, whose order is the format's."""
    side = method.input
    parts = side.parts if isinstance(side, jq.Chain) else () if side is None else (side,)
    left = tuple(p for p in parts if not isinstance(p, jq.Rotation) or p.sort)
    if left == parts:
        return method
    return dataclasses.replace(method, input=None if not left else _chained(left))


def _chained(parts: tuple) -> Any:
    return parts[0] if len(parts) == 1 else jq.Chain(parts)


def calibrate(
    model: Model,
    text: str,
    tokens: int,
    *,
    weighting: str = "gradient",
    output: Sequence[str] = (),
    **options: Any,
) -> jq.Stats:
    """Statistics on the first `tokens` tokens of a text, in sequences of 512.

    `options`: progress, save and resume of `jaxquant.calibrate`.
    """
    batches = first(pieces(model, text, context(model)), tokens)
    return calibrate_on(model, batches, weighting=weighting, output=output, **options)


def first(sequences: np.ndarray, tokens: int) -> np.ndarray:
    """The first sequences of so many tokens; warns where there are fewer."""
    wanted = max(1, tokens // sequences.shape[1])
    if len(sequences) < wanted:
        warnings.warn(
            f"the calibration text has {sequences.size} tokens for it, {tokens} were asked",
            stacklevel=3,
        )
    return sequences[:wanted]


def calibrate_on(
    model: Model,
    sequences: np.ndarray,
    *,
    weighting: str = "gradient",
    output: Sequence[str] = (),
    **options: Any,
) -> jq.Stats:
    """Statistics on token sequences [N, length], one at a time; those of a prefix are left out.

    The loss is the mean cross-entropy of the next token; blocks are rematerialised, so memory is
    what is kept, twice, beside the parameters.

    Raises:
      ValueError: an id without a row in the embedding; before any compute.
    """
    check_tokens(sequences, model.config.vocab_size)
    llama, prefix = Llama(model.config, model.dtype, remat=True), model.prefix

    def forward(params: Any, tokens: jax.Array, *cache: Any) -> jax.Array:
        got = llama.apply({"params": params}, tokens, *cache)
        return got[0] if cache else got

    def batch(sequence: np.ndarray) -> tuple:
        tokens = jnp.asarray(sequence)[None]
        return after_prefix(llama, model.params, tokens, prefix) if prefix else (tokens,)

    return jq.calibrate(
        forward,
        model.params,
        (batch(s) for s in sequences),
        loss=lambda logits, batch: next_token_loss(logits, batch[0]),
        weighting=weighting,
        output=output,
        **options,
    )


def trainable(model: Model) -> Callable[[Any, jax.Array], jax.Array]:
    """`model.apply_fn` that keeps only products for its backward pass: half the memory."""
    llama = Llama(model.config, model.dtype, remat=jax.checkpoint_policies.dots_saveable)
    run = lambda params, tokens: llama.apply({"params": params}, tokens)
    if model.prefix:
        run, _ = exact_prefix(llama, model.prefix)
    return lambda params, tokens: run(whole(params), tokens)


def learned(
    model: Model,
    recipe: jq.Recipe,
    stats: jq.Stats,
    sequences: np.ndarray,
    held_out: np.ndarray,
    healing: jq.Healing,
    **options: Any,
) -> Transforms:
    """Transforms of inputs learned end to end, for `quantized_model`.

    `options`: key, inspect, progress and finished of `jaxquant.learn`.
    """
    params, recipe, stats = _folded(model, recipe, stats, options)
    options.pop("inspect", None)
    return jq.learn(
        trainable(model), params, recipe, stats, sequences, healing,
        validation=held_out, **options,
    )  # fmt: skip


def healed(
    source: Model,
    result: Model,
    sequences: np.ndarray,
    held_out: np.ndarray,
    healing: jq.Healing,
    progress: Callable[[Any], None],
    finished: Any = None,
    recoding: jq.Healing | None = None,
) -> Model:
    """The quantized model trained to be like the source: block by block, then as a whole.

    Its layers may be a stack, or apart (`jaxquant.unstack`); so is what comes back. With
    `recoding`, the codes of learned codebooks train at last.

    Raises:
      ValueError: layers apart that do not stack for training (`jaxquant.decoded`).
    """
    parts = blockwise(source.config, source.dtype)
    params = jq.decoded(result.params)
    apart = is_apart(params, "layers")
    if apart:
        forms = {jax.tree.structure(layer) for layer in layers_of(params, "layers")}
        if len(forms) > 1:
            raise ValueError(
                "layers apart are healed as a stack: quantize the same weights in all of them, "
                "with the same transforms, in one format or in formats with nothing to train"
            )
        params = jq.restack(params, "layers")
    embed = jq.quantized(parts.embed)
    hidden = [embed(params, jnp.asarray(s)[None])[0] for s in sequences[:BLOCK_DATA]]
    # One tree at a time: a decoded one is as large as the source.
    params = {**params, "layers": jq.heal_blocks(
        parts.block, params["layers"], source.params["layers"], np.stack(hidden), also=[NORMS],
        progress=progress, finished=finished,
    )}  # fmt: skip
    fn = trainable(source)
    params = jq.heal(
        fn, params, source.params, sequences, healing,
        validation=held_out, also=[NORMS], progress=progress, finished=finished,
    )  # fmt: skip
    if recoding is not None:
        params = jq.recode(
            fn, params, source.params, sequences, recoding,
            validation=held_out, progress=progress, finished=finished,
        )  # fmt: skip
    params = jq.unstack(params, "layers") if apart else params
    return dataclasses.replace(result, params=jq.rejoined(result.params, params))


def rotated(model: Model, key: jax.Array) -> Model:
    """The same function, its residual stream turned by a random Hadamard transform, a head apart.

    Raises:
      ValueError: its width has no Hadamard transform.
    """
    return turned(model, random_rotation(model, key))


def turned(model: Model, rotation: jax.Array) -> Model:
    """The same function, its residual stream turned by an orthonormal [d, d], a head apart."""
    model = untied_model(model)
    params = jq.rotate_residual(model.params, residual(model.config), rotation)
    return dataclasses.replace(model, params=params)


def untied_model(model: Model) -> Model:
    """The same function, a head apart."""
    config, params = untied(model.config, model.params)
    return dataclasses.replace(model, config=config, params=params)


def random_rotation(model: Model, key: jax.Array) -> jax.Array:
    """A Hadamard transform of the residual stream behind random signs, [d, d].

    Raises:
      ValueError: its width has no Hadamard transform.
    """
    d, turn = model.config.d_model, jq.Rotation()
    if turn.size(d) != d:
        raise ValueError(f"{d} channels have no Hadamard transform to rotate by")
    one = jnp.eye(d)
    return turn.apply(one, turn.fit(Channels(one), key))


def learned_rotation(
    model: Model, recipe: jq.Recipe, sequences: np.ndarray, healing: jq.Healing, **options: Any
) -> jax.Array:
    """The rotation of the residual stream of a model with a head apart that suits a recipe best.

    Weights are rounded in learning too, but where error feedback is to round them. `options`:
    start, stats, validation, key, progress and finished of `jaxquant.learn_rotation`.
    """
    rounders = [m.rounder for _, m in recipe.rules if isinstance(m, jq.Method)]
    nearest = all(isinstance(rounder, Nearest) for rounder in rounders)
    options["stats"] = options.get("stats") or sites_of(model)
    return jq.learn_rotation(
        trainable(model), model.params, residual(model.config), recipe, sequences, healing,
        round_weights=nearest, **options,
    )  # fmt: skip


def choices(model: Model, methods: Sequence[jq.Method], healed: bool) -> jq.Choices:
    """What methods come to for the matrices of the layers."""
    return jq.Choices.of(model.params, methods, sites_of(model), paths=[LAYERS], healed=healed)


def plan(model: Model, recipe: jq.Recipe) -> jq.Plan:
    """The resolved recipe with the bytes that `save` stores; what can be wrong is wrong here."""
    shape = lambda w, dtype: jax.ShapeDtypeStruct(w.shape, dtype)
    return jq.resolve(recipe, _as_stored(model.params, shape), sites_of(model))


def quantized_model(
    model: Model, recipe: jq.Recipe, stats: jq.Stats | None, **options: Any
) -> Model:
    """The model with packed parameters; what the recipe keeps is untouched (see `save`).

    Factors of inputs are folded into what makes these, where that is exact (`llama.folds`).
    `options`: key, inspect, transforms, progress and finished of `jaxquant.quantize`.
    """
    found, params = sites_of(model), model.params
    if stats is not None:
        params, recipe, found = _folded(model, recipe, stats, options)
    return dataclasses.replace(model, params=jq.quantize(params, recipe, found, **options))


def _folded(model: Model, recipe: jq.Recipe, stats: jq.Stats, options: dict[str, Any]) -> Folded:
    if is_apart(model.params, "layers"):
        return Folded(model.params, recipe, stats)
    how = {n: options[n] for n in ("key", "inspect", "finished") if n in options}
    return jq.fold(model.params, recipe, stats, folds(model.config), **how)


def sites_of(model: Model) -> dict[str, jq.Site]:
    """Where its weights are used."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jq.sites(model.apply_fn, model.params, tokens)


def save(
    directory: str | Path,
    model: Model,
    recipe: jq.Recipe | None,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Checkpoint of a quantized model; kept matrices are stored in float16, vectors in float32.

    `about`: more JSON values for its metadata.

    Raises:
      ValueError: a weight, packed or not, that training or rounding left not finite; named.
    """
    params = _as_stored(model.params, lambda w, dtype: w.astype(dtype))
    _check_finite(params)
    metadata = {
        "config": model.config.to_json(),
        "tokenizer": model.tokenizer.to_json(),
        "prefix": model.prefix,
        **(about or {}),
    }
    checkpoint.save(directory, params, recipe=recipe, metadata=metadata, overwrite=overwrite)


def _check_finite(params: Any) -> None:
    for path, w in jq.path_leaves(params):
        floats = [a for a in jax.tree.leaves(w) if jnp.issubdtype(a.dtype, jnp.floating)]
        if not all(bool(jnp.all(jnp.isfinite(a.astype(jnp.float32)))) for a in floats):
            raise ValueError(
                f"{path}: values that are not finite (NaN or infinity) are not saved; use another "
                f"method, more bits, or a smaller learning rate"
            )


def _packed(w: Any) -> bool:
    return isinstance(w, jq.QTensor)


def _as_stored(params: Any, cast: Callable[[Any, Any], Any]) -> Any:
    """cast(leaf, dtype) of every kept leaf: float16 for a matrix that fits, else its own dtype."""

    def one(path: Any, w: Any) -> Any:
        if _packed(w):
            return w
        vector = path[-1].key in ("scale", "bias")  # of rank 2 in a stack of layers
        large = not vector and jnp.max(jnp.abs(w)) > np.finfo(np.float16).max
        return cast(w, w.dtype if vector or large else np.dtype(np.float16))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_packed)
