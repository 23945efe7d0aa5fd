"""Static rates of the TPU kernels at shapes of real models: `python -m tests.aot.rates`, a table.

A rate is the weights of a matrix over the cycles of its product with one row, as in decoding: the
VLIW bundles of the kernel, each issued once in a step, times the steps of its grid. What a step
costs beside its weights, and what a block has beyond the matrix, is in it; memory and stalls are
not. Programs are `jax.jit(jq.quantized(fn))` with the blocks that a user gets.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.cost import chips
from tests.aot import compiler

# Rows and columns of layers, small and large, wide and narrow.
SHAPES = {
    (576, 576): "SmolLM2-135M", (896, 4864): "Qwen2.5-0.5B", (2048, 8192): "Llama-3.2-1B",
    (9728, 2560): "Qwen3-4B", (4096, 4096): "Llama-3.1-8B", (5120, 5120): "Llama-2-13B",
}  # fmt: skip
M = 1


class Form(NamedTuple):
    """A format of `tests.aot.real`, the activations, and the bits of a weight in memory."""

    format: str
    activations: str
    bits: int


# Groups are of 128 rows, or of 64 where 128 does not divide k.
FORMS = {
    "packed_matmul 2 bits A8 g128": Form("2 bits", "int8", 2),
    "packed_matmul 2 bits A16 g128": Form("2 bits", "float", 2),
    "packed_matmul 2 bits A16": Form("2 bits, a scale a column", "float", 2),
    "ternary_matmul A8": Form("ternary, one scale", "int8", 2),
    "packed_matmul 4 bits A8 g128": Form("4 bits", "int8", 4),
    "packed_matmul 4 bits A16 g128": Form("4 bits", "float", 4),
    "packed_matmul 3 bits A16 g128": Form("3 bits", "float", 3),
    "packed_matmul 8 bits A16 g128": Form("8 bits", "float", 8),
    "e8p_matmul A16": Form("E8P", "float", 2),
    "e8p_matmul transcoded A16": Form("4 bits, a scale a column", "float", 4),
    "trellis_matmul vpu A8": Form("trellis", "int8", 2),
    "trellis_matmul vpu A16": Form("trellis", "float", 2),
    "codebook_matmul 4 bits A16 g128": Form("NF4", "float", 4),
    "float_planes_matmul 4 bits A16": Form("float planes", "float", 12),
}


class Row(NamedTuple):
    """Of one kernel on one chip: its rate at every shape of `SHAPES`, weights a cycle of a core."""

    kernel: str
    chip: str
    rates: tuple[float, ...]
    spills: int

    @property
    def needed(self) -> float:
        """Of a core, to keep the memory busy."""
        return chips.needed(self.chip, FORMS[self.kernel].bits)

    @property
    def median(self) -> float:
        """Rate at half of the shapes, at least."""
        return statistics.median(self.rates)

    @property
    def worst(self) -> tuple[float, tuple[int, int]]:
        """The lowest rate, and its shape."""
        return min(zip(self.rates, SHAPES, strict=True))


def rows(
    names: Sequence[str] = tuple(FORMS), on: Sequence[str] = tuple(compiler.TOPOLOGIES),
    timeout: float = 14400,
) -> Iterator[Row]:  # fmt: skip
    """A row for every kernel and chip, as soon as its programs are compiled.

    Raises:
      RuntimeError: a program does not compile.
    """
    asked = [(name, chip) for name in names for chip in on]
    results = compiler.stream([job for pair in asked for job in jobs(*pair)], timeout)
    for name, chip in asked:
        found = [(shape, next(results)) for shape in SHAPES]
        for shape, done in found:
            if done.error:
                raise RuntimeError(f"{name} {shape} on {chip}: {done.error}")
        rates = tuple(rate(shape, done) for shape, done in found)
        spills = max(compiler.kernel(done).spills for _, done in found)
        yield Row(name, chip, rates, spills)


def jobs(name: str, chip: str) -> list[compiler.Job]:
    """Of a kernel on a chip, all shapes."""
    form = FORMS[name]
    statics = {"m": M, "format": form.format, "activations": form.activations, "kernels": "tpu"}
    return [
        compiler.Job("tests.aot.real:product", chip, {"k": k, "n": n, **statics}) for k, n in SHAPES
    ]


def rate(shape: tuple[int, int], done: compiler.Compiled) -> float:
    """Weights over cycles."""
    return shape[0] * shape[1] / (done.steps * compiler.kernel(done).bundles)


def main() -> list[dict]:
    """Print the table: rates over what saturates the memory; return it, a row each."""
    print(f"{'kernel':34}{'chip':7}{'needed':>8}{'median':>8}{'worst':>8}{'spills':>8}  worst at")
    return [_told(row) for row in rows()]


def _told(row: Row) -> dict:
    (least, (k, n)), median, needed = row.worst, row.median, row.needed
    print(
        f"{row.kernel:34}{row.chip:7}{needed:8.0f}{median / needed:8.2f}{least / needed:8.2f}"
        f"{row.spills:8}  {k} x {n}",
        flush=True,
    )
    return {
        "kernel": row.kernel, "chip": row.chip, "needed": round(needed),
        "weights_per_cycle": round(median), "ratio": round(median / needed, 3),
        "worst": round(least), "worst_ratio": round(least / needed, 3), "worst_shape": [k, n],
        "spills": row.spills,
    }  # fmt: skip


if __name__ == "__main__":
    main()
