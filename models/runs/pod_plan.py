"""The plan of a model on a slice of a TPU pod, and the smallest slices that hold it."""

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
    """The smallest slice of a generation whose memory holds a program, according to the formula.

    Attributes:
      name: name of the slice; "" if no slice holds the program.
      refused: the first slice that was skipped because its devices do not divide the model or the
        batch, with the reason; "" if no smaller slice was skipped.
    """

    name: str
    refused: str


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """The plan of a model on a slice of a TPU pod.

    Attributes:
      request: the request.
      mesh: name and size of each mesh axis.
      bits: average number of bits per weight of the whole model.
      argument_bytes: bytes of each argument on one device, by its name.
      temporaries: bytes of everything else on one device.
      compiled: the result of the compiler for TPUs; None if it was not used.
      collectives: the collectives of a step.
      time: a lower bound on the time of a step.
      kernel_coverage: number of packed weights, and number of those whose products all have
        kernels.
      smallest: the smallest slice of each generation that holds the program.
    """

    request: PodRequest
    mesh: Axes
    bits: float
    argument_bytes: dict[str, int]
    temporaries: int
    compiled: pod_compiler.Compiled | None
    collectives: tuple[Collective, ...]
    time: StepTime
    kernel_coverage: tuple[int, int]
    smallest: dict[str, "Smallest"]

    @property
    def source(self) -> str:
        """Where temporaries and collectives come from: "compiler" or "formula"."""
        return "compiler" if self.compiled and not self.compiled.error else "formula"

    @property
    def arguments(self) -> int:
        """Bytes of all arguments on one device."""
        return sum(self.argument_bytes.values())

    @property
    def total(self) -> int:
        """Bytes of arguments and temporaries on one device."""
        return self.arguments + self.temporaries

    @property
    def compiled_arguments(self) -> int | None:
        """Bytes of all arguments on one device according to the compiler; None without a result."""
        done = self.compiled
        return done.arguments if done is not None and not done.error else None

    @property
    def fits(self) -> bool:
        """Whether the program fits in memory: it compiled or, if that failed, the formula says so.

        A compiler that ran out of memory on a device means that it does not fit.
        """
        if self.compiled is not None and (not self.compiled.error or self.compiled.exhausted):
            return not self.compiled.error
        return self.total <= self.request.topology.memory

    @property
    def moved(self) -> dict[tuple[str, str], int]:
        """Bytes of the results of a step's collectives on one device, by (kind, dtype).

        The largest come first.
        """
        found: Counter[tuple[str, str]] = Counter()
        for one in self.collectives:
            found[one.kind, one.dtype] += one.bytes
        return dict(found.most_common())

    @property
    def tokens_per_second(self) -> float:
        """Largest possible number of tokens per second, over all sequences."""
        return self.request.batch * self.request.tokens / self.time.seconds


def plan_pod(request: PodRequest, compile_: bool = True) -> PodPlan:
    """Return the plan of a request.

    Args:
      request: the request.
      compile_: whether to use the compiler for TPUs, if it is installed. Default: True.
    Raises:
      ValueError: the recipe does not fit the model, or the mesh does not divide the model or the
        batch.
    """
    weights = packed_shapes(request)
    mesh = mesh_of(request, weights)
    of = program(request, weights, abstract_mesh(mesh))
    done = pod_compiler.compiled(request) if compile_ and not pod_compiler.missing() else None
    found = done is not None and not done.error
    sent = done.collectives if done and found else tuple(expected_collectives(request, of, mesh))
    spare = done.temporaries if done and found else expected_temporaries(request, of, mesh)
    return PodPlan(
        request=request,
        mesh=mesh,
        bits=8 * weight_bytes(weights) / _size(weights),
        argument_bytes=device_bytes(of),
        temporaries=spare,
        compiled=done,
        collectives=sent,
        time=step_time(request, of, mesh, sent),
        kernel_coverage=_kernel_coverage(of),
        smallest={chip: smallest_slice(request, weights, chip) for chip in GENERATIONS},
    )


def smallest_slice(request: PodRequest, weights: PyTree, chip: str) -> Smallest:
    """Return the smallest slice of a generation that holds a program, according to the formula.

    Args:
      request: the request; its slice and its mesh are ignored.
      weights: the shapes of its packed weights.
      chip: the generation, a key of `topologies.GENERATIONS`.
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
    """Return a plan as JSON values; bytes are those on one device, times are in seconds.

    Args:
      plan: the plan.
    """
    r, t = plan.request, plan.time
    kinds = {f"{kind} {dtype}": size for (kind, dtype), size in plan.moved.items()}
    return {
        "workload": r.workload, "batch": r.batch, "context": r.context,
        "topology": r.topology.name, "devices": r.topology.devices, "mesh": shown(plan.mesh),
        "bits_per_weight": plan.bits,
        "bytes": {**plan.argument_bytes, "temporaries": plan.temporaries},
        "total": plan.total, "memory": int(r.topology.memory), "fits": plan.fits,
        "source": plan.source,
        "compiled_arguments": plan.compiled_arguments,
        "compiler_error": (plan.compiled.error or None) if plan.compiled else None,
        "collectives": kinds,
        "roofline": {**t._asdict(), "seconds": t.seconds, "bound": t.bound},
        "tokens_per_second": plan.tokens_per_second,
        "packed_weights": plan.kernel_coverage[0], "served_by_kernels": plan.kernel_coverage[1],
        "smallest": {chip: of.name for chip, of in plan.smallest.items()},
        "passed_over": {chip: of.refused for chip, of in plan.smallest.items() if of.refused},
    }  # fmt: skip


def lines(plan: PodPlan) -> list[str]:
    """Return a plan as lines of text.

    Args:
      plan: the plan.
    """
    r, t, gb = plan.request, plan.time, lambda n: f"{n / 1e9:10.3f} GB"
    rows = [(name, size) for name, size in plan.argument_bytes.items() if name != "tokens"]
    rows += [("temporaries", plan.temporaries), ("total", plan.total)]
    step = {"decode": "a decoding step", "prefill": "a prefill"}.get(r.workload, "a training step")
    verdict = "it fits" if plan.fits else "it does not fit"
    return [
        f"{r.workload} of {r.batch} sequences with {r.context} tokens on {r.topology.name}: "
        f"{r.topology.devices} devices, {shown(plan.mesh)}; {plan.bits:.3f} bits per weight",
        f"bytes per device (temporaries from the {plan.source}, the rest counted from shapes):",
        *(f"  {name:12}{gb(size)}" for name, size in rows),
        f"  of {gb(r.topology.memory).strip()} of memory: {verdict}",
        *_of_compiler(plan),
        *_of_collectives(plan),
        f"lower bound on the time of {step}, if all of the following overlap:",
        *(f"  {name:14}{_milliseconds(time)}" for name, time in t._asdict().items()),
        f"  limited by {t.bound}: {1e3 * t.seconds:.3f} ms, at most "
        f"{plan.tokens_per_second:,.0f} tokens/s",
        f"packed weights served by kernels: {plan.kernel_coverage[1]} of {plan.kernel_coverage[0]}",
        "smallest slices on which it fits (from the formula): "
        + ", ".join(of.name or f"none of {chip}" for chip, of in plan.smallest.items()),
        *(f"  {of.refused}" for of in plan.smallest.values() if of.refused),
    ]


def _milliseconds(time: float | None) -> str:
    return "   not known" if time is None else f"{1e3 * time:10.3f} ms"


def _of_compiler(plan: PodPlan) -> list[str]:
    """Return the line that says why there is no result of the compiler, or none."""
    if plan.compiled is None:
        return [f"  not compiled: {pod_compiler.missing() or 'the compiler was not used'}"]
    if not plan.compiled.error:
        return []
    return [f"  error of the compiler: {plan.compiled.error.splitlines()[0]}"]


def _of_collectives(plan: PodPlan) -> list[str]:
    """Return the lines about what devices send to each other."""
    if not plan.moved:
        return [f"collectives per step: none, devices send nothing (from the {plan.source})"]
    return [
        f"collectives per step, bytes of their results per device (from the {plan.source}):",
        *(f"  {kind:20}{dtype:6}{n / 1e9:10.3f} GB" for (kind, dtype), n in plan.moved.items()),
    ]


def _kernel_coverage(of: Program) -> tuple[int, int]:
    """Return the number of packed weights, and the number of those whose uses all have kernels."""
    packed = [p for p, w in jq.core.path_leaves(of.weights) if isinstance(w, jq.QTensor)]
    if not packed:
        return 0, 0
    slow = {use.path for use in of.uses().uses if "tpu kernel" not in use.why}
    return len(packed), len(set(packed) - slow)


def _size(weights: Sequence[Any]) -> int:
    return sum(w.size for _, w in jq.core.path_leaves(weights))
