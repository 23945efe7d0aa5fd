"""What the command `quantize` was asked for, as a job."""

import dataclasses
import inspect
import json
from typing import Any

import numpy as np

import jaxquant as jq
from models import pipeline
from models.effort import EFFORTS, Effort
from models.job import GENERATED, Job
from models.text import read_text

STEP = 0.25  # bits between two methods to choose from


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
    steps: int | None,
    heal_text: str | None,
    more: tuple[str, ...],
    **common: Any,
) -> Job:
    """The job, its texts not read yet; options that are None are the effort's or the method's.

    Raises:
      ValueError: options that do not go together, or are out of range.
    """
    preset = EFFORTS[effort]
    options = {n: v for n, v in common.items() if v is not None} | dict(map(_setting, more))
    tokens = preset.tokens if calibration_tokens is None else calibration_tokens
    if tokens < pipeline.CONTEXT:
        raise ValueError(f"--calibration-tokens must be at least {pipeline.CONTEXT}")
    steps = preset.steps if steps is None else steps
    if heal_text is not None and not steps:
        raise ValueError("--heal-text is for healing; give --heal STEPS too")
    return Job(
        **_methods(preset, method, recipe_file, target_bits, options),
        text=calibration,
        tokens=tokens,
        weighting=weighting,
        seed=seed,
        healing=jq.Healing(steps=steps) if steps else None,
        heal_text=heal_text or "",
    )


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
    options: dict[str, Any],
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
    options = preset.options.get(name, {}) | options
    if target_bits is None:
        if "bits" in options:
            options["bits"] = _whole(options["bits"])
        return {"recipe": pipeline.recipe_of(jq.named_method(name, **options))}
    if "bits" in options:
        raise ValueError("give one of --bits and --target-bits")
    return {
        "recipe": None,
        "choices": _choices(name, target_bits, options),
        "target_bits": target_bits,
    }


def _recipe_file(path: str) -> jq.Recipe:
    try:
        with open(path, encoding="utf-8") as file:
            return jq.Recipe.from_json(json.load(file))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _whole(bits: float) -> float:
    return int(bits) if bits == int(bits) else bits


def _choices(name: str, target: float, options: dict[str, Any]) -> tuple[jq.Method, ...]:
    """The method at rates about the target: quarters of a bit near it, whole bits farther off."""
    if name in jq.METHODS and "bits" not in inspect.signature(jq.METHODS[name]).parameters:
        raise ValueError(f"{name} has one rate only; --target-bits needs a method that takes bits")
    near = np.arange(target - 1, target + 1 + 1e-6, STEP)
    rates = {_whole(round(b / STEP) * STEP) for b in near if b > STEP}
    rates |= {b for b in range(1, 9) if abs(b - target) <= 2}
    found, problem = [], None
    for bits in sorted(rates):
        try:
            found.append(jq.named_method(name, bits=bits, **options))
        except ValueError as error:  # not every method has every rate
            problem = error
    if not found and problem is not None:
        raise problem
    return tuple(found)


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE; what is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
