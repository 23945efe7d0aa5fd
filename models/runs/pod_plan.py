"""What a model takes on a slice of a pod, and the smallest that holds it: `plan --topology`."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.distributed.collectives import Collective
from jaxquant_models.runs import pod_compiler
from jaxquant_models.runs.pod_bytes import device_bytes
from jaxquant_models.runs.pod_formula import expected_collectives, expected_temporaries
from jaxquant_models.runs.pod_mesh import Axes, mesh_of, shown
from jaxquant_models.runs.pod_programs import Program, abstract_mesh, packed_shapes, program
from jaxquant_models.runs.pod_request import PodRequest
from jaxquant_models.runs.pod_roofline import StepTime, step_time, weight_bytes
from pallas_kernels.cost.topologies import GENERATIONS, slices


class Smallest(NamedTuple):
    """The smallest slice of a generation that holds a program by the formula.

    Attributes:
      name: its name; "" if no slice holds the program.
      refused: the first slice whose devices do not divide the model or the batch, and why; "" if
        the smallest comes before any such slice.
    """

    name: str
    refused: str


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """What a plan says.

    Attributes:
      request: what was asked.
      mesh: name and size of each mesh axis.
      bits: average number of bits of a weight of the whole model.
      held: bytes of a device's part of each argument.
      temporaries: bytes of a device beside them.
      compiled: what the compiler for TPUs said; None if it was not asked.
      sent: the collectives of a step.
      time: the least time of a step.
      served: number of packed weights, and of those that kernels serve.
      smallest: generation -> the smallest slice that holds the program.
    """

    request: PodRequest
    mesh: Axes
    bits: float
    held: dict[str, int]
    temporaries: int
    compiled: pod_compiler.Compiled | None
    sent: tuple[Collective, ...]
    time: StepTime
    served: tuple[int, int]
    smallest: dict[str, "Smallest"]

    @property
    def source(self) -> str:
        """What temporaries and collectives come from: the compiler or the formula."""
        return "compiler" if self.compiled and not self.compiled.error else "formula"

    @property
    def arguments(self) -> int:
        """Bytes of all arguments on a device."""
        return sum(self.held.values())

    @property
    def total(self) -> int:
        """Bytes of a device."""
        return self.arguments + self.temporaries

    @property
    def compiled_arguments(self) -> int | None:
        """Bytes of all arguments on a device by the compiler; None if it did not succeed."""
        done = self.compiled
        return done.arguments if done is not None and not done.error else None

    @property
    def fits(self) -> bool:
        """Whether the program fits: it compiled, or else, by the formula."""
        if self.compiled is not None and (not self.compiled.error or self.compiled.exhausted):
            return not self.compiled.error
        return self.total <= self.request.where.memory

    @property
    def moved(self) -> dict[tuple[str, str], int]:
        """Bytes of a step's collectives on a device, by kind and dtype, largest first."""
        found: Counter[tuple[str, str]] = Counter()
        for one in self.sent:
            found[one.kind, one.dtype] += one.bytes
        return dict(found.most_common())

    @property
    def tokens_per_second(self) -> float:
        """Number of tokens per second at most, of all sequences together."""
        return self.request.batch * self.request.tokens / self.time.seconds


def plan_pod(request: PodRequest, compile_: bool = True) -> PodPlan:
    """Return the plan of a request.

    Args:
      request: the request.
      compile_: whether to ask the compiler for TPUs, if it is installed.
    Raises:
      ValueError: the recipe does not fit the model, or the mesh does not divide it.
    """
    weights = packed_shapes(request)
    mesh = mesh_of(request, weights)
    of = program(request, weights, abstract_mesh(mesh))
    said = pod_compiler.compiled(request) if compile_ and not pod_compiler.missing() else None
    found = said is not None and not said.error
    sent = said.sent if said and found else tuple(expected_collectives(request, of, mesh))
    spare = said.temporaries if said and found else expected_temporaries(request, of, mesh)
    return PodPlan(
        request=request,
        mesh=mesh,
        bits=8 * weight_bytes(weights) / _size(weights),
        held=device_bytes(of),
        temporaries=spare,
        compiled=said,
        sent=sent,
        time=step_time(request, of, mesh, sent),
        served=_served(of),
        smallest={chip: smallest_slice(request, weights, chip) for chip in GENERATIONS},
    )


def smallest_slice(request: PodRequest, weights: PyTree, chip: str) -> Smallest:
    """Return the smallest slice of a generation that holds a program by the formula.

    Args:
      request: the request; its slice and its mesh are left aside.
      weights: its packed shapes.
      chip: the generation.
    """
    refused = ""
    for where in slices(chip):
        if weight_bytes(weights) > where.devices * where.memory:
            continue
        there = request.on(where)
        try:
            mesh = mesh_of(there, weights)
            of = program(there, weights, abstract_mesh(mesh))
        except ValueError as error:  # its devices do not divide the model or the batch
            refused = refused or f"{where.name} is passed over: {error}"
            continue
        if sum(device_bytes(of).values()) + expected_temporaries(there, of, mesh) <= where.memory:
            return Smallest(where.name, refused)
    return Smallest("", refused)


def report_of(plan: PodPlan) -> dict[str, Any]:
    """Return a plan as JSON values.

    Args:
      plan: the plan.
    """
    r, t = plan.request, plan.time
    kinds = {f"{kind} {dtype}": size for (kind, dtype), size in plan.moved.items()}
    return {
        "work": r.work, "batch": r.batch, "context": r.context,
        "topology": r.where.name, "devices": r.where.devices, "mesh": shown(plan.mesh),
        "bits_per_weight": plan.bits,
        "bytes": {**plan.held, "temporaries": plan.temporaries},
        "total": plan.total, "memory": int(r.where.memory), "fits": plan.fits,
        "source": plan.source,
        "compiled_arguments": plan.compiled_arguments,
        "compiler_error": (plan.compiled.error or None) if plan.compiled else None,
        "collectives": kinds,
        "roofline": {**t._asdict(), "seconds": t.seconds, "bound": t.bound},
        "tokens_per_second": plan.tokens_per_second,
        "packed_weights": plan.served[0], "served_by_kernels": plan.served[1],
        "smallest": {chip: of.name for chip, of in plan.smallest.items()},
        "passed_over": {chip: of.refused for chip, of in plan.smallest.items() if of.refused},
    }  # fmt: skip


def lines(plan: PodPlan) -> list[str]:
    """Return a plan as lines of text.

    Args:
      plan: the plan.
    """
    r, t, gb = plan.request, plan.time, lambda n: f"{n / 1e9:10.3f} GB"
    rows = [(name, size) for name, size in plan.held.items() if name != "tokens"]
    rows += [("temporaries", plan.temporaries), ("together", plan.total)]
    step = {"decode": "a decoding step", "prefill": "a prefill"}.get(r.work, "a training step")
    verdict = "it fits" if plan.fits else "it does not fit"
    return [
        f"{r.work} of {r.batch} sequences with {r.context} tokens on {r.where.name}: "
        f"{r.where.devices} devices, {shown(plan.mesh)}; {plan.bits:.3f} bits per weight",
        f"bytes per device (weights and cache counted, temporaries by the {plan.source}):",
        *(f"  {name:12}{gb(size)}" for name, size in rows),
        f"  of {gb(r.where.memory).strip()}: {verdict}",
        *_said(plan),
        f"sent per step, bytes of the results on a device (by the {plan.source}):",
        *(f"  {kind:20}{dtype:6}{gb(n)}" for (kind, dtype), n in plan.moved.items()),
        f"lower bound on the time of {step}, with all of the following overlapped:",
        *(f"  {name:12}{_milliseconds(time)}" for name, time in t._asdict().items()),
        f"  bound by {t.bound}: {1e3 * t.seconds:.3f} ms, at most "
        f"{plan.tokens_per_second:,.0f} tokens/s",
        f"packed weights served by kernels: {plan.served[1]} of {plan.served[0]}",
        "smallest slices that hold it (by the formula): "
        + ", ".join(of.name or f"none of {chip}" for chip, of in plan.smallest.items()),
        *(f"  {of.refused}" for of in plan.smallest.values() if of.refused),
    ]


def _milliseconds(time: float | None) -> str:
    return " not known" if time is None else f"{1e3 * time:10.3f} ms"


def _said(plan: PodPlan) -> list[str]:
    if plan.compiled is None:
        return [f"  {pod_compiler.missing() or 'the compiler was not asked'}"]
    return [f"  the compiler: {plan.compiled.error.splitlines()[0]}"] if plan.compiled.error else []


def _served(of: Program) -> tuple[int, int]:
    """Return the number of packed weights, and of those all of whose uses a kernel serves."""
    packed = [p for p, w in jq.core.path_leaves(of.weights) if isinstance(w, jq.QTensor)]
    if not packed:
        return 0, 0
    slow = {use.path for use in of.uses().uses if "tpu kernel" not in use.why}
    return len(packed), len(set(packed) - slow)


def _size(weights: Sequence[Any]) -> int:
    return sum(w.size for _, w in jq.core.path_leaves(weights))
