"""Checks the options of `jaxquant quantize` and converts them to a request."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant.tuning.learned_rotation import ROTATING
from jaxquant.tuning.learned_transforms import END_TO_END
from jaxquant.tuning.recoding import CODES
from jaxquant_models.cli.options import setting
from jaxquant_models.cli.presets import PRESETS, Preset
from jaxquant_models.readers.text import BUILTIN
from jaxquant_models.runs.generated_text import GENERATED
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import CONTEXT
from jaxquant_models.schemas.strict import parse_json, read_bytes

ROTATIONS = ("random", "learned")
Make = Callable[[dict[str, Any]], jq.Method]  # makes a method from its options
MOST_BITS = 8
# Methods whose option `bits` is their rate, apart from side information.
RATED = (
    "rtn", "gptq", "quip_sharp", "qtip", "trellis", "entropy_coded", "normal_float",
)  # fmt: skip

# Methods that reach any average number of bits by themselves.
FRACTIONAL = ("trellis", "entropy_coded")


def request_of(
    *,
    method: str | None = None,
    recipe_file: str | None = None,
    target_bits: float | None = None,
    effort: str = "default",
    calibration: str = BUILTIN,
    calibration_tokens: int | None = None,
    weighting: Weighting = "gradient",
    seed: int = 0,
    exact_prefix: int = 0,
    learn_steps: int = 0,
    heal_steps: int | None = None,
    heal_layers: bool = False,
    heal_batch: int = 1,
    heal_codes: int = 0,
    heal_text: str | None = None,
    rotate_residual: str | None = None,
    rotate_steps: int | None = None,
    settings: tuple[str, ...] = (),
    lossless: bool = False,
    **method_options: Any,
) -> QuantizationRequest:
    """Return the request described by the options; the preset or the method replaces None.

    The arguments are the command's options.

    Raises:
      ValueError: options contradict each other or are out of range.
    """
    preset = PRESETS[effort]
    given = {n: v for n, v in method_options.items() if v is not None}
    given |= dict(map(setting, settings))
    tokens = preset.tokens if calibration_tokens is None else calibration_tokens
    if tokens < CONTEXT:
        raise ValueError(f"--calibration-tokens must be at least {CONTEXT}, got {tokens}")
    steps = preset.heal_steps if heal_steps is None and not heal_layers else heal_steps or 0
    if heal_layers:
        _check_layers(steps, learn_steps, text=heal_text, batch=heal_batch)
    _check_healing(
        steps, trains=learn_steps > 0, layers=heal_layers, text=heal_text, batch=heal_batch,
        codes=heal_codes,
    )  # fmt: skip
    _check_rotation(rotate_residual, rotate_steps, target_bits)
    recipe: jq.Recipe | None = None
    choices: tuple[jq.Method, ...] = ()
    if recipe_file is not None:
        _check_alone(method, target_bits, given)
        recipe = recipe_of_file(recipe_file)
    else:
        name = _method_name(method, target_bits, preset)
        make = functools.partial(_method, name, preset, weighting)
        if target_bits is None:
            recipe = recipe_of(_one_method(make, name, given), rotated=rotate_residual is not None)
        else:
            choices = _choices(make, name, target_bits, given)
    request = QuantizationRequest(
        recipe=recipe,
        choices=choices,
        target_bits=target_bits or 0.0,
        exact_prefix=exact_prefix,
        calibration=calibration,
        calibration_tokens=tokens,
        weighting=weighting,
        seed=seed,
        rotation=rotate_residual or "",
        rotating=_rotating(rotate_steps) if rotate_residual == "learned" else None,
        learning=_training(END_TO_END, learn_steps, heal_batch),
        healing=_training(jq.tuning.Healing(), steps, heal_batch),
        recoding=_training(CODES, heal_codes, heal_batch),
        layers_healed=heal_layers,
        heal_text=heal_text or "",
        lossless=lossless,
    )
    _check_trainable(request)
    if weighting != "gradient" and any(m.needs_output for _, m in request.rules):
        raise ValueError(
            "two-sided rounding needs gradients of the loss: use --weighting gradient, or a method "
            "without it"
        )
    return request


def _check_healing(
    steps: int, *, trains: bool, layers: bool, text: str | None, batch: int, codes: int
) -> None:
    """Raise ValueError if training options are given but nothing is trained that they concern."""
    other = {
        "text": (text is not None, trains or layers, ", --heal-layers or --learn STEPS"),
        "batch": (batch > 1, trains, " or --learn STEPS"),
        "codes": (codes > 0, False, ""),
    }
    for name, (given, used, also) in other.items():
        if given and not steps and not used:
            raise ValueError(f"--heal-{name} needs training; give --heal STEPS{also} too")


def _check_layers(steps: int, learn_steps: int, *, text: str | None, batch: int) -> None:
    """Raise ValueError if options contradict training layer by layer."""
    if steps:
        raise ValueError("--heal trains the layers one by one first; leave --heal-layers out")
    if learn_steps:
        raise ValueError("--learn needs the whole model; use --heal instead of --heal-layers")
    if batch > 1:
        raise ValueError("--heal-layers trains on one sequence per step; leave --heal-batch out")
    if text == GENERATED:
        raise ValueError(
            "--heal-layers cannot use --heal-text generated, for which the whole model is needed; "
            "give a file"
        )


def _check_rotation(
    rotate_residual: str | None, rotate_steps: int | None, target_bits: float | None
) -> None:
    """Raise ValueError if the options of the rotation contradict each other."""
    if rotate_residual != "learned" and rotate_steps is not None:
        raise ValueError("--rotate-steps needs --rotate-residual learned")
    if rotate_residual == "learned" and target_bits is not None:
        raise ValueError(
            "--rotate-residual learned needs one recipe, so --target-bits cannot be "
            "used with it; use --rotate-residual random"
        )


def _check_trainable(request: QuantizationRequest) -> None:
    """Raise ValueError if no method has the part that is to be trained."""
    if request.recoding and not any(m.format.recodes for _, m in request.rules):
        raise ValueError("--heal-codes needs a method with learned codebooks: aqlm or vptq")
    if request.learning and not any(
        m.input is not None and m.input.learns for _, m in request.rules
    ):
        raise ValueError("--learn needs a method with transforms that can be learned: flatquant")


def _training(how: jq.tuning.Healing, steps: int, batch: int) -> jq.tuning.Healing | None:
    return dataclasses.replace(how, steps=steps, batch_size=batch) if steps else None


def _rotating(steps: int | None) -> jq.tuning.Healing:
    return ROTATING if steps is None else dataclasses.replace(ROTATING, steps=steps)


def _check_alone(method: str | None, target_bits: float | None, given: dict[str, Any]) -> None:
    """Raise ValueError if method options are given together with a recipe file."""
    if method is not None:
        raise ValueError("give either --method or --recipe, not both")
    if given or target_bits is not None:
        raise ValueError(
            "--recipe sets everything; leave --bits and the other options of a method out"
        )


def recipe_of_file(path: str) -> jq.Recipe:
    """Return the recipe in a JSON file.

    Args:
      path: the file.
    Raises:
      ValueError: the file cannot be read, or holds no recipe.
    """
    return jq.Recipe.from_json(parse_json(read_bytes(Path(path)), path))


def _method_name(method: str | None, target_bits: float | None, preset: Preset) -> str:
    if method is None and target_bits is None:
        raise ValueError("give --method, --recipe or --target-bits")
    name = preset.method if method is None else method
    if name not in jq.METHODS:
        jq.methods.named_method(name)  # raises an error that lists the methods
    return name


def _method(name: str, preset: Preset, weighting: Weighting, options: dict[str, Any]) -> jq.Method:
    """Return the method with the preset's options, unless they contradict the user's."""
    try:
        method = jq.methods.named_method(name, **preset.options.get(name, {}) | options)
        if weighting == "gradient" or not method.needs_output:
            return method
    except ValueError:
        pass
    return jq.methods.named_method(name, **options)


def _one_method(make: Make, name: str, given: dict[str, Any]) -> jq.Method:
    """Return the method for all matrices, converting a whole number of bits to an int."""
    bits = given.get("bits")
    if not isinstance(bits, float):
        return make(given)
    if bits.is_integer():
        return make(given | {"bits": int(bits)})
    own = inspect.signature(jq.METHODS[name]).parameters.get("bits")
    if own is not None and own.annotation is int:
        raise ValueError(
            f"{name} takes a whole number of bits, got {bits:g}; "
            f"the methods {' and '.join(FRACTIONAL)} take fractions"
        )
    return make(given)


def _choices(make: Make, name: str, target: float, given: dict[str, Any]) -> tuple[jq.Method, ...]:
    """Return the method at every whole number of bits, and at quarters of a bit near the target."""
    if "bits" in given:
        raise ValueError("give either --bits or --target-bits, not both")
    if not 0 < target <= MOST_BITS:
        raise ValueError(f"--target-bits must be above 0 and at most {MOST_BITS}, got {target}")
    if name not in RATED:
        raise ValueError(
            f"{name} has no option that sets only its number of bits, as "
            f"--target-bits needs; use one of {', '.join(RATED)}"
        )
    quarters = [b / 4 for b in range(1, 4 * MOST_BITS + 1) if abs(b / 4 - target) <= 1 and b % 4]
    found, problems = [], {}
    whole = [b for b in range(1, MOST_BITS + 1) if abs(b - target) <= 3]
    for bits in sorted([*whole, *quarters]):
        try:
            found.append(make(given | {"bits": bits}))
        except ValueError as error:  # not every method supports every rate
            problems[bits] = error
    if not found:
        raise problems[min(problems, key=lambda bits: abs(bits - target))]
    return tuple(found)
