"""A quantization that can be killed at any moment: the same command goes on where it stopped."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxquant as jq
from jaxquant.calibrate import Probe
from jaxquant.resume import Folder
from models import pipeline
from models.registry import Model
from pallas_kernels import viterbi

SAVE_EVERY = 16  # sequences between two copies of the statistics on disk
CALIBRATION = "calibration"


@dataclasses.dataclass(frozen=True)
class Job:
    """All that decides the result.

    Attributes:
      text: calibrated on. tokens: how many of it.
      output: globs of weights whose output-side statistics the recipe needs.
    """

    recipe: jq.Recipe
    text: str
    tokens: int
    weighting: str
    seed: int

    @property
    def output(self) -> tuple[str, ...]:
        chosen = [(p, m) for p, m in self.recipe.rules if isinstance(m, jq.Method)]
        return tuple(p for p, m in chosen if m.rounder.needs_output)

    def fingerprint(self, source: Model) -> dict[str, Any]:
        """Plain values that differ where results may: of the job, the weights, the libraries."""
        digest = hashlib.sha256()
        for path, w in jq.path_leaves(source.params):
            digest.update(path.encode() + np.ascontiguousarray(w).tobytes())
        return {
            "jaxquant": jq.__version__,
            "jax": jax.__version__,
            "encoder": viterbi.backend(),
            "weights": digest.hexdigest(),
            "recipe": self.recipe.to_json(),
            "text": hashlib.sha256(self.text.encode()).hexdigest(),
            **{name: getattr(self, name) for name in ("tokens", "weighting", "seed")},
        }


def folder_of(out: str | Path) -> Path:
    """Where a job that writes to `out` keeps its work, until it is done."""
    out = Path(out).absolute()
    return out.with_name(f"{out.name}.partial")


def calibrated(
    job: Job, source: Model, folder: Folder, progress: Callable[[int], None]
) -> jq.Stats:
    """The job's statistics; what is in the folder is not measured again."""

    def save(count: int, sums: dict[str, Probe]) -> None:
        if count % SAVE_EVERY and count != max(1, job.tokens // pipeline.CONTEXT):
            return
        arrays = {f"{path}:{f}": a for path, p in sums.items() for f, a in p._asdict().items()}
        folder[CALIBRATION] = {":": count, **{n: a for n, a in arrays.items() if a is not None}}

    resume = None
    if CALIBRATION in folder:
        arrays = folder[CALIBRATION]
        count = int(arrays.pop(":"))
        paths = {name.rpartition(":")[0] for name in arrays}
        probe = lambda path: Probe(*(arrays.get(f"{path}:{field}") for field in Probe._fields))
        resume = (count, {path: probe(path) for path in sorted(paths)})
    return pipeline.calibrate(
        source, job.text, job.tokens, weighting=job.weighting, output=job.output,
        progress=progress, save=save, resume=resume,
    )  # fmt: skip


def quantized(
    job: Job, source: Model, stats: jq.Stats | None, folder: Folder, progress: Callable[..., None]
) -> Model:
    """The quantized model; matrices in the folder are not done again."""
    key = jax.random.key(job.seed)
    return pipeline.quantized_model(
        source, job.recipe, stats, key=key, progress=progress, finished=folder
    )
