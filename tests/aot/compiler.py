"""Compile for TPUs that are not there, in a process of its own: libtpu may abort.

A job names a function that builds what is to be compiled, so that nothing has to be pickled. One
process does many jobs: importing JAX and libtpu takes longer than compiling a kernel.
"""

import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.aot import llo
from tests.support.lowering import equations

# A chip's smallest slice, as libtpu names it.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_RESULT = "compiled: "  # begins the lines that say what came of a job

# Of a process that compiles for TPUs without one.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    # There is no device to lock: other processes may compile too.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Of no effect but that libtpu does not warn of what it cannot find.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Job(NamedTuple):
    """What to compile.

    Attributes:
      build: "module:function" of a function that returns a function and its abstract arguments.
      chip: one of `TOPOLOGIES`.
      arguments: of `build`, by keyword; must be JSON.
    """

    build: str
    chip: str
    arguments: dict


class Compiled(NamedTuple):
    """The result of a job.

    Attributes:
      error: "" or why it did not compile.
      argument_bytes: of all arguments, as the device holds them.
      hlo: the compiled module.
      kernels: schedules of the Pallas kernels in it, by name.
      steps: of the grid of the one Pallas kernel that was traced; 0 if there were more, or none.
      temporary_bytes: of what the device holds beside arguments and results.
    """

    error: str
    argument_bytes: int = 0
    hlo: str = ""
    kernels: Mapping[str, llo.Schedule] = MappingProxyType({})
    steps: int = 0
    temporary_bytes: int = 0


def missing() -> str:
    """Why nothing can be compiled here, or ""."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (make test-kernels installs it)"
    return ""


def compiled(jobs: Sequence[Job], timeout: float = 300, schedules: bool = True) -> list[Compiled]:
    """What comes of all jobs; as `stream`."""
    return list(stream(jobs, timeout, schedules))


def stream(jobs: Sequence[Job], timeout: float = 300, schedules: bool = True) -> Iterator[Compiled]:
    """What comes of each job, as soon as it is there.

    Args:
      jobs: compiled one after the other, in a process of their own; in a new one after one that
        ended it.
      timeout: seconds that a process may take, until it is ended.
      schedules: of the kernels, which libtpu has to write to files.
    """
    left = list(jobs)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            for done in _process(left, Path(folder), timeout, schedules):
                left.pop(0)
                yield done


def kernel(done: Compiled) -> llo.Schedule:
    """The schedule of the one kernel of ours."""
    return next(s for name, s in done.kernels.items() if "_matmul" in name)


def _process(
    jobs: Sequence[Job], folder: Path, timeout: float, schedules: bool
) -> Iterator[Compiled]:
    """What one process makes of the jobs, up to the one that ends it."""
    environment = os.environ | ENVIRONMENT | {
        # A kernel from the cache would leave no dump, and was not compiled by this compiler.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # fmt: skip
    if schedules:
        environment["LIBTPU_INIT_ARGS"] = llo.FLAGS.format(folder / "dump")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with (folder / "errors").open("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.aot.compiler", str(folder)],
            env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=errors,
            text=True,
        )  # fmt: skip
        watch = threading.Timer(timeout, child.kill)
        watch.start()
        try:
            count = 0
            for line in filter(lambda line: line.startswith(_RESULT), child.stdout):
                r = json.loads(line.removeprefix(_RESULT))
                kernels = {k: llo.Schedule(*s) for k, s in r["kernels"].items()}
                count += 1
                yield Compiled(**{**r, "kernels": kernels})
            if count < len(jobs):
                late = not watch.is_alive()
                errors.seek(0)
                said = f"{timeout} s were over" if late else errors.read()[-2000:]
                yield Compiled(f"the compiling process ended: {said}")
        finally:
            watch.cancel()
            child.kill()
            child.wait()
            child.stdout.close()


def _compile(job: Job, dump: Path) -> Compiled:
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    module, name = job.build.split(":")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[job.chip])
    # A mesh, as lowering may ask it what the device can do.
    mesh = Mesh(topology.devices[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    try:
        function, avals = getattr(importlib.import_module(module), name)(**job.arguments)
        there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(function).trace(*jax.tree.map(there, avals))
            done = traced.lower().compile()
    except Exception as error:
        return Compiled(f"{type(error).__name__}: {error}"[:2000])
    held = done.memory_analysis()
    return Compiled(
        "", held.argument_size_in_bytes, done.as_text(), llo.schedules(dump),
        _steps(traced.jaxpr), held.temp_size_in_bytes,
    )  # fmt: skip


def _steps(jaxpr: Any) -> int:
    grids = [
        eqn.params["grid_mapping"].grid
        for eqn in equations(jaxpr)
        if eqn.primitive.name == "pallas_call"
    ]
    return math.prod(grids[0]) if len(grids) == 1 else 0


def _main(folder: Path) -> None:
    """Do the jobs of folder/jobs.json; a line of JSON says what came of each."""
    dump = folder / "dump"
    for job in json.loads((folder / "jobs.json").read_text()):
        dump.mkdir()
        done = _compile(Job(*job), dump)
        print(_RESULT + json.dumps({**done._asdict(), "kernels": dict(done.kernels)}), flush=True)
        shutil.rmtree(dump)  # hundreds of files of each kernel


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
