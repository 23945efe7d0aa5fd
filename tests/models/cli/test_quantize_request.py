"""What the command's options come to."""

import pytest

import jaxquant as jq
from jaxquant_models.cli.presets import PRESETS
from jaxquant_models.cli.quantize_request import FRACTIONAL, request_of
from jaxquant_models.runs.recipes import recipe_of


@pytest.mark.parametrize("effort", PRESETS)
@pytest.mark.parametrize("name", sorted(jq.METHODS))
def test_every_method_takes_every_effort(effort, name):
    request = request_of(method=name, effort=effort)
    (_, method), _ = request.recipe.rules[-2:]
    assert method.name == name
    assert request.calibration_tokens == PRESETS[effort].tokens
    assert (request.healing is not None) == (effort == "best")


def test_what_is_said_wins_over_the_effort():
    request = request_of(
        method="entropy_coded", effort="best", heal_steps=0, calibration_tokens=512,
        settings=("states=4",), bits=2.0,
    )  # fmt: skip
    assert request.recipe == recipe_of(jq.entropy_coded(2, states=4, two_sided=True))
    assert (request.calibration_tokens, request.healing) == (512, None)


@pytest.mark.parametrize(
    ("name", "target", "wanted"),
    [
        ("entropy_coded", 2.0, [1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 4, 5]),
        ("qtip", 2.3, [1, 2, 3, 4, 5]),
        ("quip_sharp", 2.3, [2, 3, 4]),
        ("gptq", 5, [2, 3, 4, 8]),
    ],
)
def test_what_is_shared_out(name, target, wanted):
    request = request_of(method=name, target_bits=target)
    assert request.recipe is None
    rate = lambda m: m.format.rates[0] if name == "qtip" else m.format.bits
    assert list(map(rate, request.choices)) == wanted


def test_an_effort_gives_way_to_what_the_user_said():
    (_, method), _ = request_of(method="qtip", effort="best", settings=("passes=1",)).recipe.rules
    assert method == jq.qtip(passes=1)
    uniform = request_of(method="entropy_coded", effort="best", weighting="uniform")
    assert not any(m.needs_output for _, m in uniform.rules)


def test_without_a_method_the_effort_names_it():
    assert request_of(target_bits=2.3, effort="best").choices[0].name == "entropy_coded"
    assert request_of(target_bits=4.3, effort="fast").choices[0].name == "gptq"


def test_a_fraction_of_bits_names_the_methods_that_take_one():
    for name in ("rtn", "gptq", "qtip", "aqlm", "awq"):
        message = f"{name} takes a whole number of bits, got 2.5; the methods trellis and entropy"
        with pytest.raises(ValueError, match=message):
            request_of(method=name, bits=2.5)
    for name in FRACTIONAL:
        (_, method), _ = request_of(method=name, bits=2.5).recipe.rules
        assert method.format.bits == 2.5
    (_, method), _ = request_of(method="rtn", bits=3.0).recipe.rules
    assert method.format.bits == 3
    with pytest.raises(ValueError, match="bits must be 1.58, 2, 3 or 4, got 2.5"):
        request_of(method="stretched_elastic", bits=2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heal_steps": 3}, "leave --heal-layers out"),
        ({"learn_steps": 3}, "--learn needs the whole model"),
        ({"heal_batch": 2}, "leave --heal-batch out"),
        ({"heal_text": "generated"}, "cannot use --heal-text generated"),
        ({"heal_codes": 2}, "--heal-codes needs training"),
    ],
)
def test_layers_healed_and_nothing_else(options, message):
    assert request_of(method="rtn", heal_layers=True, heal_text="x").whole == ()
    # The preset would train end to end.
    assert request_of(target_bits=2, effort="best", heal_layers=True).healing is None
    with pytest.raises(ValueError, match=message):
        request_of(method="rtn", heal_layers=True, **options)
