"""Compiles the program of a plan for a TPU slice that this machine lacks, in a separate process.

The process is separate because libtpu may abort it, and because a process chooses its devices when
it starts. It reads a request as JSON from standard input and prints the result as one line.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxquant.distributed.collectives import Collective, collectives
from jaxquant_models.runs.pod_mesh import Axes, mesh_of
from jaxquant_models.runs.pod_programs import packed_shapes, program
from jaxquant_models.runs.pod_request import PodRequest

KERNEL = 'custom_call_target="tpu_custom_call"'
TIMEOUT = 900.0  # seconds
_RESULT = "compiled: "  # the line with the result begins with this

# Environment variables for compiling for TPUs on a machine without one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no device to lock
    # These only silence warnings of libtpu about what it cannot find.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Compiled(NamedTuple):
    """The result of compiling a program.

    Attributes:
      error: why the program did not compile; "" if it compiled.
      arguments: bytes of the arguments on one device, in the layouts that the compiler chose.
      temporaries: bytes of everything else on one device, including the results that do not reuse
        the memory of an argument.
      kernels: number of calls of kernels in the text of the program.
      collectives: the collectives of the program.
    """

    error: str
    arguments: int = 0
    temporaries: int = 0
    kernels: int = 0
    collectives: tuple[Collective, ...] = ()

    @property
    def exhausted(self) -> bool:
        """Whether the program did not compile because a device has too little memory."""
        return "RESOURCE_EXHAUSTED" in self.error


def missing() -> str:
    """Return why this machine cannot compile for TPUs; "" if it can."""
    found = importlib.util.find_spec("libtpu") is not None
    return "" if found else "libtpu is not installed (pip install 'jax[tpu]')"


def compiled(request: PodRequest, timeout: float = TIMEOUT) -> Compiled:
    """Compile the program of a request in a separate process.

    Args:
      request: the request.
      timeout: seconds after which the process is terminated. Default: 900.
    Returns:
      The result; if the compiler fails or takes too long, its `error` says so.
    """
    command = [sys.executable, "-m", __spec__.name]
    # A program that comes from the cache has no text.
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("XLA_FLAGS", None)  # flags of another platform abort the process
    try:
        done = subprocess.run(
            command, input=json.dumps(request.to_json()), env=environment, capture_output=True,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Compiled(f"the compiler took more than {timeout:g} s and was stopped")
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if not lines:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        return Compiled(
            f"the compiler's process ended with status {done.returncode}: {last[:2000]}"
        )
    found = json.loads(lines[-1].removeprefix(_RESULT))
    sent = tuple(Collective(k, d, tuple(s), g, n) for k, d, s, g, n in found.pop("collectives"))
    return Compiled(**found, collectives=sent)


def devices_mesh(request: PodRequest, axes: Axes) -> Mesh:
    """Return a mesh of the devices that libtpu describes for the slice of a request.

    Args:
      request: the request.
      axes: name and size of each mesh axis.
    """
    alone = {"chips_per_host_bounds": [1, 1, 1]} if request.topology.chips == 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=request.topology.name, **alone
    ).devices
    names, sizes = zip(*axes, strict=True)
    return Mesh(np.array(found).reshape(sizes), names)


def _compiled(request: PodRequest) -> Compiled:
    weights = packed_shapes(request)
    mesh = devices_mesh(request, mesh_of(request, weights))
    lowered = program(request, weights, mesh).lowered()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(str(error)[:2000])
    memory, text = done.memory_analysis(), done.as_text()
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        "",
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + own,
        text.count(KERNEL),
        tuple(collectives(text)),
    )


if __name__ == "__main__":
    result = _compiled(PodRequest.from_json(json.load(sys.stdin)))
    found = {**result._asdict(), "collectives": [*map(dataclasses.astuple, result.collectives)]}
    sys.stdout.write(f"{_RESULT}{json.dumps(found)}\n")
