"""The table of methods, formats and backends in README.md, from what `jaxquant.explain` says.

Run: python -m tests.documents.support_table, which writes the table between two marks in README.md,
and why some matmuls have no kernel between two marks in pallas_kernels/README.md. Every method is
applied abstractly, with its default arguments, to a weight of 1024 x 1024, and one row of
activations is multiplied by the result; nothing is computed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.formats import DualScale
from jaxquant.methods.registry import METHODS
from jaxquant.ptq.quantize import quantize_array
from jaxquant.rounding import Nearest

from .pages import ROOT

BEGIN, END = (
    f"<!-- {edge} of the output of `python -m tests.documents.support_table` -->"
    for edge in ("start", "end")
)
PLATFORMS = {"cpu": "CPU", "tpu": "TPU", "cuda": "GPU"}
SIDE, SAMPLE = 1024, 64
# Variants that another kernel runs, or none.
VARIANTS = {
    'qtip(L=16, code="vpu")': lambda: jq.qtip(L=16, code="vpu"),
    "entropy_coded, after jq.formats.transcoded": lambda: jq.Method(
        "transcoded", Nearest(), DualScale(4)
    ),
}
HEADER = ("method", "calibration", "bits", "format", "activations", *PLATFORMS.values())


class Row(NamedTuple):
    """What a method stores, and by platform why no kernel runs its matmul, "" if one does."""

    name: str
    calibration: bool
    bits: float
    format: str
    activations: str
    missing: dict[str, str]


def product(params, x):
    """What is traced."""
    return x @ params["w"]


def packed(method):
    """The shapes of a quantized weight."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    make = lambda w, x: quantize_array(w, method, inputs=x)
    return jax.eval_shape(make, array(SIDE, SIDE), array(SAMPLE, SIDE))


def missing(weight, platform):
    """Why no kernel of the platform runs the matmul, "" if one does."""
    x = jax.ShapeDtypeStruct((1, SIDE), jnp.float32)
    (use,) = jq.explain(product, {"w": weight}, x, platform=platform).uses
    if f"{platform} kernel" in use.why:
        return ""
    return use.why.rpartition("reference (XLA): ")[2]


def row(name, method):
    weight = packed(method)
    needs = method.needs_gram or method.needs_channels or method.needs_sample
    return Row(
        name=name,
        calibration=needs,
        bits=weight.bits_per_weight,
        format=type(weight.format).__name__,
        activations=str(weight.activations or "float"),
        missing={platform: missing(weight, platform) for platform in PLATFORMS},
    )


@functools.cache
def rows():
    """All methods with their default arguments, and the variants."""
    methods = {name: make() for name, make in METHODS.items()}
    return [row(n, m) for n, m in {**methods, **{n: v() for n, v in VARIANTS.items()}}.items()]


def cells(r):
    """A row as text."""
    run_by = ("XLA" if r.missing[platform] else "kernel" for platform in PLATFORMS)
    name = ", after ".join(f"`{part}`" for part in r.name.split(", after "))
    calibration, bits = "yes" if r.calibration else "no", f"{r.bits:.2f}"
    if "after" in r.name:  # as in the method's own row, and only known once the codes are
        calibration, bits = "yes", "-"
    return (name, calibration, bits, f"`{r.format}`", r.activations, *run_by)


def reasons(r):
    """For every reason why a method has no kernel, the platforms."""
    for reason in dict.fromkeys(filter(None, r.missing.values())):
        where = ", ".join(shown for p, shown in PLATFORMS.items() if r.missing[p] == reason)
        yield f"- `{r.name}`, {where}: {reason}"


def table():
    """The rows in Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *map(cells, rows())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def list_of_reasons():
    """Why some matmuls have no kernel, in Markdown."""
    return "\n".join(line for r in rows() for line in reasons(r))


REGIONS = {ROOT / "README.md": table, ROOT / "pallas_kernels" / "README.md": list_of_reasons}


def region(page):
    """(before, the generated region, after) of a page's text."""
    before, begin, rest = page.read_text().partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no region between {BEGIN!r} and {END!r}")
    return before, inside.strip(), after


def main():
    for page, made in REGIONS.items():
        before, _, after = region(page)
        page.write_text(f"{before}{BEGIN}\n\n{made()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
