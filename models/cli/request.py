"""What the command `quantize` was asked for, as a job."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxquant as jq
from jaxquant.tuning.learned_rotation import ROTATING
from jaxquant.tuning.learned_transforms import END_TO_END
from jaxquant.tuning.recoding import CODES
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs import pipeline
from jaxquant_models.runs.effort import EFFORTS, Effort
from jaxquant_models.runs.job import GENERATED, Job
from jaxquant_models.schemas.strict import parse_json, read_bytes

MOST = 8  # bits
# Methods whose option `bits` is their rate, side information aside.
RATED = (
    "rtn", "gptq", "quip_sharp", "qtip", "trellis", "entropy_coded", "normal_float",
)  # fmt: skip


def job_of(
    *,
    method: str | None,
    recipe_file: str | None,
    target_bits: float | None,
    effort: str,
    calibration: str,
    calibration_tokens: int | None,
    weighting: str,
    seed: int,
    learn: int = 0,
    steps: int | None,
    batch: int = 1,
    recode: int = 0,
    heal_text: str | None,
    rotate: str | None = None,
    rotate_steps: int | None = None,
    more: tuple[str, ...],
    **common: Any,
) -> Job:
    """The job, its texts not read yet; options that are None are the effort's or the method's.

    Raises:
      ValueError: options that do not go together, or are out of range.
    """
    preset = EFFORTS[effort]
    options = {n: v for n, v in common.items() if v is not None} | dict(map(setting, more))
    tokens = preset.tokens if calibration_tokens is None else calibration_tokens
    if tokens < pipeline.CONTEXT:
        raise ValueError(f"--calibration-tokens must be at least {pipeline.CONTEXT}")
    steps = preset.steps if steps is None else steps
    given = {"text": heal_text is not None, "batch": batch > 1, "codes": recode > 0}
    for name in (name for name, asked in given.items() if asked and not steps):
        if name == "codes" or not learn:
            also = "" if name == "codes" else " or --learn STEPS"
            raise ValueError(f"--heal-{name} is for training; give --heal STEPS{also} too")
    healing = jq.Healing(steps=steps, batch_size=batch) if steps else None
    if rotate != "learned" and rotate_steps is not None:
        raise ValueError("--rotate-steps is for a learned rotation: --rotate-residual learned")
    if rotate == "learned" and target_bits is not None:
        raise ValueError("a rotation is learned for one recipe; --target-bits takes a random one")
    job = Job(
        **_methods(preset, method, recipe_file, target_bits, weighting, options, bool(rotate)),
        text=calibration,
        tokens=tokens,
        weighting=weighting,
        seed=seed,
        learning=dataclasses.replace(END_TO_END, steps=learn, batch_size=batch) if learn else None,
        healing=healing,
        recoding=dataclasses.replace(CODES, steps=recode, batch_size=batch) if recode else None,
        heal_text=heal_text or "",
        rotate=rotate or "",
        rotating=_rotating(rotate_steps) if rotate == "learned" else None,
    )
    if recode and not any(m.format.recodes for _, m in job.rules):
        raise ValueError("--heal-codes trains the codes of learned codebooks: of aqlm and vptq")
    if learn and not any(m.input is not None and m.input.learns for _, m in job.rules):
        raise ValueError("--learn trains transforms of inputs that can be learned: of flatquant")
    return job


def _rotating(steps: int | None) -> jq.Healing:
    return ROTATING if steps is None else dataclasses.replace(ROTATING, steps=steps)


def with_texts(job: Job) -> Job:
    """The job with the texts that its fields name."""
    own = job.heal_text in ("", GENERATED)
    return dataclasses.replace(
        job,
        text=read_text(job.text, calibration=True),
        heal_text=job.heal_text if own else read_text(job.heal_text, calibration=True),
    )


def _methods(
    preset: Effort,
    method: str | None,
    recipe_file: str | None,
    target_bits: float | None,
    weighting: str,
    options: dict[str, Any],
    rotated: bool,
) -> dict[str, Any]:
    """The fields of a job that say which methods."""
    if recipe_file is not None:
        if method is not None:
            raise ValueError("give one of --method and --recipe")
        if options or target_bits is not None:
            raise ValueError("--recipe states everything; leave --bits and the like out")
        return {"recipe": _recipe_file(recipe_file)}
    if method is None and target_bits is None:
        raise ValueError("give one of --method and --recipe, or --target-bits")
    name = preset.method if method is None else method
    if name not in jq.METHODS:
        jq.named_method(name)  # says which there are
    if target_bits is None:
        if isinstance(options.get("bits"), float) and options["bits"].is_integer():
            options = options | {"bits": int(options["bits"])}
        method_of_all = _named(name, preset, options, weighting)
        return {"recipe": pipeline.recipe_of(method_of_all, rotated)}
    if "bits" in options:
        raise ValueError("give one of --bits and --target-bits")
    made = lambda bits: _named(name, preset, options | {"bits": bits}, weighting)
    return {"recipe": None, "choices": _choices(name, target_bits, made),
            "target_bits": target_bits}  # fmt: skip


def _named(name: str, preset: Effort, options: dict[str, Any], weighting: str) -> jq.Method:
    """The method, with the effort's options where they go with what the user said."""
    try:
        method = jq.named_method(name, **preset.options.get(name, {}) | options)
        if weighting == "gradient" or not method.needs_output:
            return method
    except ValueError:
        pass
    return jq.named_method(name, **options)


def _recipe_file(path: str) -> jq.Recipe:
    return jq.Recipe.from_json(parse_json(read_bytes(Path(path)), path))


def _choices(name: str, target: float, made: Callable[[float], jq.Method]) -> tuple[jq.Method, ...]:
    """The method at every whole number of bits, and at quarters of a bit near the target."""
    if not 0 < target <= MOST:
        raise ValueError(f"--target-bits must be above 0 and at most {MOST}, got {target}")
    if name not in RATED:
        raise ValueError(
            f"{name} has no option that sets its rate alone; --target-bits shares out: "
            f"{', '.join(RATED)}"
        )
    quarters = [b / 4 for b in range(1, 4 * MOST + 1) if abs(b / 4 - target) <= 1 and b % 4]
    found, problems = [], {}
    whole = [b for b in range(1, MOST + 1) if abs(b - target) <= 3]
    for bits in sorted([*whole, *quarters]):
        try:
            found.append(made(bits))
        except ValueError as error:  # not every method has every rate
            problems[bits] = error
    if not found:
        raise problems[min(problems, key=lambda bits: abs(bits - target))]
    return tuple(found)


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; what is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, parse_json(value, name)
    except ValueError:
        return name, value
