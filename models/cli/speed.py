"""Speed and memory of a run, as shown in reports."""

from jaxtyping import PyTree

from jaxquant.core.tree import tree_bytes
from jaxquant_models.runs.generate import Session
from jaxquant_models.runs.measuring import Phase, peak_memory


def speed_of(session: Session, params: PyTree) -> dict[str, float | None]:
    """Return the speed of a generation, and `memory_of` its process.

    Args:
      session: the generation.
      params: the parameters in memory.
    """
    compiling = session.prefill.compile_seconds + session.decode.compile_seconds
    return {
        "prefill_tokens_per_second": session.prefill.tokens_per_second,
        "decode_tokens_per_second": session.decode.tokens_per_second,
        "compile_seconds": compiling,
        **memory_of(params),
    }


def scoring_speed(phase: Phase, params: PyTree) -> dict[str, float | None]:
    """Return the speed of an evaluation, which is all prefill, and `memory_of` its process.

    Args:
      phase: the evaluation.
      params: the parameters in memory.
    """
    return {
        "prefill_tokens_per_second": phase.tokens_per_second,
        "compile_seconds": phase.compile_seconds,
        **memory_of(params),
    }


def memory_of(params: PyTree) -> dict[str, int]:
    """Return the peak memory of the process and the bytes of all parameters in memory.

    Args:
      params: the parameters in memory.
    """
    return {
        "peak_memory_bytes": peak_memory(),
        "bytes_in_memory": tree_bytes(params),
    }


def speed_line(speed: dict[str, float | None]) -> str:
    """Return one line about what `speed_of` found.

    Args:
      speed: its result.
    """
    rate = lambda name: "-" if speed[name] is None else f"{speed[name]:.1f} tokens/s"
    megabytes = lambda name: f"{speed[name] / 1e6:.0f} MB"
    return (
        f"prefill {rate('prefill_tokens_per_second')}, "
        f"decode {rate('decode_tokens_per_second')}, "
        f"compiling {speed['compile_seconds']:.1f} s; weights {megabytes('bytes_in_memory')}, "
        f"peak memory of the process {megabytes('peak_memory_bytes')}"
    )
