"""Every part of a recipe refuses values that its fields do not take; computes nothing."""

import dataclasses
import math
from typing import get_args

import pytest

import jaxquant as jq
from jaxquant.core.fields import check_fields
from jaxquant.core.tensor import View
from jaxquant.formats import Trellis
from jaxquant.formats.kv_cache import KVFormat
from jaxquant.recipes import serialize
from jaxquant.rounding import LDLQ
from jaxquant.training.finetuning import Finetuning
from jaxquant.training.qat import QAT
from jaxquant.training.zeroqat import ZeroQAT
from jaxquant.training.zeroth import Zeroth
from jaxquant.tuning.trainer import Healing

NAN, INF = math.nan, math.inf
ODD = [None, "x", {}, [], (None,), object(), b"", 1j]
BAD = {
    int: [*ODD, True, 4.0, NAN, INF, 2**63, -(2**63), 10**400],
    float: [*ODD, True, NAN, INF, -INF, 10**400],
    bool: [*ODD, 0, 1, "false", 1.0],
    str: [None, 1, [], {}, b"x", "x" * 10_000],
}
FORMAT, ROUNDER = jq.rtn().format, jq.rtn().rounder
GIVEN = {
    "Chain": {"parts": (jq.transforms.Rotation(),)},
    "View": {"k": (1,), "n": (1,), "order": (-2, -1)},
    "Clipped": {"rounder": ROUNDER},
    "Method": {"name": "m", "rounder": ROUNDER, "format": FORMAT},
    "Latent": {"format": FORMAT, "estimator": None},
    "Adapted": {"format": FORMAT, "adapter": jq.adapters.PEQA()},
    "Offset": {"format": jq.formats.NormalFloat()},
    **{name: {"rank": 2} for name in ("LoRA", "QALoRA", "L4Q", "LoTA")},
}
REGISTERED = [c for c in serialize._TYPES.values() if c.__module__.startswith("jaxquant.")]
SETTINGS = (KVFormat, Healing, QAT, Zeroth, ZeroQAT, Finetuning)
PARTS = {c.__name__: c for c in (*REGISTERED, *SETTINGS)}


def kinds(annotation):
    """The plain types that a field takes."""
    return {t for t in (annotation, *get_args(annotation)) if t in (*BAD, type(None))}


CASES = [
    (name, field.name) for name, part in PARTS.items() for field in dataclasses.fields(part)
    if kinds(field.type) - {type(None)}
]  # fmt: skip


def test_the_table_is_of_many_fields():
    assert len(CASES) > 90 and ("Rotation", "block") in CASES and ("Method", "name") in CASES


@pytest.mark.parametrize(("part", "field"), CASES)
def test_a_field_takes_its_type_alone(part, field):
    found = next(f for f in dataclasses.fields(PARTS[part]) if f.name == field)
    taken = kinds(found.type)
    wrong = [v for v in BAD[next(iter(taken - {type(None)}))]
             if not (v is None and type(None) in taken)
             and not (isinstance(v, list | tuple) and "tuple" in str(found.type))]  # fmt: skip
    for value in wrong:
        with pytest.raises(ValueError, match=field) as caught:
            PARTS[part](**GIVEN.get(part, {}) | {field: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_unions_and_tuples():
    for block in (INF, NAN, 4.0, True, "4", 2**40):
        with pytest.raises(ValueError, match="block must be int .*or None"):
            jq.transforms.Rotation(block=block)
    for rates in (2, [2.0], (True,), ("2",), [[2]]):
        with pytest.raises(ValueError, match="rates must be a tuple of int"):
            Trellis(rates=rates)
    assert Trellis(rates=[2, 3]) == Trellis(rates=(2, 3))
    assert hash(LDLQ(scales=[1.0])) == hash(LDLQ(scales=(1.0,)))
    for group_size in (True, 64.0, None, "row", 0, 2**40):
        with pytest.raises(ValueError, match="group_size"):
            jq.formats.Integer(group_size=group_size)


@pytest.mark.parametrize("method", [jq.rtn, jq.gptq, jq.quip_sharp, jq.normal_float, jq.qtip])
def test_a_fraction_of_a_bit_names_the_methods_that_take_it(method):
    fractions = (
        r"must be .*int, got \(?2.5,?\)?; the methods trellis and entropy_coded take fractions"
    )
    with pytest.raises(ValueError, match=fractions):
        method(bits=2.5)
    for other in ("2.5", NAN, INF, None):  # which no method takes
        with pytest.raises(ValueError, match="must be") as caught:
            method(bits=other)
        assert "fractions" not in str(caught.value)
    for named in ("trellis", "entropy_coded"):
        assert jq.methods.named_method(named, bits=2.5).format.bits == 2.5


def test_a_whole_float_is_written_as_an_integer():
    with pytest.raises(ValueError, match=r"^bits must be int, got 4.0; write 4$"):
        jq.rtn(4.0)
    with pytest.raises(ValueError, match=r"got 64.0; write 64$"):
        jq.formats.Integer(group_size=64.0)
    with pytest.raises(ValueError, match=r"got 0.0$"):
        jq.formats.Integer(symmetric=0.0)  # 0 would not do either


def test_what_the_checks_do_not_follow_is_left():
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        part: object
        rest: dict
        __post_init__ = check_fields

    assert Foreign(3, []).rest == []


@pytest.mark.parametrize(
    "change",
    [
        {"rounder": jq.transforms.Rotation()},
        {"format": View((1,), (1,), (-2, -1))},
        {"input": 3},
        {"input": jq.formats.Integer()},
        {"output": "rotation"},
        {"estimator": jq.transforms.Rotation()},
        {"input_estimator": 4},
        {"activations": 4},
    ],
)
def test_a_method_takes_parts_of_their_kind(change):
    with pytest.raises(ValueError, match="must be|a method is") as caught:
        dataclasses.replace(jq.rtn(), **change)
    assert "\n" not in str(caught.value)


DEEP = "x"
for _ in range(500):
    DEEP = {"type": "Chain", "parts": [DEEP]}
NESTED = ["x"]
for _ in range(500):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": 3, "method": "rtn"}, "the pattern of a rule must be a string, got 3"),
        ({"pattern": ["*"], "method": "keep"}, "the pattern of a rule must be a string"),
        ({"pattern": "*", "method": "keep", "bits": 4}, "'keep' has no option 'bits'"),
        ({"pattern": "*", "method": "rtn", "name": "x"}, "'rtn' has no option"),
        (
            {"pattern": "*", "method": {"type": "Keep"}, "bits": 4},
            "options inside that object, got 'bits'",
        ),
        ({"pattern": "*", "method": {"type": ["Keep"]}}, "unknown type"),
        ({"pattern": "*", "method": {"type": {}}}, "unknown type"),
        ({"pattern": "*", "method": {"type": "Keep", "surprise": 1}}, "Keep has no 'surprise'"),
        ({"pattern": "*", "method": {"type": "Rotation"}}, "expected a method or KEEP"),
        ({"pattern": "*", "method": {"type": "Integer", "bits": NAN}}, "bits must be int, got nan"),
        ({"pattern": "*", "method": {"type": "Chain", "parts": 3}}, "parts must be a tuple"),
        ({"pattern": "*", "method": DEEP}, "nested more than .* levels deep"),
        ({"pattern": "*", "method": "gptq", "group_size": NESTED}, "group_size must be"),
        ({"pattern": "*", "method": "gptq", "damping": {"a": 1}}, "damping must be float"),
        ({"pattern": "*", "method": "rtn", "activation_bits": 8}, "unexpected keyword argument"),
        ({"pattern": "*", "method": "rtn", "activations": {}}, "activations"),
        ({"pattern": "*", "method": "rtn", "activations": "x" * 10**5}, "activations must be"),
        ({"pattern": "*", "method": "x" * 10**6}, "unknown method"),
        ({"pattern": "*", "method": "rtn", "bits": 10**400}, "an integer of 1329 bits"),
        ({"pattern": "*"}, "a rule must be"),
        (NESTED, "a rule must be"),
    ],
)
def test_recipes_from_hostile_json(rule, message):
    with pytest.raises(ValueError, match=message) as caught:
        jq.Recipe.from_json([rule])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
