"""What the command's options come to."""

import pytest

import jaxquant as jq
from jaxquant_models.cli.request import job_of
from jaxquant_models.runs import pipeline
from jaxquant_models.runs.effort import EFFORTS

NONE = dict.fromkeys(
    ("method", "recipe_file", "target_bits", "calibration_tokens", "steps", "heal_text", "bits",
     "group_size", "symmetric", "act_order", "activation_bits")
)  # fmt: skip
PLAIN = {"effort": "default", "calibration": "builtin", "weighting": "gradient", "seed": 0}


def asked(**options):
    return job_of(**NONE | PLAIN | {"more": ()} | options)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", sorted(jq.METHODS))
def test_every_method_takes_every_effort(effort, name):
    job = asked(method=name, effort=effort)
    (_, method), _ = job.recipe.rules[-2:]
    assert method.name == name
    assert job.tokens == EFFORTS[effort].tokens
    assert (job.healing is not None) == (effort == "best")


def test_what_is_said_wins_over_the_effort():
    job = asked(method="entropy_coded", effort="best", steps=0, calibration_tokens=512,
                more=("states=4",), bits=2.0)  # fmt: skip
    assert job.recipe == pipeline.recipe_of(jq.entropy_coded(2, states=4, two_sided=True))
    assert (job.tokens, job.healing) == (512, None)


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
    job = asked(method=name, target_bits=target)
    assert job.recipe is None
    assert [m.format.bits if name != "qtip" else m.format.rates[0] for m in job.choices] == wanted


def test_an_effort_gives_way_to_what_the_user_said():
    (_, method), _ = asked(method="qtip", effort="best", more=("passes=1",)).recipe.rules
    assert method == jq.qtip(passes=1)
    uniform = asked(method="entropy_coded", effort="best", weighting="uniform")
    assert not any(m.needs_output for _, m in uniform.rules)


def test_without_a_method_the_effort_names_it():
    assert asked(target_bits=2.3, effort="best").choices[0].name == "entropy_coded"
    assert asked(target_bits=4.3, effort="fast").choices[0].name == "gptq"
