"""The page of `jaxquant analyze`: one self-contained HTML file."""

from jaxquant_models.report.page import check, render

__all__ = ["check", "render"]
