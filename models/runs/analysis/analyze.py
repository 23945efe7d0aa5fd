"""The analysis of a model: its stages, one after the other, each kept when it is done."""

import datetime
from typing import Any, NamedTuple

from jaxquant.core.tree import tree_bytes
from jaxquant.durable.store import Folder
from jaxquant_models.runs.analysis import activations, behavior, tensors, walls
from jaxquant_models.runs.analysis.advice import advice_of
from jaxquant_models.runs.analysis.findings import findings
from jaxquant_models.runs.analysis.frontier import MIXED, Measured, measure
from jaxquant_models.runs.analysis.identity import identity
from jaxquant_models.runs.analysis.kept import Kept
from jaxquant_models.runs.analysis.outer import Heavy, heaviest
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.analysis.temperatures import temperatures
from jaxquant_models.runs.fingerprints import VERSIONS
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.schemas.report import (
    ChipRow,
    Dimensions,
    Energy,
    Histogram,
    Identity,
    LimitRow,
    Report,
    TensorRow,
)

Json = dict[str, Any]
QUANTIZED = (
    "frontier and advice: left out, since MODEL is quantized; give the float model with --against"
)
AT_THE_KNEE = (
    "temperatures of tensors: those of {method} at the bits of {name}, the knee of the frontier"
)


class Analyzed(NamedTuple):
    """The result of an analysis.

    Attributes:
      report: the report; `{out}` in its commands stands for the folder of the recipes.
      recipes: contents of the recipes by the name of their files.
    """

    report: Report
    recipes: dict[str, Any]


def analyze(subjects: Subjects, finished: Folder, reporter: Reporter) -> Analyzed:
    """Run every stage that is not finished, and return the report.

    Args:
      subjects: the models and the text.
      finished: the results of finished stages, including those of earlier runs.
      reporter: receives reports of the work.
    Raises:
      ValueError: weights or activations are not finite.
    """
    kept, notes = Kept(finished, reporter.tell), list[str]()
    stored = kept.stage("entropy", lambda: tensors.stored_rows(subjects.request.model, reporter))
    outliers = kept.stage("outliers", lambda: activations.outliers(subjects))
    dimensions = _dimensions(subjects, kept, reporter, notes)
    measured = _measured(subjects, kept, finished, reporter)
    if measured is None:
        notes.append(QUANTIZED)
    rows, histograms = _tensors(subjects, kept, stored, outliers, measured, notes)
    about = Identity(**kept.stage("identity", lambda: identity(subjects, rows).model_dump()))
    limits = _limits(subjects, kept, finished, reporter, notes)
    wall = kept.stage("roofline and energy", lambda: _walls(subjects))
    chips = [ChipRow(**row) for row in wall["chips"]]
    advice = [] if measured is None else advice_of(subjects, measured)
    frontier = None if measured is None else measured.frontier
    report = Report(
        made=_made(),
        seconds=kept.seconds,
        identity=about,
        tensors=rows,
        histograms=histograms,
        frontier=frontier,
        dimensions=dimensions,
        limits=limits,
        context=walls.context_of(subjects),
        roofline=chips,
        energy=Energy(**wall["energy"]),
        advice=advice,
        findings=findings(
            rows, frontier, dimensions, limits, chips, outliers, _heavy(subjects, measured)
        ),
        notes=notes,
    )
    return Analyzed(report, _recipes(measured))


def _made() -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": now, **VERSIONS}


def _dimensions(
    subjects: Subjects, kept: Kept, reporter: Reporter, notes: list[str]
) -> Dimensions | None:
    models = 1 if subjects.against is None else 2

    def found() -> Json | str:
        total = models * subjects.model.config.n_layers
        with reporter.stage("dimension by layer", total) as step:
            return _dumped(activations.dimensions(subjects, step))

    value = kept.stage("dimensions", found)
    if isinstance(value, str):
        notes.append(value)
        return None
    return Dimensions(**value)


def _dumped(value: Dimensions | str) -> Json | str:
    return value if isinstance(value, str) else value.model_dump()


def _measured(
    subjects: Subjects, kept: Kept, finished: Folder, reporter: Reporter
) -> Measured | None:
    if subjects.reference is None:
        return None
    run = lambda: measure(subjects, kept, finished, reporter).to_json()
    return Measured.from_json(kept.stage("frontier", run))


def _tensors(
    subjects: Subjects,
    kept: Kept,
    stored: Json,
    outliers: Json,
    measured: Measured | None,
    notes: list[str],
) -> tuple[list[TensorRow], list[Histogram]]:
    relative: dict[str, float] = {}
    hot: dict[str, float] = {}
    if measured is not None:
        relative = dict(measured.errors.relative)
        now = {p: about["stored"] for p, about in stored.items()}
        hot = temperatures(measured.curves, now if subjects.against else measured.bits)
        if hot and not subjects.against:
            notes.append(AT_THE_KNEE.format(method=MIXED, name=measured.knee))

    def found() -> Json:
        rows = tensors.tensor_rows(subjects, stored, outliers["kinds"], relative, hot)
        return {"rows": [r.model_dump() for r in rows[0]], "all": [h.model_dump() for h in rows[1]]}

    value = kept.stage("tensors", found)
    return [TensorRow(**r) for r in value["rows"]], [Histogram(**h) for h in value["all"]]


def _limits(
    subjects: Subjects, kept: Kept, finished: Folder, reporter: Reporter, notes: list[str]
) -> list[LimitRow]:
    def found() -> list[Json] | str:
        rows = behavior.limits(subjects, finished, reporter)
        return rows if isinstance(rows, str) else [row.model_dump() for row in rows]

    value = kept.stage("limits", found)
    if isinstance(value, str):
        notes.append(value)
        return []
    return [LimitRow(**row) for row in value]


def _walls(subjects: Subjects) -> Json:
    chips = [row.model_dump() for row in walls.roofline_rows(subjects)]
    return {"chips": chips, "energy": walls.energy(subjects).model_dump()}


def _heavy(subjects: Subjects, measured: Measured | None) -> Heavy | None:
    """Return what is heavy in MODEL if it is quantized, or else in the knee of the frontier."""
    if subjects.packed:
        params = subjects.model.params
        return heaviest(params, tree_bytes(params), subjects.request.model)
    return None if measured is None else measured.heavy


def _recipes(measured: Measured | None) -> dict[str, Any]:
    """Return the recipes that the commands name, by file name."""
    if measured is None:
        return {}
    return {mixture.file: mixture.recipe for mixture in measured.mixtures}
