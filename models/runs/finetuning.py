"""A finetuning job, in which quantized weights are trained. It can be killed and resumed."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.durable.store import Finished
from jaxquant.ptq.layer_stacks import is_apart, layers_of
from jaxquant.rounding import Nearest
from jaxquant.training.finetuning import Finetuning
from jaxquant.training.qat import How
from jaxquant.tuning.losses import relative_error
from jaxquant.tuning.recoding import CODES, can_recode
from jaxquant.tuning.trainer import Progress
from jaxquant_models.architectures.blocks import blockwise
from jaxquant_models.architectures.llama import LAYER_MATRICES, stacked
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.adapting import adapted_model, check_adapter, train_adapters
from jaxquant_models.runs.examples import example_sequences
from jaxquant_models.runs.finetuning_request import FinetuningRequest
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_model, digest_of_text
from jaxquant_models.runs.generated_text import generated_sequences
from jaxquant_models.runs.healing import heal_model
from jaxquant_models.runs.sequences import HELD_OUT, split, token_sequences
from jaxquant_models.schemas.files import TrainingExample

BLOCK_SEQUENCES = 48  # number of sequences on which single blocks are trained
OTHER_BASIS = 0.5  # relative error of embeddings that exceeds any rounding error
JUDGED = 4  # number of sequences on which the best state is selected


def check(request: FinetuningRequest, source: Model, teacher: Model | None) -> None:
    """Raise ValueError if the request cannot be met with these models.

    Args:
      request: the request.
      source: the model to train.
      teacher: the model to match, or None.
    """
    if teacher is None and (request.blocks is not None or request.generated):
        raise ValueError("--block-steps and --generated need a teacher: give --teacher MODEL")
    if request.adapter is None:
        _check_formats(request, source, teacher)
    else:
        check_adapter(source, request.method, request.adapter, request.only)
    if teacher is not None and teacher.config != source.config:
        of, ours = (dataclasses.asdict(m.config) for m in (teacher, source))
        names = ", ".join(f"{n} {of[n]}, not {ours[n]}" for n in of if of[n] != ours[n])
        raise ValueError(
            f"the teacher has another architecture: {names} (a model whose residual "
            "stream was rotated has a separate output matrix; train it before the "
            "rotation, or with --teacher none)"
        )
    if is_apart(source.params, "layers") and len(_forms(source.params)) > 1:
        raise ValueError(
            "layers that are stored apart are trained as one stack: quantize the "
            "same weights in all of them, with the same transforms and in the same "
            "format"
        )
    if request.context > source.config.max_position:
        raise ValueError(
            f"--context {request.context} exceeds the {source.config.max_position} positions of "
            f"the model"
        )


def _check_formats(request: FinetuningRequest, source: Model, teacher: Model | None) -> None:
    healable = teacher is not None and isinstance(request.end_to_end, jq.training.QAT)
    healed = healable and not request.blocks and not request.only
    if not _trains_codes(source.params) and not healed:
        raise ValueError(
            "codes of vectors, lattices and trellises cannot be trained, but "
            "everything continuous in such a model can be healed at once: give "
            "--teacher MODEL, --method qat and --steps, and neither --block-steps "
            "nor --only"
        )


def _forms(params: PyTree) -> set[tuple]:
    """Return the distinct ways in which unstacked layers are packed."""
    form = lambda w: (w.format, w.input, w.output, w.activations)
    return {tuple((p, form(w)) for p, w in _packed(one)) for one in layers_of(params, "layers")}


def _trains_codes(params: PyTree) -> bool:
    """Return whether the codes of all packed weights can be trained.

    Otherwise only continuous parameters are trained.
    """
    return all(_learnable(w) for _, w in _packed(params))


def _learnable(w: jq.QTensor) -> bool:
    try:
        jq.estimators.LSQ().check(w.format)
    except ValueError:
        return False
    return True


def _packed(params: PyTree) -> list[tuple[str, jq.QTensor]]:
    return [(path, w) for path, w in jq.core.path_leaves(params) if isinstance(w, jq.QTensor)]


@dataclasses.dataclass(frozen=True, eq=False)
class FinetuningJob:
    """A finetuning job.

    Attributes:
      request: the request.
      source: the model to train.
      teacher: the model whose predictions it is to match; None trains on the text's next tokens.
      text: the contents of the training text; "" if there is none.
      examples: training examples in the place of a text.
    """

    request: FinetuningRequest
    source: Model
    teacher: Model | None
    text: str
    examples: tuple[TrainingExample, ...] = ()

    def fingerprint(self) -> dict[str, JsonValue]:
        """Return the identity of a run: plain values that differ wherever results may differ."""
        request = self.request
        return {
            **VERSIONS,
            "weights": digest_of_model(self.source),
            "teacher": None if self.teacher is None else digest_of_model(self.teacher),
            "end to end": repr(request.end_to_end),
            "blocks": repr(request.blocks),
            "method": repr(request.method),
            "only": list(request.only),
            "text": digest_of_text(self.text),
            "examples": digest_of_text(repr(self.examples)),
            "generated": request.generated,
            "context": request.context,
            "seed": request.seed,
            "adapter": repr(request.adapter),
        }

    def sequences(self, finished: Finished) -> tuple[np.ndarray, np.ndarray]:
        """Return the training and the held-out sequences.

        Args:
          finished: where generated sequences are saved.
        Raises:
          ValueError: the text is too short for them.
        """
        request, parts = self.request, []
        if self.examples:
            parts.append(split(example_sequences(self.source, self.examples, request.context)))
        if self.text:
            parts.append(split(token_sequences(self.source, self.text, request.context)))
        if request.generated:
            if self.teacher is None:
                raise ValueError("generated text needs a teacher, got None")
            count, length = request.generated + HELD_OUT, request.context
            written = generated_sequences(self.teacher, count, length, request.seed, finished)
            parts.append(split(written))
        shuffle = np.random.default_rng(request.seed).permutation  # mixes all parts of all texts
        training, held_out = (shuffle(np.concatenate(of)) for of in zip(*parts, strict=True))
        batch = max(how.batch_size for how in request.stages)
        if len(training) < batch:
            raise ValueError(
                f"there are {len(training)} sequences of {request.context} tokens to "
                f"train on, but one step needs {batch}: give a longer text or more examples, "
                "a smaller batch or a shorter context"
            )
        return training, held_out

    def run(
        self,
        data: tuple[np.ndarray, np.ndarray],
        progress: Callable[[Progress], None],
        finished: Finished,
    ) -> Model:
        """Run every unfinished step, and return the model, packed again.

        Args:
          data: the training and the held-out sequences.
          progress: called with a report after each step.
          finished: the results of finished steps.
        """
        if self.request.adapter is not None:
            return self._adapted(data, progress, finished)
        if not _trains_codes(self.source.params):
            return self._healed(data, progress, finished)
        training, held_out = data
        params, teacher = self._latent(), None
        if self.teacher is not None:
            teacher = stacked(self.teacher.params)
        if self.request.blocks is not None and teacher is not None:
            how = self.request.blocks
            layers = self._blocks(params, teacher, training, how, progress, finished)
            params = {**params, "layers": layers}
        if self.request.end_to_end is not None:
            params = jq.qat(
                self.source.apply_training(), params, training, self.request.end_to_end,
                teacher=teacher, validation=held_out[:JUDGED], progress=progress,
                finished=finished,
            )  # fmt: skip
        params = jq.freeze(params)
        if is_apart(self.source.params, "layers"):
            params = jq.ptq.unstack(params, "layers")
        return dataclasses.replace(self.source, params=params)

    def _adapted(
        self,
        data: tuple[np.ndarray, np.ndarray],
        progress: Callable[[Progress], None],
        finished: Finished,
    ) -> Model:
        """Return the model with trained adapters on its packed weights, not merged."""
        (training, held_out), request = data, self.request
        if request.adapter is None or not isinstance(request.end_to_end, Finetuning):
            raise ValueError("adapters are trained end to end: give --steps")
        model = adapted_model(
            self.source, request.method, request.adapter, request.only, training, request.seed,
            finished,
        )  # fmt: skip
        return train_adapters(
            model, training, request.end_to_end, teacher=self.teacher,
            validation=held_out[:JUDGED], progress=progress, finished=finished,
        )  # fmt: skip

    def _latent(self) -> PyTree:
        """Return the parameters with latent weights and stacked layers."""
        request, params, floats = self.request, stacked(self.source.params), None
        method = request.method or jq.Method(
            "tuned", Nearest(), jq.formats.Integer(), estimator=jq.estimators.LSQ()
        )
        if request.recipe is not None:
            floats = params
            params = jq.quantize(params, request.recipe, self.source.sites())
        rules = [(glob, method) for glob in request.only or (LAYER_MATRICES,)]
        return jq.thaw(params, jq.Recipe([*rules, ("*", jq.KEEP)]), floats=floats)

    def _blocks(
        self, params: PyTree, teacher: PyTree, training: np.ndarray, how: How,
        progress: Callable[[Progress], None], finished: Finished,
    ) -> PyTree:  # fmt: skip
        """Return the stack of layers, each trained by itself to match the teacher's layer."""
        parts, few = blockwise(self.source.config, self.source.dtype), training[:BLOCK_SEQUENCES]
        embed = jax.jit(jq.quantized(parts.embed))
        hidden = np.stack([embed(params, jnp.asarray(s)[None])[0] for s in few])
        theirs = embed(teacher, jnp.asarray(few[:1]))[0]
        if relative_error(jnp.asarray(hidden[0]), theirs) > OTHER_BASIS:
            raise ValueError(
                "the teacher's residual stream has another basis, so layers cannot be "
                "matched one by one: leave --block-steps out, or give the rotated model "
                "with float weights as --teacher"
            )
        return jq.training.qat_blocks(
            parts.block, params["layers"], teacher["layers"], hidden, how,
            progress=progress, finished=finished,
        )  # fmt: skip

    def _healed(
        self,
        data: tuple[np.ndarray, np.ndarray],
        progress: Callable[[Progress], None],
        finished: Finished,
    ) -> Model:
        """Return the model with its continuous parameters trained, if its codes cannot be.

        Codes of vectors and trellises do not round single numbers, so no straight-through estimator
        applies to them. The codes of learned codebooks are trained afterwards.
        """
        how = self.request.end_to_end
        if how is None or self.teacher is None:
            raise ValueError(
                "a model whose codes cannot be trained is healed end to end, by a "
                "teacher: give --steps and --teacher"
            )
        steps = {"steps": how.steps, "batch_size": how.batch_size}
        codes = any(can_recode(w) for _, w in _packed(self.source.params))
        recoding = dataclasses.replace(CODES, **steps) if codes else None
        return heal_model(
            self.teacher, self.source, *data, jq.tuning.Healing(**steps), recoding,
            progress=progress, finished=finished,
        )  # fmt: skip
