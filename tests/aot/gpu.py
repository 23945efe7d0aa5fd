"""GPU kernels compiled to machine code for sm_80 and sm_90, on a machine without a GPU.

XLA compiles for a device that it knows by description only and writes PTX; NVIDIA's ptxas makes
machine code of that and tells registers and spills; nvdisasm lists its instructions. A process of
its own compiles each chip's kernels, since an LLVM error ends the process it happens in.

    python -m tests.aot.gpu          a table of kernels and chips

Needed, without a GPU, driver or CUDA: the plugin of this very JAX and three programs,

    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V
    pip install --no-deps nvidia-cuda-nvcc nvidia-cuda-nvdisasm
"""

import collections
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax

SECONDS = 240  # that one chip's kernels may take
CHIPS = {"sm_80": "sm_80", "sm_90": "sm_90a"}  # and what ptxas calls them

# What XLA wants to know of a device (openxla/xla, xla/backends/gpu/target_config/specs), from
# NVIDIA's data sheets.
_DEVICE = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 device_vendor: "NVIDIA Corporation" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  {rest}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
_DEVICES = {
    "sm_80": _DEVICE.format(
        name="NVIDIA A100-SXM4-80GB",
        rest="""
  cuda_compute_capability { major: 8 feature_extension: NONE }
  core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 memory_bandwidth: 2039000000000
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
  l2_cache_size: 41943040 device_memory_size: 85100068864""",
    ),
    "sm_90": _DEVICE.format(
        name="NVIDIA H100 80GB HBM3",
        rest="""
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352000000000
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 device_memory_size: 84942979072""",
    ),
}


def program(name: str) -> str | None:
    """The path of one of NVIDIA's programs: from a wheel of this Python, else on PATH."""
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            for found in Path(place).glob(f"*/bin/{name}"):
                return str(found)
    return shutil.which(name)


def missing() -> str:
    """What is not installed to compile for GPUs; "" if all is."""
    lacking = [name for name in ("ptxas", "nvdisasm") if program(name) is None]
    try:
        have = importlib.metadata.version("jax-cuda13-pjrt")
        if have != jax.__version__:
            lacking.append(f"jax-cuda13-pjrt=={jax.__version__} (there is {have})")
        importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError as error:
        lacking.append(f"{error.name}=={jax.__version__}")
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def compiled(chip: str, names: list[str], timeout: int = SECONDS) -> dict[str, str]:
    """PTX of each named case of `tests.aot.gpu_cases`, or what went wrong, after "error: ".

    Args:
      chip: one of `CHIPS`.
      names: of the cases.
      timeout: seconds until the process is ended.
    """
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is cached is not dumped
            # From JAX 0.11 on, PTX is dumped for named emitters only.
            "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_dump_to={folder} "
            "--xla_dump_emitter_re=ptx "
            f"--xla_gpu_cuda_data_dir={Path(program('ptxas')).parent.parent}",
        }
        while left := [name for name in names if name not in found]:
            command = [sys.executable, "-m", "tests.aot.gpu", "--child", chip, folder, *left]
            try:
                child = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=timeout
                )
                output, why = child.stdout, child.stderr.strip()[-2000:]
            except subprocess.TimeoutExpired as error:
                output, why = (error.stdout or b"").decode(), f"longer than {timeout} s"
            done = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            found |= {entry["name"]: entry["ptx"] for entry in done}
            if len(done) < len(left):  # the process ended at the next one
                found[left[len(done)]] = f"error: {why}"
    return found


def _child(chip: str, folder: str, names: list[str]) -> None:
    """Compile cases, one after the other; print each one's PTX as a line of JSON."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tests.aot.gpu_cases import CASES, WIDTHS

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_DEVICES[chip], topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    for name in names:
        case, before = (CASES | WIDTHS)[name], set(Path(folder).glob("*.ptx"))
        try:
            args = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), case.args
            )
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.jit(case.function).lower(*args).compile()
            texts = [path.read_text() for path in sorted({*Path(folder).glob("*.ptx")} - before)]
            kernels = [t for t in texts if re.search(rf"\.entry {case.kernel}\b", t)]
            ptx = kernels[0] if kernels else "error: no PTX of the kernel"
        except Exception as error:  # whatever the compiler says is the result
            ptx = f"error: {type(error).__name__}: {str(error)[-2000:]}"
        print(json.dumps({"name": name, "ptx": ptx}), flush=True)


# --- machine code ---------------------------------------------------------------------------


class Code:
    """Machine code of one kernel.

    Attributes:
      registers: of a thread.
      spills: bytes of registers kept in memory, stores and loads.
      threads: of a program.
      lines: instructions, in order.
      loop: (first, last) of the innermost loop that multiplies; the whole kernel if none does.
    """

    def __init__(self, ptx: str, kernel: str, chip: str):
        with tempfile.TemporaryDirectory() as folder:
            source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            source.write_text(ptx)
            arch = CHIPS[chip]
            told = _run([program("ptxas"), "-v", "-arch", arch, str(source), "-o", str(binary)])
            listing = _run([program("nvdisasm"), "-c", str(binary)])
        body = re.split(rf"\.section\s+\.text\.{kernel}\b", listing)[1]
        info = re.split(rf"Function properties for {kernel}\b", told)[1]
        self.registers = int(re.search(r"Used (\d+) registers", info)[1])
        self.spills = sum(map(int, re.findall(r"(\d+) bytes spill", info)[:2]))
        entry = re.split(rf"\.entry {kernel}\b", ptx)[1]
        self.threads = math.prod(map(int, re.search(r"\.reqntid ([\d, ]+)", entry)[1].split(",")))
        self.lines, self.loop = loop(body)

    def counts(self) -> collections.Counter:
        """Instructions of the loop by opcode."""
        first, last = self.loop
        return collections.Counter(_opcode(line) for line in self.lines[first : last + 1])

    def multiplies(self) -> set[str]:
        """Tensor core instructions there are."""
        return {_opcode(line) for line in self.lines} & _TENSOR


_TENSOR = {"HMMA", "HGMMA", "IMMA", "IGMMA"}


def loop(body: str) -> tuple[list[str], tuple[int, int]]:
    """Instructions of a listing; first and last of the innermost loop that multiplies."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for text in body.splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", text):
            labels[found[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", text):
            lines.append(found[1])
    loops = []
    for last, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        first = labels.get(target[1], last + 1) if target else last + 1
        if first < last and any(_opcode(t) in _TENSOR for t in lines[first:last]):
            loops.append((first, last))
    return lines, min(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(lines) - 1))


def _opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()[-2000:]}")
    return done.stdout + done.stderr


def report(names: Iterable[str] = (), chips: Iterable[str] = tuple(CHIPS)) -> list[dict]:
    """Kernel, chip, instructions_per_weight, registers, spills of each case on each chip.

    instructions_per_weight are all those of the inner loop (loads, waits, addresses, unpacking,
    products, scales) that the threads of a program issue in a pass, over the weights of a pass.
    """
    from tests.aot.gpu_cases import CASES

    rows = []
    for chip in chips:
        for name, ptx in compiled(chip, list(names) or list(CASES)).items():
            case = CASES[name]
            if ptx.startswith("error: "):
                rows.append({"kernel": name, "chip": chip, "error": ptx.removeprefix("error: ")})
                continue
            code = Code(ptx, case.kernel, chip)
            per = sum(code.counts().values()) * code.threads / case.weights
            rows.append(
                {
                    "kernel": name, "chip": chip, "instructions_per_weight": round(per, 2),
                    "registers": code.registers, "spills": code.spills,
                    "multiplies": code.multiplies(),
                    "opcodes": dict(code.counts().most_common()),
                }
            )  # fmt: skip
    return rows


def main(names: Iterable[str] = ()) -> list[dict]:
    """Print the table."""
    if why := missing():
        sys.exit(f"GPU kernels: {why}")
    rows = report(names)
    print(f"{'kernel':34}{'chip':7}{'instructions/weight':>20}{'registers':>10}{'spills':>8}")
    for row in rows:
        if "error" in row:
            print(f"{row['kernel']:34}{row['chip']:7}{row['error'][-200:]}")
            continue
        print(
            f"{row['kernel']:34}{row['chip']:7}{row['instructions_per_weight']:>20.2f}"
            f"{row['registers']:>10}{row['spills']:>8}  {' '.join(sorted(row['multiplies']))}"
        )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(sys.argv[1:])
