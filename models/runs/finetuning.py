"""Quantized weights that train: what the command `finetune` does, resumable."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.ptq.layer_stacks import is_apart, layers_of
from jaxquant.rounding import Nearest
from jaxquant.training.qat import How
from jaxquant.tuning.recoding import CODES, can_recode
from jaxquant.tuning.trainer import relative_error
from jaxquant_models.architectures.llama import blockwise, whole
from jaxquant_models.readers.registry import Model
from jaxquant_models.runs import pipeline
from jaxquant_models.runs.job import HELD_OUT, digest_of, hash_of, split, written

BLOCK_DATA = 48  # sequences to train single blocks on
OTHER_BASIS = 0.5  # a relative error of embeddings that rounding does not make
JUDGED = 4  # sequences that the state to keep is chosen on
# Of every way to train: end to end, and block by block before.
_QAT = jq.QAT(in_steps=True, scale_rate=3e-4, also=(pipeline.NORMS,), validate_every=25)
# Forward only: every number of a layer moves by itself, for the layer's error is all of one step;
# end to end a draw is of a whole matrix or norm, 271 numbers of which some hundred losses tell.
_SINGLE = dataclasses.replace(jq.ZeroQAT().zeroth, others=(pipeline.NORMS,))
_SHARED = dataclasses.replace(
    _SINGLE, drawing=dataclasses.replace(_SINGLE.drawing, shared=True), sizes=(0.05, 0.02)
)
HOWS: dict[str, tuple[How, How]] = {
    "qat": (
        dataclasses.replace(_QAT, learning_rate=3e-3),
        dataclasses.replace(_QAT, learning_rate=0.03),
    ),
    "zeroqat": (
        jq.ZeroQAT(learning_rate=0.03, zeroth=_SHARED, validate_every=20),
        jq.ZeroQAT(learning_rate=0.05, zeroth=_SINGLE),
    ),
}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All that decides the result, but for the models.

    Attributes:
      how, blocks: end to end, and block by block before that; None: not at all.
      method: that floats are rounded by, and trained; of a checkpoint None, its weights train in
        the formats they have.
      only: globs of the weights that train; the others stay packed. (): all of the layers.
      text: to train on, or "". generated: sequences beside it that the teacher writes (LLM-QAT,
        arXiv:2305.17888). context: tokens of a sequence.
    """

    how: How | None
    blocks: How | None
    method: jq.Method | None
    only: tuple[str, ...]
    text: str
    generated: int
    context: int
    seed: int

    @property
    def stages(self) -> list[How]:
        """All training, in its order."""
        return [how for how in (self.blocks, self.how) if how is not None]

    @property
    def recipe(self) -> jq.Recipe | None:
        """That floats are rounded by."""
        return None if self.method is None else pipeline.recipe_of(self.method)

    def updates(self, layers: int) -> int:
        """Of all the training of a model of so many layers."""
        return (self.how.steps if self.how else 0) + layers * (
            self.blocks.steps if self.blocks else 0
        )

    def fingerprint(self, source: Model, teacher: Model | None) -> dict[str, Any]:
        """Plain values that differ where results may."""
        return {
            "jaxquant": jq.__version__,
            "jax": jax.__version__,
            "weights": digest_of(source),
            "teacher": teacher and digest_of(teacher),
            "end to end": repr(self.how),
            "blocks": repr(self.blocks),
            "method": repr(self.method),
            "only": self.only,
            "text": hash_of(self.text),
            "generated": self.generated,
            "context": self.context,
            "seed": self.seed,
        }


def check(tuning: Tuning, source: Model, teacher: Model | None) -> None:
    """Raise ValueError where what is asked cannot be done."""
    if teacher is None and (tuning.blocks is not None or tuning.generated):
        raise ValueError("blocks, and text of its own, take a model to learn from: --teacher MODEL")
    healable = teacher is not None and isinstance(tuning.how, jq.QAT)
    if not trains_codes(source.params) and not (healable and not tuning.blocks and not tuning.only):
        raise ValueError(
            "codes of vectors, lattices and trellises do not train; what is continuous in such a "
            "model does, all of it, as in healing: give --teacher MODEL, --method qat, --steps, "
            "and neither --block-steps nor --only"
        )
    if teacher is not None and teacher.config != source.config:
        of, ours = (dataclasses.asdict(m.config) for m in (teacher, source))
        names = ", ".join(f"{n} {of[n]}, not {ours[n]}" for n in of if of[n] != ours[n])
        raise ValueError(
            f"the teacher is another architecture: {names} (a model whose residual stream was "
            f"rotated has a head apart; train before, or with --teacher none)"
        )
    if is_apart(source.params, "layers") and len(_forms(source.params)) > 1:
        raise ValueError(
            "layers apart train as a stack: quantize the same weights in all of them, with the "
            "same transforms and in the same format"
        )
    if tuning.context > source.config.max_position:
        raise ValueError(
            f"--context {tuning.context} exceeds the {source.config.max_position} positions of "
            f"the model"
        )


def _forms(params: Any) -> set[tuple]:
    """How layers apart are packed."""
    said = lambda w: (w.format, w.input, w.output, w.activations)
    return {tuple((p, said(w)) for p, w in _packed(one)) for one in layers_of(params, "layers")}


def trains_codes(params: Any) -> bool:
    """Whether all packed weights have codes that train; else what is continuous does (`heal`)."""
    return all(_learnable(w.format) for _, w in _packed(params))


def _learnable(format: Any) -> bool:
    try:
        jq.LSQ().check(format)
    except ValueError:
        return False
    return True


def start(tuning: Tuning, source: Model) -> Any:
    """The tree with latent weights, its layers stacked."""
    params, floats = whole(source.params), None
    method = tuning.method or jq.Method("tuned", Nearest(), jq.Integer(), estimator=jq.LSQ())
    if tuning.method is not None:
        floats = params
        params = jq.quantize(params, pipeline.recipe_of(method), pipeline.sites_of(source))
    globs = tuning.only or (pipeline.LAYERS,)
    rules: list[tuple[str, Any]] = [(glob, method) for glob in globs]
    return jq.thaw(params, jq.Recipe([*rules, ("*", jq.KEEP)]), floats=floats)


def sequences(
    tuning: Tuning, source: Model, teacher: Model | None, folder: Folder
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences to train on, and those held out.

    Raises:
      ValueError: the text is too short for them.
    """
    parts = []
    if tuning.text:
        parts.append(split(pipeline.pieces(source, tuning.text, tuning.context)))
    if tuning.generated:
        if teacher is None:
            raise ValueError("text is generated by a teacher: expected one, got None")
        count = tuning.generated + HELD_OUT
        parts.append(split(written(teacher, count, tuning.context, tuning.seed, folder)))
    shuffle = np.random.default_rng(tuning.seed).permutation  # all parts of all texts, throughout
    found = tuple(shuffle(np.concatenate(of)) for of in zip(*parts, strict=True))
    batch = max(how.batch_size for how in tuning.stages)
    if len(found[0]) < batch:
        raise ValueError(
            f"there are {len(found[0])} sequences of {tuning.context} tokens to train on, fewer "
            f"than a step takes, {batch}: give a longer one, a smaller batch or context"
        )
    return found[0], found[1]


def tuned(
    tuning: Tuning,
    source: Model,
    teacher: Model | None,
    data: tuple[np.ndarray, np.ndarray],
    folder: Folder,
    progress: Callable[[Any], None],
) -> Model:
    """The model, trained and packed again; goes on from the folder."""
    if not trains_codes(source.params):
        return _healed(tuning, source, teacher, data, folder, progress)
    params = start(tuning, source)
    training, held_out = data
    if tuning.blocks is not None and teacher is not None:
        parts, few = blockwise(source.config, source.dtype), training[:BLOCK_DATA]
        embed = jax.jit(jq.quantized(parts.embed))
        hidden = np.stack([embed(params, jnp.asarray(s)[None])[0] for s in few])
        theirs = embed(whole(teacher.params), jnp.asarray(few[:1]))[0]
        if relative_error(jnp.asarray(hidden[0]), theirs) > OTHER_BASIS:
            raise ValueError(
                "the teacher's residual stream has another basis, so its layers cannot be met one "
                "by one: leave --block-steps out, or give the rotated floats as --teacher"
            )
        layers = jq.qat_blocks(
            parts.block, params["layers"], whole(teacher.params)["layers"], hidden, tuning.blocks,
            progress=progress, finished=folder,
        )  # fmt: skip
        params = {**params, "layers": layers}
    if tuning.how is not None:
        params = jq.qat(
            pipeline.trainable(source), params, training, tuning.how,
            teacher=None if teacher is None else whole(teacher.params),
            validation=held_out[:JUDGED], progress=progress, finished=folder,
        )  # fmt: skip
    params = jq.freeze(params)
    if is_apart(source.params, "layers"):
        params = jq.unstack(params, "layers")
    return dataclasses.replace(source, params=params)


def _healed(
    tuning: Tuning,
    source: Model,
    teacher: Model | None,
    data: tuple[np.ndarray, np.ndarray],
    folder: Folder,
    progress: Callable[[Any], None],
) -> Model:
    """As `tuned`, where codes do not train: what is continuous does, then learned codebooks' codes.

    The codes of vectors and trellises are no roundings of a number, so nothing goes straight
    through them.
    """
    if tuning.how is None or teacher is None:
        raise ValueError("codes that do not train are healed end to end, by a teacher: give both")
    steps = {"steps": tuning.how.steps, "batch_size": tuning.how.batch_size}
    codes = any(can_recode(w) for _, w in _packed(source.params))
    return pipeline.healed(
        teacher, source, *data, jq.Healing(**steps), progress, folder,
        dataclasses.replace(CODES, **steps) if codes else None,
    )  # fmt: skip


def _packed(params: Any) -> list[tuple[str, jq.QTensor]]:
    return [(path, w) for path, w in jq.path_leaves(params) if isinstance(w, jq.QTensor)]
