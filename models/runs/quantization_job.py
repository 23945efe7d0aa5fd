"""A quantization job with the whole model in memory. It can be killed at any moment and resumed."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, PyTree

import jaxquant as jq
from jaxquant.core.paths import matches
from jaxquant.durable.store import Finished
from jaxquant.evaluation import evaluate
from jaxquant.tuning.heal import BLOCKS
from jaxquant.tuning.learned_transforms import Transforms
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.calibration import CALIBRATION, calibrate_model
from jaxquant_models.runs.generated_text import generated_sequences
from jaxquant_models.runs.healing import heal_model
from jaxquant_models.runs.module_loss import JUDGED, ModuleLoss
from jaxquant_models.runs.needs import Needs
from jaxquant_models.runs.quantization import (
    Quantized,
    learn_transforms,
    plan_model,
    quantize_model,
)
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter, Step
from jaxquant_models.runs.rotation import learned_rotation, random_rotation, rotate_model
from jaxquant_models.runs.sequences import HELD_OUT, MEASURED, context_length, split

MOST_GENERATED = 128  # limit of the training sequences a model generates, unless a batch is larger


class Sequences(NamedTuple):
    """The token sequences of a job, each an array [N, length].

    Attributes:
      calibration: the calibration sequences.
      unseen: other sequences of the same text, for evaluation; empty if nothing is to be evaluated.
      training: the training sequences; None if the model has to generate them first.
      held_out: the sequences that evaluate training; None if the model has to generate them first.
    """

    calibration: np.ndarray
    unseen: np.ndarray
    training: np.ndarray | None = None
    held_out: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class QuantizationJob:
    """A quantization job some of whose steps need the whole model; the others go layer by layer.

    Attributes:
      request: the request.
      source: the model to quantize. If its residual stream is to be rotated, its embeddings are
        untied, and the rotated model replaces it, so that memory holds only one of them.
      needs: what the methods of the request require.
      sequences: the token sequences that the request needs.
      plan: the resolved recipe; None if methods are to be allocated.
      finished: the results of finished steps, including those of earlier runs of the same job.
      reporter: receives reports of the work.
    """

    request: QuantizationRequest
    source: Model
    needs: Needs
    sequences: Sequences
    plan: jq.recipes.Plan | None
    finished: Finished
    reporter: Reporter

    def run(self) -> Quantized:
        """Run every unfinished step, and return the model and the recipe that made it."""
        self._rotate()
        stats = self._statistics()
        recipe = self.request.recipe
        if recipe is None:
            recipe = self._allocated(stats)
        transforms = self._learned_transforms(recipe, stats)
        result = self._quantized(recipe, stats, transforms)
        return Quantized(self._healed(result), recipe)

    def _rotate(self) -> None:
        """Replace the source by the model with a rotated residual stream, if requested."""
        rotating = self.request.rotating
        if not self.request.rotation:
            return
        with self.reporter.stage("rotating", rotating.steps if rotating else 0) as step:
            rotation = random_rotation(self.source, self.request.key)
            if rotating is not None and self.request.recipe is not None:
                rotation = self._learned_rotation(self.request.recipe, rotating, rotation, step)
            self.source = rotate_model(self.source, rotation)

    def _learned_rotation(
        self, recipe: jq.Recipe, rotating: jq.tuning.Healing, start: Float[Array, "d d"], step: Step
    ) -> Float[Array, "d d"]:
        """Return a rotation learned on the training sequences, starting from `start`.

        If the model has yet to generate those, the calibration text is used instead.
        """
        training, held_out = self.sequences.training, self.sequences.held_out
        if training is None or held_out is None:
            training, held_out = self.sequences.calibration, self.sequences.unseen
        stats = None
        if self.needs.channels:
            begun, name = rotate_model(self.source, start), f"{CALIBRATION} before rotating"
            stats = self._calibrated(begun, lambda _: None, name)
        return learned_rotation(
            self.source, recipe, training, rotating, start=start, stats=stats, key=self.request.key,
            validation=held_out, progress=step, finished=self.finished,
        )  # fmt: skip

    def _statistics(self) -> jq.Stats | None:
        """Return the input statistics of weights, or None if no step needs them."""
        if not self.needs.statistics:
            return None
        with self.reporter.stage("calibrating", len(self.sequences.calibration)) as step:
            return self._calibrated(self.source, step, CALIBRATION)

    def _calibrated(self, source: Model, step: Step, name: str) -> jq.Stats:
        return calibrate_model(
            source, self.sequences.calibration, weighting=self.request.weighting,
            gram=self.needs.gram, output=self.needs.output, sample=self.needs.sample,
            progress=step, finished=self.finished, name=name,
        )  # fmt: skip

    def _allocated(self, stats: jq.Stats | None) -> jq.Recipe:
        """Return the recipe that gives every weight a method such that the model loses least."""
        source, request = self.source, self.request
        teacher = (source.apply_fn, source.params)
        judged = self.sequences.unseen[:MEASURED]

        def distance(params: PyTree) -> float:
            student = jq.quantized(source.apply_fn)
            return evaluate(student, jq.dequantize(params), judged, against=teacher).kl

        kinds = sum(matches(path, LAYER_MATRICES) for path, _ in jq.core.path_leaves(source.params))
        with self.reporter.stage("allocating", len(request.choices) * kinds) as step:
            allocation = jq.ptq.allocate(
                source.params, request.choices, request.target_bits, stats,
                paths=[LAYER_MATRICES], measure=distance, healed=request.heals,
                key=request.key, progress=step, finished=self.finished,
            )  # fmt: skip
        self.reporter.tell(str(allocation))
        return allocation.recipe

    def _learned_transforms(self, recipe: jq.Recipe, stats: jq.Stats | None) -> Transforms | None:
        """Return input transforms trained end to end, or None if not requested."""
        learning = self.request.learning
        if learning is None:
            return None
        with self.reporter.stage("learning", learning.steps) as step:
            training, held_out = self._training()
            return learn_transforms(
                self.source, recipe, stats, training, learning, validation=held_out,
                key=self.request.key, inspect=self._module_loss(), progress=step,
                finished=self.finished,
            )  # fmt: skip

    def _quantized(
        self, recipe: jq.Recipe, stats: jq.Stats | None, transforms: Transforms | None
    ) -> Model:
        """Return the quantized model."""
        plan = plan_model(self.source, recipe) if self.plan is None else self.plan
        with self.reporter.stage("quantizing", plan.matrices) as step:
            return quantize_model(
                self.source, recipe, stats, key=self.request.key, inspect=self._module_loss(),
                transforms=transforms, progress=step, finished=self.finished,
            )  # fmt: skip

    def _healed(self, result: Model) -> Model:
        """Return the quantized model, trained to match the source if requested."""
        healing, recoding = self.request.healing, self.request.recoding
        if not self.request.heals:
            return result
        steps = (healing.steps if healing else 0) + (recoding.steps if recoding else 0)
        blocks = BLOCKS.steps * self.source.config.n_layers
        with self.reporter.stage("healing", blocks + steps) as step:
            training, held_out = self._training()
            return heal_model(
                self.source, result, training, held_out, healing, recoding,
                progress=step, finished=self.finished,
            )  # fmt: skip

    def _module_loss(self) -> ModuleLoss | None:
        """Return the loss by which scales are searched for, or None if none are."""
        if not self.needs.module_loss:
            return None
        return ModuleLoss.of(self.source, self.sequences.calibration[:JUDGED])

    def _training(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the training and the held-out sequences, generated by the model if requested."""
        if self.sequences.training is not None and self.sequences.held_out is not None:
            return self.sequences.training, self.sequences.held_out
        stages = self.request.training
        most = max(MOST_GENERATED, *(how.batch_size for how in stages))
        count = min(max(how.steps * how.batch_size for how in stages), most) + HELD_OUT
        length = context_length(self.source)
        return split(
            generated_sequences(self.source, count, length, self.request.seed, self.finished)
        )
