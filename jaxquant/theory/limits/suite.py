"""All limits of a language model, in one run that can be killed and resumed."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxquant.core.arguments import check_arguments
from jaxquant.durable.states import Remembered
from jaxquant.durable.store import Arrays, Finished
from jaxquant.theory.limits.effort import EFFORTS, Effort
from jaxquant.theory.limits.limit import Limit, Suite
from jaxquant.theory.limits.pair import Pair, Progress, check_text
from jaxquant.theory.limits.sections import SECTIONS, Rows
from jaxquant.theory.limits.subject import Subject


def run_suite(
    model: Subject,
    against: Subject | None = None,
    *,
    effort: str | Effort = "default",
    key: Array | None = None,
    finished: Finished | None = None,
    progress: Progress | None = None,
) -> Suite:
    """Check every limit on a language model, on its text.

    Args:
      model: the model; see `theory.limits.subject.Subject`, and `subject_of` of
        `jaxquant_models.runs.limits` for the models of this library.
      against: the reference, usually the float model that `model` was quantized from. If None,
        `model` is the reference, and its first quantized variant is judged.
      effort: "fast", "default", or an `Effort`.
      key: random key of the sampling and of random experiments. Default: `jax.random.key(0)`.
      finished: store of finished passes and rows, such as a `durable.store.Folder`; a run that was
        killed continues with it. None: nothing is kept.
      progress: called with the name of each finished stage and its seconds; a stage that was found
        in the store is not reported.
    Returns:
      The rows. The seconds of stages that have several rows are spread evenly over them; a pass
      that several stages need counts for the first of them.
    Raises:
      ValueError: the effort is unknown; the text is too short; the models have different
        vocabularies; there is nothing to judge; weights, activations or logits are not finite.
    """
    check_arguments(run_suite, locals())
    chosen = _effort(effort)
    key = jax.random.key(0) if key is None else key
    tell = progress or (lambda name, seconds: None)
    reference = model if against is None else against
    check_text(reference, chosen)
    stores = [np.asarray(reference.tokens), model.stored, against and against.stored]
    settings = f"{chosen} {np.asarray(jax.random.key_data(key)).tolist()} {model.name}"
    kept = Remembered(finished, settings, stores)
    judged = _first_variant(model) if against is None else model
    pair = Pair(reference, judged, chosen, key, kept, tell)
    pair.check_finite()
    rows: list[Limit] = []
    for name, section in SECTIONS.items():
        rows += _section(name, lambda section=section: section(pair), kept, tell)
    return Suite(tuple(rows))


def _first_variant(model: Subject) -> Subject:
    for make in model.variants().values():
        return make()
    raise ValueError(
        f"{model.name} has no quantized versions, so that there is nothing to judge; pass the "
        "float model as `against`"
    )


def _effort(effort: str | Effort) -> Effort:
    if isinstance(effort, Effort):
        return effort
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    return EFFORTS[effort]


def _section(
    name: str, compute: Callable[[], Rows], kept: Remembered, tell: Progress
) -> list[Limit]:
    """Return the rows of a section, with its seconds spread over them."""

    def timed() -> Arrays:
        start = time.perf_counter()
        found = [row.to_json() for row in compute()]
        seconds = time.perf_counter() - start
        tell(name, seconds)
        for row in found:
            row["seconds"] = seconds / len(found)
        return {"rows": np.frombuffer(json.dumps(found).encode(), np.uint8)}

    found = kept.get(f"rows of {name}", timed)
    return [_row(row) for row in json.loads(np.asarray(found["rows"]).tobytes())]


def _row(given: Mapping[str, Any]) -> Limit:
    return Limit(**{name: value for name, value in given.items() if name != "verdict"})
