"""A quantization under way: its steps in order; it may be killed at any moment and goes on."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

import jaxquant as jq
from jaxquant.core.paths import matches
from jaxquant.durable.store import Finished
from jaxquant.evaluate import evaluate
from jaxquant.tuning.heal import BLOCKS
from jaxquant.tuning.learned_transforms import Transforms
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.calibration import CALIBRATION, calibrate_model
from jaxquant_models.runs.generated_text import generated_sequences
from jaxquant_models.runs.healing import heal_model
from jaxquant_models.runs.module_loss import ModuleLoss
from jaxquant_models.runs.quantization import learn_transforms, plan_model, quantize_model
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter, Step
from jaxquant_models.runs.rotation import learned_rotation, random_rotation, rotate_model
from jaxquant_models.runs.sequences import HELD_OUT, context_length, split

JUDGED = 4  # sequences that scales are judged on
MEASURED = HELD_OUT // 4  # sequences that an allocation is judged on
MOST_GENERATED = 128  # sequences that a model writes to train on, unless one step takes more


class Sequences(NamedTuple):
    """The token sequences of a job, each an array [N, length].

    Attributes:
      calibration: the sequences to calibrate on.
      unseen: sequences of the same text to judge on; empty if nothing is to be judged.
      training: the sequences to train on; None if the model has to write them first.
      held_out: the sequences to judge training on; None if the model has to write them first.
    """

    calibration: np.ndarray
    unseen: np.ndarray
    training: np.ndarray | None = None
    held_out: np.ndarray | None = None


class Needs(NamedTuple):
    """What the methods of a request ask for.

    Attributes:
      statistics: whether they ask for any statistics of inputs.
      gram: whether they ask for second moments of inputs.
      channels: whether they ask for the sizes of single channels, or for a sample.
      output: patterns of the weights whose output-side statistics they ask for.
      sample: how many rows of each input they ask for, of either kind.
      module_loss: whether they search for scales that the output of a module judges.
    """

    statistics: bool
    gram: bool
    channels: bool
    output: tuple[str, ...]
    sample: int
    module_loss: bool


@dataclasses.dataclass(eq=False)
class QuantizationJob:
    """A quantization under way.

    Attributes:
      request: what is asked for.
      source: the model to quantize. If its residual stream is to be rotated, it has a head apart,
        and the rotated model takes its place, so that memory holds one of them.
      needs: what the methods of the request ask for.
      sequences: the token sequences that the request needs.
      plan: the resolved recipe; None if methods are to be allocated.
      finished: the results of steps that are over, of earlier runs of the same job too.
      reporter: who is told of the work.
    """

    request: QuantizationRequest
    source: Model
    needs: Needs
    sequences: Sequences
    plan: jq.Plan | None
    finished: Finished
    reporter: Reporter

    def run(self) -> tuple[Model, jq.Recipe]:
        """Run every step that is not finished, and return the model and the recipe that made it."""
        self._rotate()
        stats = self._statistics()
        recipe = self.request.recipe
        if recipe is None:
            recipe = self._allocated(stats)
        transforms = self._learned_transforms(recipe, stats)
        result = self._quantized(recipe, stats, transforms)
        return self._healed(result), recipe

    @property
    def _key(self) -> jax.Array:
        return jax.random.key(self.request.seed)

    def _rotate(self) -> None:
        """Put the model with a rotated residual stream in the source's place, if asked to."""
        rotating = self.request.rotating
        if not self.request.rotation:
            return
        with self.reporter.stage("rotating", rotating.steps if rotating else 0) as step:
            rotation = random_rotation(self.source, self._key)
            if rotating is not None and self.request.recipe is not None:
                rotation = self._learned_rotation(self.request.recipe, rotating, rotation, step)
            self.source = rotate_model(self.source, rotation)

    def _learned_rotation(
        self, recipe: jq.Recipe, rotating: jq.Healing, start: Float[Array, "d d"], step: Step
    ) -> Float[Array, "d d"]:
        """A rotation learned from a start, on the sequences to train on.

        If the model has yet to write these, the rotation is learned on the text of calibration.
        """
        training, held_out = self.sequences.training, self.sequences.held_out
        if training is None or held_out is None:
            training, held_out = self.sequences.calibration, self.sequences.unseen
        stats = None
        if self.needs.channels:
            begun, name = rotate_model(self.source, start), f"{CALIBRATION} before rotating"
            stats = self._calibrated(begun, lambda _: None, name)
        return learned_rotation(
            self.source, recipe, training, rotating, start=start, stats=stats, key=self._key,
            validation=held_out, progress=step, finished=self.finished,
        )  # fmt: skip

    def _statistics(self) -> jq.Stats | None:
        """Statistics of the inputs of weights, if any step needs them."""
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
        """The recipe that gives every weight the method at which the model loses least."""
        source, request = self.source, self.request
        teacher = (source.apply_fn, source.params)
        judged = self.sequences.unseen[:MEASURED]

        def distance(params: PyTree) -> float:
            student = jq.quantized(source.apply_fn)
            return evaluate(student, jq.dequantize(params), judged, against=teacher).kl

        kinds = sum(matches(path, LAYER_MATRICES) for path, _ in jq.path_leaves(source.params))
        with self.reporter.stage("allocating", len(request.choices) * kinds) as step:
            allocation = jq.allocate(
                source.params, request.choices, request.target_bits, stats,
                paths=[LAYER_MATRICES], measure=distance, healed=request.healing is not None,
                key=self._key, progress=step, finished=self.finished,
            )  # fmt: skip
        self.reporter.tell(str(allocation))
        return allocation.recipe

    def _learned_transforms(self, recipe: jq.Recipe, stats: jq.Stats | None) -> Transforms | None:
        """Transforms of inputs trained end to end, if asked to."""
        learning = self.request.learning
        if learning is None:
            return None
        with self.reporter.stage("learning", learning.steps) as step:
            training, held_out = self._training()
            return learn_transforms(
                self.source, recipe, stats, training, learning, validation=held_out,
                key=self._key, inspect=self._module_loss(), progress=step, finished=self.finished,
            )  # fmt: skip

    def _quantized(
        self, recipe: jq.Recipe, stats: jq.Stats | None, transforms: Transforms | None
    ) -> Model:
        """The model with rounded weights."""
        plan = plan_model(self.source, recipe) if self.plan is None else self.plan
        with self.reporter.stage("quantizing", plan.matrices) as step:
            return quantize_model(
                self.source, recipe, stats, key=self._key, inspect=self._module_loss(),
                transforms=transforms, progress=step, finished=self.finished,
            )  # fmt: skip

    def _healed(self, result: Model) -> Model:
        """The rounded model trained to be like the source, if asked to."""
        healing, recoding = self.request.healing, self.request.recoding
        if healing is None:
            return result
        steps = healing.steps + (recoding.steps if recoding else 0)
        blocks = BLOCKS.steps * self.source.config.n_layers
        with self.reporter.stage("healing", blocks + steps) as step:
            training, held_out = self._training()
            return heal_model(
                self.source, result, training, held_out, healing, recoding,
                progress=step, finished=self.finished,
            )  # fmt: skip

    def _module_loss(self) -> ModuleLoss | None:
        """The judge of scales that are searched for, if any are."""
        if not self.needs.module_loss:
            return None
        return ModuleLoss(self.source, self.sequences.calibration[:JUDGED])

    def _training(self) -> tuple[np.ndarray, np.ndarray]:
        """Sequences to train on, and those held out; the model writes them if asked to."""
        if self.sequences.training is not None and self.sequences.held_out is not None:
            return self.sequences.training, self.sequences.held_out
        stages = self.request.training
        most = max(MOST_GENERATED, *(how.batch_size for how in stages))
        count = min(max(how.steps * how.batch_size for how in stages), most) + HELD_OUT
        length = context_length(self.source)
        return split(
            generated_sequences(self.source, count, length, self.request.seed, self.finished)
        )
