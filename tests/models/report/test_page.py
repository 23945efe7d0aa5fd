"""The page: well-formed, self-contained, complete, and safe with hostile texts."""

import importlib.util
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from jaxquant_models.report import render
from jaxquant_models.report.limits import mark
from jaxquant_models.schemas.report import LimitRow, Report
from tests.support.sample_report import chips, full, minimal, tensor

# matplotlib's own parts warn of pyparsing's names
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VOID = {"meta", "br", "img", "link", "wbr", "input", "hr"}
EVIL = "<script>alert(1)</script>\"'&{{7*7}}$x_{\x00\u202e]]></svg><img src=x onerror=alert(1)>中文"


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(attributes) == len(dict(attributes)), (tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, *tags):
        """The attributes of all elements of these tags."""
        return [attributes for tag, attributes in self.elements if tag in tags]

    def ids(self):
        return [a["id"] for _, a in self.elements if "id" in a]


def soiled(value, field=""):
    """The fields of a report with hostile texts in place of all those that are free."""
    if isinstance(value, dict):
        return {k: soiled(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [soiled(v, field) for v in value]
    free = isinstance(value, str) and value and not (field == "kind" and "/" not in value)
    return value[:4] + EVIL if free else value


@pytest.fixture(scope="module")
def text():
    return render(full())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_loaded_from_elsewhere(text, page):
    assert text.startswith("<!doctype html>")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not page.all("link", "img", "iframe", "object", "image")
    assert page.all("script") == [{}]
    references = [a[k] for _, a in page.elements for k in ("href", "src", "xlink:href") if k in a]
    assert references and all(r.startswith("#") for r in references)
    assert {r[1:] for r in references} <= set(page.ids())
    inside = re.findall(r"url\(([^)]*)\)", text)
    assert inside and {u.removeprefix("#") for u in inside} <= set(page.ids())


def test_identifiers_are_unique(page):
    ids = page.ids()
    assert len(ids) > 100 and len(ids) == len(set(ids))


def test_the_page_is_accessible(page):
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    for landmark in ("header", "main", "nav", "footer"):
        assert len(page.all(landmark)) == 1
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    named = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert set(" ".join(named).split()) <= set(page.ids())
    assert all(a["role"] == "img" and "aria-labelledby" in a for a in page.all("svg"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )


def test_colours_are_those_of_the_style_sheet(text):
    """A placeholder left in a figure would be black on black in the dark."""
    figures = "".join(re.findall(r"(?s)<svg.*?</svg>", text))
    assert "var(--series-1)" in figures and "var(--ink)" in figures
    assert not re.findall(r"#[0-9a-f]{6}\b", figures)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_enough(text):
    """WCAG 2.2 AA: 4.5 for text, 3 for lines of figures; in the light and in the dark."""
    sheets = re.findall(r"(?s):root \{(.*?)\}", text)[:2]
    for sheet in sheets:
        colours = dict(re.findall(r"--([\w-]+): #([0-9a-f]{3,6})", sheet))
        light = {k: luminance(v if len(v) == 6 else "".join(2 * c for c in v))
                 for k, v in colours.items()}  # fmt: skip

        def ratio(a, b, light=light):
            high, low = max(light[a], light[b]), min(light[a], light[b])
            return (high + 0.05) / (low + 0.05)

        for ink in ("ink", "muted", "link"):
            assert ratio(ink, "paper") >= 4.5 and ratio(ink, "panel") >= 4.5, ink
        assert ratio("good", "good-panel") >= 4.5 and ratio("bad", "bad-panel") >= 4.5
        assert all(ratio(f"series-{i}", "paper") >= 3 for i in (1, 2, 3, 4))
    assert len(sheets) == 2 and sheets[0] != sheets[1]


@pytest.mark.parametrize(
    "words",
    [
        ["/tmp/gptq-4", "134,515,008", "89.4 MB", "85.1 MB", "210 × gptq", "100,000"],
        ["One matrix, down of layer 11", "--heal 200", "0.0412 → 0.0298", "predicted"],
        ["KL from the reference", "trellis 3 bits", "0.612", "86.4 %", "41,200", "17.5"],
        ["layers_11/", "All 210 rows", "0.0934", "13.8", "channel, massive", "1536 × 576"],
        ["2.68 bits of entropy", "exponent of 2"],
        ["participation ratio, reference", "21.9", "2,048 vectors"],
        ["✗ violated", "✗ collapsed", "✓ holds", "✓ survives", "undecided"],
        ["6 checks, 2 violated or collapsed", "a violated expectation unusual data"],
        ["tpu7x", "97,600", "✗ no", "NVIDIA GPUs", "operations per second", "3.1 mJ"],
        ["Horowitz 2014", "3.71 mJ", "77.1 %", "1.88 pJ", "O'Connor", "11.3 mJ"],
        ["activations of the embedding", "4 min 21 s", "0.10.2", "2026-12-02 14:00 UTC"],
    ],
    ids=lambda words: words[0],
)
def test_numbers_of_every_section_are_there(page, words):
    text = re.sub(r"\s+", " ", "".join(page.text))
    assert [w for w in words if w not in text] == []
    assert not re.search(r"\d\.\d{7}", text), "seven decimals are for machines"


def test_the_worst_tensor_comes_first_and_unknown_columns_are_dropped():
    tensors = [tensor("mlp/down", layer, 6) for layer in (3, 11, 4)]
    page = "".join(Page(render(minimal(tensors=tensors))).text)
    assert page.index("layers_11") < page.index("layers_3") and "R(D)" in page
    empty = {"distortion": None, "output_distortion": None, "shannon": None, "gap": None}
    bare = [t.model_copy(update=empty) for t in tensors]
    page = "".join(Page(render(minimal(tensors=bare))).text)
    assert "R(D)" not in page and "a lossless code would save" in page


def squeezed(report):
    return re.sub(r"\s+", " ", "".join(Page(render(report)).text))


def test_every_source_is_stated_once():
    names = ("int8_add_pj", "memory_pj_per_bit", "fp16_add_pj")
    energy = full().energy.model_copy(
        update={"constants": dict.fromkeys(names, 0.5), "sources": dict.fromkeys(names, "A table"),
                "by_bits": []}
    )  # fmt: skip
    text = squeezed(minimal(energy=energy, roofline=chips()[-1:] * 3))
    assert text.count("A table") == 1 and text.count("data sheet, read 2026-11") == 1
    assert "int8 add; memory; fp16 add" in text and "memory, pJ per bit" in text


def test_what_judges_the_model_comes_before_what_must_hold():
    rows = [("must hold", "theorem", "holds"), ("a number", "description", "-"),
            ("open question", "survival", "undecided"), ("passed", "survival", "survives"),
            ("unusual", "expectation", "violated"), ("broken", "survival", "collapsed"),
            ]  # fmt: skip
    limits = [
        LimitRow(name=name, statement="So it is said, at some length and in words.", kind=kind,
                 measured=1.0, bound=0.5, holds=None, verdict=verdict, seconds=0.0, note="")
        for name, kind, verdict in rows
    ]  # fmt: skip
    report = minimal(limits=limits)
    names = re.findall(r"<bdi>([a-z ]+)</bdi><small>", render(report))
    assert names == ["broken", "unusual", "passed", "open question", "must hold", "a number"]
    cells = Page(render(report)).all("td")  # which a phone shows one below another
    assert {"measured", "bound", "verdict"} <= {a.get("data-head") for a in cells}


def test_the_chips_can_be_compared():
    kinds = ("Apple M1", "Apple M1 Max", "Apple M4", "Laptop CPU, LPDDR5X-8533", "Laptop CPU, DDR5")
    rows = [c.model_copy(update={"chip": name, "prefill": 7_943_601.0, "critical_batch": None})
            for name, c in zip(kinds, chips(), strict=False)]  # fmt: skip
    page = render(minimal(roofline=rows))
    text = "".join(Page(page).text)
    assert "7,940,000" in text and "Apple M1." in text and "Laptops." in text
    assert "More users at a time do not change that here" in text
    assert "More users" not in squeezed(minimal(roofline=chips()[:1]))
    # Long names stand one below the other, since side by side they would be cut.
    found = re.findall(r'translate\(([\d.]+) [\d.]+\)">\n?\s*(Laptop[^<]+)', page)
    found = found or re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>(Laptop[^<]+)', page)
    assert len(found) == 2 and found[0][0] == found[1][0], found


def test_facts_that_say_nothing_are_left_out():
    identity = full().identity.model_copy(update={"bits_per_weight": 32, "bits_over_all": 32})
    text = squeezed(minimal(identity=identity))
    assert "bits over all parameters" in text and "bits per quantized weight" not in text
    assert text.index("Findings") < text.index("rope_theta")


def test_the_energy_of_the_model_as_it_is_stands_beside_others(text):
    bars = text[text.index("energy-plot-title") :]
    assert "as it is" in bars and "3.71 mJ" in bars[: bars.index("</svg>")]


def test_options_of_commands_are_not_broken(text):
    assert "<span>--method</span> <span>gptq</span>" in text


def test_hostile_texts_are_text():
    report = Report.model_validate(
        soiled(full(tensors=full().tensors[:14], roofline=chips()[:3]).model_dump())
    )
    text = render(report)
    page = Page(text)
    assert page.all("script") == [{}] and not page.all("img")
    assert EVIL[: EVIL.index("\x00")] in "".join(
        page.text
    )  # as it was written, formulas and templates included
    assert "{{7*7}}" in text
    assert not re.search("[\x00\u202e]", text)
    assert len(page.ids()) == len(set(page.ids()))


def test_what_is_missing_is_said():
    page = Page(render(minimal()))
    text = "".join(page.text)
    assert not page.all("svg", "table")
    for words in ("no frontier", "no tensor", "exponents were not", "hidden states was not",
                  "limits were not", "no chip", "energy of a token was not"):  # fmt: skip
        assert words in text
    assert "No recipe" in text and "Nothing stood out" in text


def test_extreme_values():
    points = [
        p.model_copy(update={"kl": kl, "bytes": size, "perplexity": 1e300})
        for p, kl, size in zip(
            full().frontier.points, (0, 1e9, -1e-9, 1e300, 1e-300), (0, 1, 10**18, 5, 10**40),
            strict=False,
        )
    ]  # fmt: skip
    rates = [(0.0, 1e-3), (1e-9, 0.0), (1e12, 1e9)]
    odd = [c.model_copy(update={"intensity": x, "ridge": r, "decode": x})
           for c, (x, r) in zip(chips(), rates, strict=False)]  # fmt: skip
    histogram = {"kind": "k", "first": -(10**30), "counts": [0, 10**30, 0, 1], "entropy": 0}
    energy = full().energy.model_copy(
        update={"weights": 0, "cache": 0, "arithmetic": 0, "landauer": 0, "by_bits": [(0, 0, 0)]}
    )
    changes = {
        "frontier": full().frontier.model_copy(update={"points": points}),
        "roofline": odd, "histograms": [histogram], "energy": energy,
        "identity": full().identity.model_copy(update={"parameters": 10**400}),
        "tensors": [t.model_copy(update={"output_distortion": 0.0}) for t in full().tensors[:14]],
    }  # fmt: skip
    text = "".join(Page(render(minimal(**changes))).text)
    assert "1×10⁹" in text and "×10³⁰⁰" in text and not re.search(r"\bnan\b|\binf\b", text)


def test_the_same_report_gives_the_same_page():
    report = minimal(energy=full().energy)
    assert render(report) == render(report)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs matplotlib; run: pip install 'jaxquant\[report\]'"
    ):
        render(minimal())


@pytest.mark.parametrize(
    ("kind", "verdict", "look"),
    [
        ("theorem", "violated", "bad"),
        ("survival", "collapsed", "bad"),
        ("expectation", "violated", ""),
        ("expectation", "holds", "good"),
        ("survival", "undecided", ""),
    ],
)
def test_a_violated_expectation_is_no_failure(kind, verdict, look):
    row = LimitRow(
        name="a", statement="b", kind=kind, measured=1.0, bound=0.5, holds=None, verdict=verdict,
        seconds=0.0, note="",
    )  # fmt: skip
    assert mark(row) == look
