"""A quantization that can be killed at any moment: the same command goes on where it stopped."""

import dataclasses
import hashlib
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxquant as jq
from jaxquant.calibration.statistics import Probe
from jaxquant.durable.store import Folder
from jaxquant.recipes.serialize import to_json
from jaxquant.tuning.learned_transforms import Transforms
from jaxquant_models.readers.registry import Model
from jaxquant_models.runs import pipeline, self_text
from jaxquant_models.runs.inspection import Inspector
from pallas_kernels import viterbi

SAMPLE = 256  # rows of every input kept to fit transforms to, and as many at random
INSPECTED = 4  # sequences that scales are judged on
SAVE_EVERY = 16  # sequences between two copies of the statistics on disk
CALIBRATION = "calibration"
GENERATED = "generated"  # text of the model's own
HELD_OUT = 8  # sequences kept apart to judge healing on; an allocation, on a quarter of them


@dataclasses.dataclass(frozen=True)
class Job:
    """All that decides the result.

    Attributes:
      recipe: or, to have methods allocated, None.
      text: calibrated on. tokens: how many of it.
      choices, target_bits: methods to allocate, and the average to keep.
      learning: how to train transforms of inputs before; None: as they are fitted.
      healing: how to train at last; None: not at all.
      recoding: how to train the codes of learned codebooks after that; None: not at all.
      heal_text: to train on, "" for the text calibrated on; or `GENERATED`.
      rotate: the residual stream first: "" not, "random" or "learned". rotating: how to learn it.
    """

    recipe: jq.Recipe | None
    text: str
    tokens: int
    weighting: str
    seed: int
    choices: tuple[jq.Method, ...] = ()
    target_bits: float = 0.0
    learning: jq.Healing | None = None
    healing: jq.Healing | None = None
    recoding: jq.Healing | None = None
    heal_text: str = ""
    rotate: str = ""
    rotating: jq.Healing | None = None

    @property
    def rules(self) -> list[tuple[str, jq.Method]]:
        """Which methods weights may get."""
        if self.recipe is None:
            return [(pipeline.LAYERS, m) for m in self.choices]
        return [(p, m) for p, m in self.recipe.rules if isinstance(m, jq.Method)]

    @property
    def trains(self) -> list[jq.Healing]:
        """All training on sequences, in its order."""
        stages = (self.rotating, self.learning, self.healing, self.recoding)
        return [how for how in stages if how is not None]

    @property
    def needs_statistics(self) -> bool:
        """Whether there is anything to calibrate for."""
        kinds = ("gram", "output", "channels", "sample")
        needed = any(getattr(m, f"needs_{kind}") for _, m in self.rules for kind in kinds)
        return needed or self.recipe is None

    @property
    def gram(self) -> bool:
        """Whether second moments are needed."""
        return self.recipe is None or any(m.needs_gram for _, m in self.rules)

    @property
    def sample(self) -> int:
        """Rows of inputs that are needed, of either kind."""
        return SAMPLE if any(m.needs_sample for _, m in self.rules) else 0

    @property
    def inspects(self) -> bool:
        """Whether scales are searched for that a module's output judges."""
        searched = (m for _, m in self.rules if getattr(m.input, "searched", False))
        return any(m.activations is None for m in searched)

    @property
    def output(self) -> tuple[str, ...]:
        """Globs of weights whose output-side statistics are needed."""
        return tuple(dict.fromkeys(p for p, m in self.rules if m.needs_output))

    def fingerprint(self, source: Model) -> dict[str, Any]:
        """Plain values that differ where results may: of the job, the weights, the libraries."""
        return {
            "jaxquant": jq.__version__,
            "jax": jax.__version__,
            "encoder": viterbi.backend(),
            "weights": digest_of(source),
            "prefix": source.prefix,
            "recipe": self.recipe and self.recipe.to_json(),
            "choices": [to_json(m) for m in self.choices],
            **{
                name: (how := getattr(self, name)) and dataclasses.asdict(how)
                for name in ("learning", "healing", "recoding", "rotating")
            },
            "rotate": self.rotate,
            **{f: hash_of(getattr(self, f)) for f in ("text", "heal_text")},
            **{f: getattr(self, f) for f in ("tokens", "weighting", "seed", "target_bits")},
        }


def digest_of(source: Model) -> str:
    """Of its weights, packed or not."""
    digest = hashlib.sha256()
    for path, w in jax.tree_util.tree_leaves_with_path(source.params):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(w).tobytes())
    return digest.hexdigest()


def hash_of(text: str) -> str:
    """Of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


class Data(NamedTuple):
    """Token sequences, each [N, length].

    Attributes:
      calibration: to calibrate on.
      unseen: of the same text, kept apart to judge on; empty where nothing is to be judged.
      training: to heal on; None for what the model has to write first.
      held_out: to judge healing on.
    """

    calibration: np.ndarray
    unseen: np.ndarray
    training: np.ndarray | None = None
    held_out: np.ndarray | None = None


def data(job: Job, source: Model) -> Data:
    """The job's sequences.

    Raises:
      ValueError: a text is too short to keep a part of it apart.
    """
    none = np.empty((0, 0), np.int32)
    if not job.needs_statistics and not job.trains:
        return Data(none, none)
    cut = lambda text: pipeline.pieces(source, text, pipeline.context(source))
    if job.recipe is not None and not job.trains:
        return Data(pipeline.first(cut(job.text), job.tokens), none)
    fit, unseen = split(cut(job.text))
    calibration = pipeline.first(fit, job.tokens)
    if job.heal_text == GENERATED:
        return Data(calibration, unseen)
    own = (fit, unseen) if not job.heal_text else split(cut(job.heal_text))
    batch = max((how.batch_size for how in job.trains), default=0)
    if len(own[0]) < batch:
        raise ValueError(
            f"the text to heal on has {len(own[0])} sequences of {own[0].shape[1]} tokens, fewer "
            f"than one step takes, {batch}: give a longer one or a smaller batch"
        )
    return Data(calibration, unseen, *own)


def split(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All but the last ones, and these: a quarter, at most `HELD_OUT`."""
    if len(sequences) < 3:
        raise ValueError(
            f"the text has {len(sequences)} sequences of {sequences.shape[1]} tokens; to train "
            f"or to share bits out takes 3 or more, since some are kept apart: give a longer text"
        )
    kept = max(1, min(HELD_OUT, len(sequences) // 4))
    return sequences[:-kept], sequences[-kept:]


def calibrated(
    job: Job, source: Model, sequences: np.ndarray, folder: Folder, progress: Callable[[int], None],
    name: str = CALIBRATION,
) -> jq.Stats:  # fmt: skip
    """The job's statistics; what is in the folder, under the name, is not measured again."""

    def save(count: int, sums: dict[str, Probe]) -> None:
        if count % SAVE_EVERY and count != len(sequences):
            return
        arrays = {f"{path}:{f}": a for path, p in sums.items() for f, a in p._asdict().items()}
        folder[name] = {":": count, **{n: a for n, a in arrays.items() if a is not None}}

    resume = None
    if name in folder:
        arrays = folder[name]
        count = int(arrays.pop(":"))
        paths = {key.rpartition(":")[0] for key in arrays}
        probe = lambda path: Probe(*(arrays.get(f"{path}:{field}") for field in Probe._fields))
        resume = (count, {path: probe(path) for path in sorted(paths)})
    return pipeline.calibrate_on(
        source, sequences, weighting=job.weighting, gram=job.gram, output=job.output,
        sample=job.sample, progress=progress, save=save, resume=resume,
    )  # fmt: skip


def allocated(
    job: Job, source: Model, unseen: np.ndarray, stats: jq.Stats, folder: Folder,
    progress: Callable[..., None],
) -> jq.Allocation:  # fmt: skip
    """A method for every weight of the layers, by what each costs the model on unseen text."""

    def measure(params: Any) -> float:
        return pipeline.distance(source, jq.dequantize(params), unseen[: HELD_OUT // 4])

    return jq.allocate(
        source.params, job.choices, job.target_bits, stats,
        paths=[pipeline.LAYERS], measure=measure, healed=job.healing is not None,
        key=jax.random.key(job.seed), progress=progress, finished=folder,
    )  # fmt: skip


def learned(
    job: Job, learning: jq.Healing, recipe: jq.Recipe, source: Model, stats: jq.Stats, data: Data,
    folder: Folder, progress: Callable[..., None],
) -> Transforms:  # fmt: skip
    """Transforms for `quantized`; goes on from the folder."""
    return pipeline.learned(
        source, recipe, stats, *_training(job, source, data, folder), learning,
        progress=progress, finished=folder, **_fitting(job, source, data),
    )  # fmt: skip


def quantized(
    job: Job, recipe: jq.Recipe, source: Model, stats: jq.Stats | None, data: Data,
    folder: Folder, progress: Callable[..., None], transforms: Transforms | None = None,
) -> Model:  # fmt: skip
    """The quantized model; matrices in the folder are not done again."""
    return pipeline.quantized_model(
        source, recipe, stats, transforms=transforms, progress=progress, finished=folder,
        **_fitting(job, source, data),
    )  # fmt: skip


def _fitting(job: Job, source: Model, data: Data) -> dict[str, Any]:
    """What decides how transforms are fitted."""
    inspect = Inspector(source, data.calibration[:INSPECTED]) if job.inspects else None
    return {"key": jax.random.key(job.seed), "inspect": inspect}


def healed(
    job: Job, healing: jq.Healing, source: Model, result: Model, data: Data, folder: Folder,
    progress: Callable[[Any], None],
) -> Model:  # fmt: skip
    """The quantized model, trained to be like the source; goes on from the folder."""
    training, held_out = _training(job, source, data, folder)
    return pipeline.healed(
        source, result, training, held_out, healing, progress, folder, job.recoding
    )


def _training(job: Job, source: Model, data: Data, folder: Folder) -> tuple[np.ndarray, np.ndarray]:
    """Sequences to train on, and those held out."""
    if data.training is not None and data.held_out is not None:
        return data.training, data.held_out
    return split(_generated(job, source, folder))


def _generated(job: Job, source: Model, folder: Folder) -> np.ndarray:
    """Sequences that the model writes, at most 128 to train on; those in the folder."""
    most = max(128, *(how.batch_size for how in job.trains))
    wanted = max(how.steps * how.batch_size for how in job.trains)
    count = min(wanted, most) + HELD_OUT
    return written(source, count, pipeline.context(source), job.seed, folder)


def written(
    source: Model, count: int, length: int, seed: int, folder: MutableMapping[str, Any]
) -> np.ndarray:
    """Sequences [count, length] that the model writes; those in the folder, if it holds any."""
    if GENERATED not in folder:
        tokens = self_text.written(source, count, length, jax.random.key(seed))
        folder[GENERATED] = {"tokens": tokens}
    return folder[GENERATED]["tokens"]
