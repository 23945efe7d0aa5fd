"""The limits and their verdicts."""

from jaxquant_models.report.numbers import DASH, duration
from jaxquant_models.report.section import Section
from jaxquant_models.report.table import Column, table
from jaxquant_models.schemas.report import LimitRow, Report

MARKS = {"holds": "good", "survives": "good", "violated": "bad", "collapsed": "bad"}
FAILED = ("violated", "collapsed")
SIGNS = {"good": "✓ ", "bad": "✗ ", "": ""}
MEANINGS = {
    "theorem": "must hold for any model: a violation means a wrong measurement",
    "expectation": "holds for data of a stated distribution",
    "survival": "judges quantization against a tolerance",
    "description": "a number without a verdict",
}


def mark(row: LimitRow) -> str:
    """Return "good", "bad" or "" for a verdict; a violated expectation shows unusual data alone."""
    unusual = row.verdict == "violated" and row.kind == "expectation"
    return "" if unusual else MARKS.get(row.verdict, "")


def _words(row: LimitRow) -> str:
    return f"{row.statement} {row.note}".strip()


COLUMNS = (
    Column("limit", "", lambda r: r.name, str, _words),
    Column("verdict", "Whether the comparison came out as stated.", lambda r: r.verdict,
           lambda v: DASH if v == "-" else SIGNS[MARKS.get(v, "")] + v, None, mark),
    Column("measured", "What was measured on this model.", lambda r: r.measured),
    Column("bound", "What it is compared with, computed for this model.", lambda r: r.bound),
    Column("kind", "; ".join(f"{k}: {v}" for k, v in MEANINGS.items()) + ".",
           lambda r: r.kind, str),
    Column("time", "Time that the check took.", lambda r: r.seconds, duration),
)  # fmt: skip


def section(report: Report) -> Section | None:
    """Return the section, or None if no limit was checked; failures come first."""
    if not report.limits:
        return None
    order = {"bad": 0, "good": 1, "": 2}
    rank = lambda r: (r.verdict not in FAILED, r.kind != "survival", order[mark(r)])
    rows = sorted(report.limits, key=lambda r: (order[mark(r)] > 0, *rank(r)))
    failed = [r.name for r in rows if r.verdict in FAILED]
    count = f"{len(rows)} checks, {len(failed)} violated or collapsed"
    lead = (
        count + (f": {', '.join(failed)}." if failed else "."),
        "Rows of the kind survival judge quantization: that of the model, and of the vectors of a "
        "retriever. A violated theorem shows a wrong measurement, a violated expectation unusual "
        "data.",
    )
    return Section("limits", "Limits", lead, (), (table("The limits", COLUMNS, rows),))
