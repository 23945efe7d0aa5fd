"""Parts of an analysis: knees, temperatures, sentences, names; each by what it must find."""

import dataclasses
import itertools
import shlex

import numpy as np
import pytest

import jaxquant as jq
from jaxquant_models.cli.quantize import quantize
from jaxquant_models.cli.quantize_request import request_of
from jaxquant_models.readers import registry
from jaxquant_models.runs.analysis.findings import findings
from jaxquant_models.runs.analysis.kept import Kept
from jaxquant_models.runs.analysis.knee import knee
from jaxquant_models.runs.analysis.names import parameter_path
from jaxquant_models.runs.analysis.outer import heaviest
from jaxquant_models.runs.analysis.request import AnalysisRequest
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.runs.analysis.temperatures import temperatures
from jaxquant_models.runs.analysis.tensors import exponent_counts
from jaxquant_models.runs.analysis.variants import command_of, quoted, variants_of
from jaxquant_models.runs.analysis.walls import energy, roofline_rows
from jaxquant_models.schemas.report import (
    ChipRow,
    Dimensions,
    Frontier,
    LimitRow,
    Point,
    TensorRow,
)
from tests.support.tiny_llama import BASE, random_tensors, write_folder


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
    found = temperatures({"a": curve, "b": curve, "c": curve}, {"a": 3.5, "b": 5.0, "c": 2.0})
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


def row(path, stored=4.0, ideal=4.0, temperature=1.0):
    unknown = dict.fromkeys(
        ("entropy", "exponent", "distortion", "output_distortion", "shannon", "gap", "gap_decibels")
    )
    return TensorRow(
        path=path, kind=path, shape=[2, 3], method="gptq", format="", bytes=3, stored=stored,
        ideal=ideal, temperature=temperature, largest=3.0, kurtosis=0.0, outliers=[], **unknown,
    )  # fmt: skip


def chip(name, ridge, intensity=1.0, batch=None):
    return ChipRow(
        chip=name, source="", fits=True, decode=1.0, prefill=1.0, wall="memory",
        critical_batch=batch, intensity=intensity, ridge=ridge, joules=None,
    )  # fmt: skip


def test_findings_say_nothing_where_there_is_nothing_to_say():
    """Codes without slack, equal temperatures, losses that follow the law, mixtures as good."""
    points = [
        point("gptq 4 bits", 4, 0.01), point("gptq 3 bits", 3, 0.03),
        point("gptq mixed 3.50 bits", 3.5, 0.00999),
    ]  # fmt: skip
    frontier = Frontier(reference="m", perplexity=9.0, points=points, tokens=100)
    flat = Dimensions(estimators=["TwoNN"], layers=[[2.0], [2.0]], reference=None, points=99)
    tensors = [row("a"), row("b")]
    assert findings(tensors, frontier, flat, [], [], {"massive": None}) == []
    tensors = [row("a", ideal=3.0, temperature=3.0), row("b")]
    points[2] = point("gptq mixed 3.50 bits", 3.5, 0.005)
    curved = flat.model_copy(update={"layers": [[2.0], [3.0]]})
    frontier = frontier.model_copy(update={"points": points})
    assert len(findings(tensors, frontier, curved, [], [], {})) == 4


def test_sentences_of_findings():
    top = {"layers": [3], "channel": 5, "text": "0 'a'", "value": -200.0, "layer": 3, "ratio": None}
    (found,) = findings([], None, None, [], [], {"massive": top})
    assert found.endswith("reaches -200 after layer 3, where the median is 0.")
    top |= {"layers": [3, 4, 9], "ratio": 1500.0}
    (found,) = findings([], None, None, [], [], {"massive": top})
    assert "1500 times the median; such values occur from layer 3 to layer 9." in found
    bounded = LimitRow(
        name="n", statement="So.", kind="theorem", measured=None, bound=0.5, holds=False,
        verdict="violated", seconds=0.0, note="",
    )  # fmt: skip
    (found,) = findings([], None, None, [bounded], [], {})
    assert found == "Limit 'n' violated: So. Bound: 0.5."
    chips = [chip("slow", 10.0, batch=40.0), chip("fast", 100.0)]
    (found,) = findings([], None, None, [], chips, {})
    assert "1.00% of the arithmetic of fast" in found and "no number of sequences" in found
    (found,) = findings([], None, None, [], chips[:1], {})
    assert "10.00% of the arithmetic of slow" in found and "takes 40 sequences" in found


def test_what_is_heavy():
    """Half of the bytes in one matrix that is left alone, a quarter, and one that is quantized."""
    params = {"embed": np.zeros((8, 4), np.float16), "norm": np.zeros(99, np.float32)}
    heavy = heaviest(params, 128, "gptq 4 bits")
    assert heavy == ("embed", 64, 128, "gptq 4 bits")
    text = "embed takes 50% of the bytes of gptq 4 bits and is not quantized."
    assert findings([], None, None, [], [], {}, heavy) == [text]
    assert findings([], None, None, [], [], {}, heavy._replace(total=256)) == []
    packed = {"embed": jq.quantize_array(np.ones((64, 4), np.float32), jq.rtn(4, 64))}
    assert heaviest(packed, 128, "m") is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("analysis") / "it's mine"
    return write_folder(place, BASE, random_tensors(BASE))


def test_unstacked_layers_have_the_bounds_of_stacked_ones(folder):
    model = registry.load(str(folder))
    apart = dataclasses.replace(model, params=jq.ptq.unstack(model.params, "layers"))
    asked = AnalysisRequest(str(folder), context=100)
    of = lambda m: Subjects(asked, m, None, "", "", np.zeros((1, 1), int))
    stacked, unstacked = (of(m) for m in (model, apart))
    assert roofline_rows(stacked)[0].decode == roofline_rows(unstacked)[0].decode
    widths = zip(energy(stacked).by_bits, energy(unstacked).by_bits, strict=True)
    # The scales of norms count as products if they are stacked.
    assert all(a == pytest.approx(b, rel=0.02) for a, b in widths)


def test_commands_make_what_was_measured(folder):
    """With the options of a command line, `jaxquant quantize` makes the request of the version."""
    outline = registry.open_model(folder).outline
    for effort in ("fast", "default"):
        asked = AnalysisRequest(str(folder), effort=effort)
        made = variants_of(asked, outline)
        assert len(made) == len(asked.size.variants)
        for variant in made:
            program, name, *words = shlex.split(command_of(str(folder), variant, effort))
            given = quantize.make_context(name, words).params
            assert (program, given.pop("model")) == ("jaxquant", str(folder))
            mine = {k: v for k, v in given.items() if k not in ("out", "overwrite", "as_json")}
            assert request_of(**mine) == variant.request


def test_commands_name_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shlex.split(quoted("a b/model")) == [str(tmp_path / "a b" / "model")]
    assert quoted("smollm2-135m") == "smollm2-135m"


def test_names_of_both_kinds_of_files():
    pairs = {
        "blk.12.ffn_down.weight": "layers/mlp/down/kernel",
        "model.layers.0.self_attn.o_proj.weight": "layers/attn/o/kernel",
        "token_embd.weight": "embed/embedding",
        "lm_head.weight": "head/kernel",
        "layers/7/attn/q/kernel": "layers/attn/q/kernel",
        "blk.12.attn_norm.weight": None,
        "blk.3.ffn_up_exps.weight": "layers/mlp/experts/up/kernel",
        "blk.3.ffn_gate_inp.weight": "layers/mlp/router/kernel",
        "model.layers.2.mlp.experts.17.down_proj.weight": "layers/mlp/experts/down/kernel",
        "model.layers.2.block_sparse_moe.experts.3.w3.weight": "layers/mlp/experts/up/kernel",
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
