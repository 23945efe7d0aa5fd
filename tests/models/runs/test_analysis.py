"""Parts of an analysis: knees, temperatures, sentences, names; each by what it must find."""

import itertools

import numpy as np
import pytest

from jaxquant_models.runs.analysis.advice import knee
from jaxquant_models.runs.analysis.findings import findings
from jaxquant_models.runs.analysis.kept import Kept
from jaxquant_models.runs.analysis.names import parameter_path
from jaxquant_models.runs.analysis.temperatures import temperatures
from jaxquant_models.runs.analysis.tensors import exponent_counts
from jaxquant_models.schemas.report import Frontier, LimitRow, Point


def point(name, bits, kl, command="x", on_frontier=True):
    return Point(
        name=name, command=command, bits_per_weight=bits, bytes=int(1e6 * bits), kl=kl, top1=0.5,
        perplexity=9.0, on_frontier=on_frontier,
    )  # fmt: skip


def test_the_knee_is_where_the_curve_bends():
    """Below 4 bits, each bit multiplies the loss by 40; above, it hardly helps."""
    losses = {8: 0.009, 6: 0.0095, 4: 0.01, 3: 0.4, 2: 16.0}
    points = [point(str(bits), bits, kl) for bits, kl in losses.items()]
    assert knee(points).name == "4"
    # A point above the frontier is no knee, however good it looks.
    assert knee([*points, point("away", 3, 0.01, on_frontier=False)]).name == "4"
    assert knee([point("one", 3, 1.0)]).name == "one"
    assert knee([point("free", 3, 0.0)]) is None


def test_temperatures_of_a_law():
    """For losses c 4^-R the temperature is 2 ln(2) times the loss; outside there is none."""
    curve = [(float(bits), 3 * 4.0**-bits) for bits in (2, 3, 4)]
    found = temperatures({"a": curve, "b": curve, "c": curve}, {"a": 3.5, "b": 5.0}, 2.0)
    assert set(found) == {"a", "c"}
    assert found["a"] == pytest.approx(2 * np.log(2) * 3 * 4**-3.5)
    assert found["c"] == pytest.approx(2 * np.log(2) * 3 * 4**-2.0)


def test_findings_name_the_cliff_and_the_limit_that_failed():
    points = [point("gptq 4 bits", 4, 0.01), point("gptq 3 bits", 3, 0.04)]
    cliff = [*points, point("gptq 2 bits", 2, 4.0)]
    row = LimitRow(
        name="loops", statement="Texts do not loop.", kind="survival", measured=0.9, bound=0.1,
        holds=False, verdict="collapsed", seconds=1.0, note="",
    )  # fmt: skip
    frontier = Frontier(reference="m", perplexity=9.0, points=cliff, tokens=100)
    found = findings([], frontier, None, [row], [], {"massive": None})
    assert "From gptq 3 bits to gptq 2 bits" in found[0] and "25.0 times" in found[0]
    assert "'loops' collapsed" in found[1]
    calm = row.model_copy(update={"holds": True, "verdict": "survives"})
    assert not any("loops" in text for text in findings([], frontier, None, [calm], [], {}))


def test_names_of_both_kinds_of_files():
    pairs = {
        "blk.12.ffn_down.weight": "layers/mlp/down/kernel",
        "model.layers.0.self_attn.o_proj.weight": "layers/attn/o/kernel",
        "token_embd.weight": "embed/embedding",
        "lm_head.weight": "head/kernel",
        "layers/7/attn/q/kernel": "layers/attn/q/kernel",
        "blk.12.attn_norm.weight": None,
    }
    assert {name: parameter_path(name) for name in pairs} == pairs


def test_exponents_of_denormals_and_zeros():
    first, counts = exponent_counts(np.array([0.0, 2.0**-140, 1.0, -1.99], np.float32))
    assert first == -140 and counts[0] == 1 and counts[140] == 2 and counts.sum() == 3
    assert exponent_counts(np.zeros(3))[1].sum() == 0


def test_what_is_kept_is_not_computed_again():
    store, calls, told = {}, itertools.count(), []
    for _ in range(2):
        kept = Kept(store, told.append)
        assert kept.stage("a", lambda: {"n": next(calls)}) == {"n": 0}
        assert set(kept.seconds) == {"a"}
    assert len(told) == 1
    with pytest.raises(ValueError, match="not JSON compliant"):
        kept.stage("b", lambda: float("nan"))
