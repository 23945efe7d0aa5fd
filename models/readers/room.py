"""Memory that is available to the process, and errors where a run would not fit."""

import os
from pathlib import Path

import jax

from jaxquant.core.tree import tree_bytes
from jaxquant_models.readers.model import Model

CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes of memory that the process may still take, or 0 if that is not known.

    It is what the system has available or, in a container, what its limit (cgroup) leaves, if that
    is less.
    """
    found = [free for free in (_of_system(), _of_cgroup()) if free is not None]
    return min(found, default=0)


def check_fits(needed: int, what: str, instead: str) -> None:
    """Raise ValueError if more memory is needed than is available.

    Args:
      needed: number of bytes.
      what: what needs them, the subject of the message.
      instead: what to do, the end of the message.
    """
    available = available_memory()
    if 0 < available < needed:
        raise ValueError(
            f"{what} needs {needed:,} bytes of memory, but {available:,} are available: {instead}"
        )


def check_model_fits(outline: Model, what: str) -> None:
    """Raise ValueError if the parameters of an unquantized model do not fit in memory.

    Args:
      outline: the model, with shapes in place of arrays.
      what: what needs the whole model, the subject of the message.
    """
    if jax.default_backend() != "cpu":
        return  # parameters go to the memory of the device
    check_fits(
        float_bytes(outline),
        what,
        "quantize the model first (jaxquant quantize goes layer by layer), or use a larger machine",
    )


def fits(outline: Model) -> bool:
    """Return whether the parameters of an unquantized model take four fifths of memory at most.

    Args:
      outline: the model, with shapes in place of arrays.
    """
    if jax.default_backend() != "cpu":
        return True
    available = available_memory()
    return not available or 5 * float_bytes(outline) <= 4 * available


def float_bytes(outline: Model) -> int:
    """Return the bytes of the parameters of an unquantized model in memory.

    Args:
      outline: the model, with shapes in place of arrays.
    """
    return tree_bytes(outline.params)


def _of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return 1024 * int(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_cgroup() -> int | None:
    """Return what the limit of the control group leaves; its page cache can be reclaimed."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        groups = {kinds: group for _, kinds, group in (line.split(":", 2) for line in lines)}
        if "memory" in groups:  # version 1
            place = CGROUP / "memory" / groups["memory"].lstrip("/")
            place = place if place.exists() else CGROUP / "memory"  # within a container
            limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            place = CGROUP / groups[""].lstrip("/")
            place = place if place.exists() else CGROUP
            limit, used, prefix = "memory.max", "memory.current", ""
        number = lambda name: int((place / name).read_text())
        kinds = (place / "memory.stat").read_text().splitlines()
        counts = dict(kind.split() for kind in kinds)
        cache = sum(int(counts[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
        return max(0, number(limit) - number(used) + cache)
    except (OSError, KeyError, ValueError):
        return None
