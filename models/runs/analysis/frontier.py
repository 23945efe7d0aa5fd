"""Stage: the rate-quality frontier of the reference's quantized versions, and mixtures of them."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jaxquant as jq
from jaxquant.core.greedy_allocation import cheapest
from jaxquant.core.tree import tree_bytes
from jaxquant.durable.store import Folder
from jaxquant.evaluation import Evaluation
from jaxquant_models.runs.analysis.kept import Kept
from jaxquant_models.runs.analysis.knee import knee, with_frontier
from jaxquant_models.runs.analysis.outer import BITS, HEAVY, Heavy, heaviest, rounded_outer
from jaxquant_models.runs.analysis.request import AnalysisRequest
from jaxquant_models.runs.analysis.rounding import Errors, Rounded, errors_of, round_all
from jaxquant_models.runs.analysis.scores import Scores
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.analysis.variants import command_of, quoted, variants_of
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.schemas.report import Frontier, Point

MIXED = "gptq"  # the method whose widths are mixed


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A version in which every stack has the width that lowers the loss most.

    Attributes:
      point: what was measured.
      bits: bits of each stack, by path.
      file: name of the recipe's file.
      recipe: the recipe, as JSON.
      predicted: KL divergence that the losses of the stacks predict.
      outer: whether the outer matrices are rounded too.
    """

    point: Point
    bits: dict[str, int]
    file: str
    recipe: list[dict[str, Any]]
    predicted: float
    outer: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the stage has found.

    Attributes:
      frontier: the section of the report.
      mixtures: the versions that have a recipe, which are among the points of the frontier too.
      errors: errors of outputs.
      knee: name of the knee of the frontier before outer matrices are rounded; "" for none.
      bits: bits per weight of each stack of the knee, by path.
      heavy: the largest matrix that the knee leaves in floating point.
      curves: for each stack, (bits per weight, estimated KL divergence) of the mixed method.
    """

    frontier: Frontier
    mixtures: Sequence[Mixture]
    errors: Errors
    curves: Mapping[str, Sequence[tuple[float, float]]]
    knee: str
    bits: Mapping[str, float]
    heavy: Heavy | None

    @property
    def best(self) -> Point | None:
        """The knee of the frontier."""
        return next((p for p in self.frontier.points if p.command and p.name == self.knee), None)

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        out = dataclasses.asdict(self)
        out["frontier"] = self.frontier.model_dump()
        for mixture, found in zip(self.mixtures, out["mixtures"], strict=True):
            found["point"] = mixture.point.model_dump()
        return out

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Measured":
        """Return what `to_json` made into JSON values.

        Args:
          value: the values.
        """
        mixtures = [Mixture(**{**m, "point": Point(**m["point"])}) for m in value["mixtures"]]
        errors, frontier = Errors(**value["errors"]), Frontier(**value["frontier"])
        curves = {p: [tuple(pair) for pair in of] for p, of in value["curves"].items()}
        heavy = None if value["heavy"] is None else Heavy(*value["heavy"])
        return Measured(frontier, mixtures, errors, curves, value["knee"], value["bits"], heavy)


def measure(subjects: Subjects, kept: Kept, finished: Folder, reporter: Reporter) -> Measured:
    """Quantize the reference in several ways, and compare each version with it.

    Args:
      subjects: the models and the text; there is a reference.
      kept: store of the results of single versions.
      finished: store of the quantized layers.
      reporter: receives reports of the work.
    """
    variants = variants_of(subjects.request, subjects.source.outline)
    if not variants:
        raise ValueError("no method fits the matrices of this model")
    rounded = round_all(subjects, variants, finished, reporter)
    errors = errors_of(rounded)
    scores = Scores(subjects, kept, finished)
    own = [] if subjects.against is None else [_own_point(subjects, scores)]
    sizes = [rounded.bytes(n) for n in range(len(variants))]
    uniform = _uniform(rounded, sizes, scores, reporter)
    table = _Table.of(rounded, errors, sizes, uniform)
    mixtures = _mixtures(table, [*own, *uniform], scores, reporter)
    best = knee(with_frontier([*uniform, *(m.point for m in mixtures)]))
    chosen = {} if best is None else _numbers(table, best, mixtures)
    heavy = None if best is None else heaviest(rounded.outer, best.bytes, best.name)
    if best is not None and heavy is not None and heavy.share > HEAVY:
        mixtures += _lighter(table, best, chosen, mixtures, scores, reporter)
    everything = with_frontier([*own, *uniform, *(m.point for m in mixtures)])
    place = {p.name: p for p in everything if p.command}
    mixtures = [dataclasses.replace(m, point=place[m.point.name]) for m in mixtures]
    reference = scores.of_reference()
    frontier = Frontier(
        reference=subjects.reference_spec, perplexity=reference.perplexity,
        points=everything, tokens=reference.tokens_scored,
    )  # fmt: skip
    bits = {p: 8 * sizes[n][p] / rounded.sizes[p] for p, n in chosen.items()}
    name = "" if best is None else best.name
    return Measured(frontier, mixtures, errors, table.curves(), name, bits, heavy)


def _uniform(
    rounded: Rounded, sizes: Sequence[Mapping[str, int]], scores: Scores, reporter: Reporter
) -> list[Point]:
    """Return the points of the versions of one width."""
    subjects, points = rounded.subjects, []
    with reporter.stage("comparing", len(sizes)) as step:
        for n, variant in enumerate(rounded.variants):
            found = scores.of(variant.name, lambda n=n: rounded.dense(lambda _: n))
            command = command_of(subjects.reference_spec, variant, subjects.request.effort)
            points.append(_point(variant.name, command, sizes[n], rounded, found))
            step(None)
    return points


def _own_point(subjects: Subjects, scores: Scores) -> Point:
    params, found = subjects.model.params, scores.own()
    return Point(
        name=subjects.request.model, command="", bits_per_weight=jq.bits_per_weight(params),
        bytes=tree_bytes(params), kl=max(0.0, found.kl or 0.0), top1=found.top1_agreement or 0.0,
        perplexity=found.perplexity, on_frontier=False,
    )  # fmt: skip


def _point(
    name: str, command: str, sizes: Mapping[str, int], rounded: Rounded, found: Evaluation
) -> Point:
    """Return the point of a version, given the bytes of its stacks and its scores."""
    bits = 8 * sum(sizes[p] for p in rounded.sizes) / sum(rounded.sizes.values())
    return Point(
        name=name, command=command, bits_per_weight=bits,
        bytes=sum(sizes.values()) + rounded.outer_bytes, kl=max(0.0, found.kl or 0.0),
        top1=found.top1_agreement or 0.0, perplexity=found.perplexity, on_frontier=False,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Table:
    """Bytes and estimated losses of every stack under the widths of the mixed method.

    Attributes:
      rounded: the versions.
      versions: numbers of the versions of the mixed method, by increasing bits.
      sizes: for each version the bytes of all stacks, by path.
      paths: the stacks that are quantized.
      bytes, losses: for each stack one number per version.
      totals: measured KL divergence of each version.
      rest: bytes of all that is not in these stacks.
    """

    rounded: Rounded
    versions: Sequence[int]
    sizes: Sequence[Mapping[str, int]]
    paths: Sequence[str]
    bytes: Sequence[Sequence[int]]
    losses: Sequence[Sequence[float]]
    totals: Sequence[float]
    rest: int

    @staticmethod
    def of(
        rounded: Rounded,
        errors: Errors,
        sizes: Sequence[Mapping[str, int]],
        points: Sequence[Point],
    ) -> "_Table":
        """Build the table; the losses of a version are scaled such that they sum to its KL."""
        found = [n for n, v in enumerate(rounded.variants) if v.method == MIXED]
        versions = sorted(found, key=lambda n: rounded.variants[n].bits)
        paths = list(rounded.sizes)
        totals = [points[n].kl for n in versions]
        sums = [sum(errors.losses[n].values()) for n in versions]
        scale = [kl / total if total > 0 else 0.0 for kl, total in zip(totals, sums, strict=True)]
        return _Table(
            rounded, versions, sizes, paths,
            [[sizes[n][p] for n in versions] for p in paths],
            [[errors.losses[n].get(p, 0.0) * s for n, s in zip(versions, scale, strict=True)]
             for p in paths],
            totals,
            sum(b for p, b in sizes[0].items() if p not in paths) + rounded.outer_bytes,
        )  # fmt: skip

    def budgets(self, points: Sequence[Point]) -> list[int]:
        """Return the bytes for which mixtures are made: of MODEL, and halfway between widths."""
        low, high = (self.rest + sum(f(b) for b in self.bytes) for f in (min, max))
        own = [p.bytes for p in points if not p.command]
        uniform = [self.rest + sum(b[i] for b in self.bytes) for i in range(len(self.versions))]
        halfway = [(a + b) // 2 for a, b in itertools.pairwise(uniform)]
        wanted = [*own, *halfway]
        return [b for b in dict.fromkeys(wanted) if low < b < high]

    def chosen(self, budget: int) -> list[int]:
        """Return the index of a version for each stack."""
        return cheapest(self.bytes, self.losses, budget - self.rest)

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return (bits per weight, loss) of each stack."""
        sizes = self.rounded.sizes
        return {
            p: [(8 * b / sizes[p], e) for b, e in zip(bytes_, losses, strict=True)]
            for p, bytes_, losses in zip(self.paths, self.bytes, self.losses, strict=True)
        }


def _mixtures(
    table: _Table, points: Sequence[Point], scores: Scores, reporter: Reporter
) -> list[Mixture]:
    """Return the mixtures for every budget, without repeats."""
    budgets, found = table.budgets(points), dict[str, Mixture]()
    with reporter.stage("mixing widths", len(budgets)) as step:
        for budget in budgets:
            made = _mixture(table, budget, scores)
            if made is not None:
                found.setdefault(made.point.name, made)
            step(None)
    return list(found.values())


def _mixture(table: _Table, budget: int, scores: Scores) -> Mixture | None:
    """Return the best mixture of at most so many bytes, measured; None if it mixes nothing."""
    chosen = table.chosen(budget)
    if len(set(chosen)) < 2:
        return None
    rounded = table.rounded
    number = {p: table.versions[i] for p, i in zip(table.paths, chosen, strict=True)}
    bits = {p: rounded.variants[n].bits for p, n in number.items()}
    version = lambda p: number.get(p, table.versions[0])
    own = {p: table.sizes[version(p)][p] for p in table.sizes[0]}
    rules = [(p, _method(rounded, p, n)) for p, n in number.items()]
    recipe = jq.Recipe([*rules, ("*", jq.KEEP)])
    mean = 8 * sum(own[p] for p in table.paths) / sum(rounded.sizes.values())
    name = f"{MIXED} mixed {mean:.2f} bits"
    digest = json.dumps(bits, sort_keys=True)
    found = scores.of(f"{name} {digest}", lambda: rounded.dense(version))
    file = f"{MIXED}-{mean:.2f}.json"
    request = rounded.subjects.request
    predicted = sum(losses[i] for losses, i in zip(table.losses, chosen, strict=True))
    command = recipe_command(request, rounded.subjects.reference_spec, file)
    point = _point(name, command, own, rounded, found)
    return Mixture(point, bits, file, recipe.to_json(), predicted)


def _numbers(table: _Table, point: Point, mixtures: Sequence[Mixture]) -> dict[str, int]:
    """Return the number of the version from which each stack of a version comes."""
    variants = table.rounded.variants
    for mixture in mixtures:
        if mixture.point.name == point.name:
            of_bits = {variants[n].bits: n for n in table.versions}
            return {path: of_bits[bits] for path, bits in mixture.bits.items()}
    number = next(n for n, v in enumerate(variants) if v.name == point.name)
    return dict.fromkeys(table.paths, number)


def _lighter(
    table: _Table,
    best: Point,
    chosen: Mapping[str, int],
    mixtures: Sequence[Mixture],
    scores: Scores,
    reporter: Reporter,
) -> list[Mixture]:
    """Return the version that rounds the outer matrices too, if they can be rounded."""
    rounded, first = table.rounded, next(iter(chosen.values()))
    version = lambda p: chosen.get(p, first)  # vectors are those of any version
    mixed = next((m for m in mixtures if m.point.name == best.name), None)
    recipe = rounded.variants[first].request.recipe
    if mixed is not None:
        recipe = jq.Recipe.from_json(mixed.recipe)
    outer = None if recipe is None else rounded_outer(rounded, recipe)
    if outer is None:
        return []
    name = f"{best.name} + {outer.name}"
    with reporter.stage("rounding outer matrices", 1) as step:
        found = scores.of(name, lambda: rounded.dense(version, outer.params))
        step(None)
    stem = "-".join(best.name.replace(" bits", "").replace("mixed ", "").split())
    file = f"{stem}-outer-{BITS}.json"
    own = sum(table.sizes[version(p)][p] for p in table.sizes[0])
    stacks = sum(table.sizes[version(p)][p] for p in rounded.sizes)
    weights = sum(rounded.sizes.values()) + outer.packed_size
    request = rounded.subjects.request
    point = Point(
        name=name, command=recipe_command(request, rounded.subjects.reference_spec, file),
        bits_per_weight=8 * (stacks + outer.packed_bytes) / weights, bytes=own + outer.bytes,
        kl=max(0.0, found.kl or 0.0), top1=found.top1_agreement or 0.0,
        perplexity=found.perplexity, on_frontier=False,
    )  # fmt: skip
    bits = {p: rounded.variants[n].bits for p, n in chosen.items()}
    return [Mixture(point, bits, file, outer.recipe.to_json(), best.kl, outer=True)]


def _method(rounded: Rounded, path: str, n: int) -> jq.Method:
    """Return the method of a stack in a version."""
    return next(e.method for e in rounded.jobs[n].plan.weights if e.path == path)


def recipe_command(request: AnalysisRequest, spec: str, file: str) -> str:
    """Return the command line of a mixture, with the place of its recipe's folder as {out}.

    Args:
      request: the request of the analysis.
      spec: the model that is quantized.
      file: name of the recipe's file.
    """
    stem = file.removesuffix(".json")
    return (
        f"jaxquant quantize {quoted(spec)} --recipe {{out}}/{file} --effort "
        f"{request.effort} --out {stem}"
    )
