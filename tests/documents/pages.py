"""Markdown pages: their links and anchors, their code blocks, and the code in their sentences.

Conventions of fenced code blocks, which `tests/test_documents.py` holds pages to:

- "python": the block runs, after the blocks above it on the page, in one namespace and in an empty
  directory.
- "python model": the same, in the test that needs the demo model (`make model`).
- "sh": every line is a command that `commands.check` accepts.
- No language: output, equations, layouts; nothing is checked.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
BUILT = {"build", "dist", "out"}
PARSER = MarkdownIt().enable("table")


class Block(NamedTuple):
    """A fenced code block: the words after the fence, the text, and the line it begins at."""

    info: str
    text: str
    line: int


def found(root: Path = ROOT) -> list[Path]:
    """Every page below a folder, without what tools have put there."""
    skipped = lambda part: part.startswith(".") or part in BUILT
    pages = sorted(root.rglob("*.md"))
    return [p for p in pages if not any(map(skipped, p.relative_to(root).parts))]


@functools.cache
def tokens(page: Path) -> list[Token]:
    """The page's block tokens, those of its sentences after the sentence."""
    blocks = PARSER.parse(page.read_text())
    return [t for block in blocks for t in (block, *(block.children or ()))]


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    fences = [t for t in tokens(page) if t.type == "fence"]
    return [Block(t.info.strip(), t.content, t.map[0] + 1) for t in fences]


def spans(page: Path) -> list[str]:
    """The code in the sentences and tables of a page."""
    return [t.content for t in tokens(page) if t.type == "code_inline"]


def links(page: Path) -> list[str]:
    """The targets of links and images."""
    targets = [t.attrs.get("href", t.attrs.get("src")) for t in tokens(page)]
    return [str(target) for target in targets if target is not None]


def anchors(page: Path) -> set[str]:
    """The anchors that a code host makes of the headings of a page."""
    made: dict[str, int] = {}
    for opened, inside in zip(tokens(page), tokens(page)[1:], strict=False):
        if opened.type == "heading_open":
            plain = "".join(t.content for t in inside.children if t.type != "link_open")
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
            made[slug] = made.get(slug, -1) + 1
    return {f"{s}-{i}" if i else s for s, n in made.items() for i in range(n + 1)}


def broken_link(page: Path, target: str) -> str | None:
    """Why a link of a page leads nowhere, or None; links to other hosts are not followed."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: no such file"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        return f"{target}: no such heading"
    return None


def missing_path(page: Path, span: str) -> str | None:
    """Why a path in backticks, from the page's folder or the root, leads nowhere, or None."""
    if not re.fullmatch(r"(?:[\w.]+/)+[\w.]*", span):
        return None
    if not span.endswith((".py", ".md", ".json", ".jsonl", ".cc", ".h", "/")):
        return None
    there = any((folder / span).exists() for folder in (page.parent, ROOT))
    return None if there else f"{span}: no such file"
