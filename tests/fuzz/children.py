"""Inputs run in limited processes that are forked from this one, warmed by its imports.

A child does many inputs and says of each, through a pipe, that it begins and what it found. When it
dies or takes too long, the input that it was at is run once more alone, and is a finding if it does
so again.
"""

import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.corpus import Case, copy

MEMORY, SECONDS = 2 << 30, 10  # beyond the parent's; an input
BATCH = 1000
LONGEST = 500  # characters of an error


def judge(cases: dict[str, list[Case]], seed: int, number: int, place: Path) -> dict[str, Any]:
    """Make and read one input; what was found, or {}."""
    rng = random.Random(f"{seed} {number}")
    reader = sorted(cases)[number % len(cases)]
    case = rng.choice(cases[reader])
    name = rng.choice(sorted(case.files))
    target = place / case.folder.name
    copy(case, target)
    file = target / name
    data, made = file.read_bytes(), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        mutation = rng.choice(case.files[name])
        made.append(mutation.__name__)
        data = mutation(rng, data) if data else b""
    file.write_bytes(data)
    found = _read(case, target)
    if not found:
        return {}
    return {"number": number, "reader": reader, "file": f"{case.folder.name}/{name}",
            "mutations": made, **found}  # fmt: skip


def _read(case: Case, target: Path) -> dict[str, Any]:
    try:
        result = case.read(target)
    except ValueError as error:
        text = str(error)
        if type(error) is ValueError and text and len(text) <= LONGEST + len(str(target)):
            return {} if "\n" not in text else {"error": "more than a line", "text": text[:300]}
        plain = type(error) is ValueError
        name = f"a line of {len(text)}" if plain else type(error).__name__
        return {"error": name, "text": text[:300]}
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(where.filename).name}:{where.lineno}"
        return {"error": type(error).__name__, "text": str(error)[:300], "at": at}
    if isinstance(case.same, dict) and isinstance(result, dict):
        changed = [k for k, v in result.items() if case.same.get(k) != v]
    else:
        changed = [] if case.same is None or result == case.same else ["all"]
    return {"error": "silent change", "text": str(changed)[:300]} if changed else {}


def run(cases: dict[str, list[Case]], seed: int, numbers: Iterator[int]) -> Iterator[dict]:
    """Findings of the inputs, as they come; with None after each batch, to look at the clock."""
    with tempfile.TemporaryDirectory(dir=_fast()) as place:
        while batch := [n for n, _ in zip(numbers, range(BATCH), strict=False)]:
            while batch:
                found, at = _child(cases, seed, batch, Path(place))
                yield from found
                if at is None:
                    break
                again, twice = _child(cases, seed, [batch[at]], Path(place))
                yield from again
                if twice is not None:
                    yield again_alone(cases, seed, batch[at], again)
                batch = batch[at + 1 :]
            yield {}


def again_alone(cases: dict, seed: int, number: int, said: list) -> dict[str, Any]:
    """Of an input that ends or hangs a process of its own."""
    reader = sorted(cases)[number % len(cases)]
    return {"number": number, "reader": reader, "error": "crash or hang", "said": said}


def _fast() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _child(
    cases: dict, seed: int, batch: list[int], place: Path
) -> tuple[list[dict[str, Any]], int | None]:
    """(findings, place in the batch of the input that ended or held up the child, if one did)."""
    out, into = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        _work(cases, seed, batch, place, into)
    os.close(into)
    found, at, done, rest = [], -1, False, b""
    while select.select([out], [], [], SECONDS)[0]:
        data = os.read(out, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in map(json.loads, lines):
            done = done or line == "done"
            if line == "next":
                at += 1
            elif isinstance(line, dict):
                found.append(line)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(out)
    return found, None if done else max(at, 0)


def _work(cases: dict, seed: int, batch: list[int], place: Path, into: int) -> None:
    """The child's life; it never returns."""
    say = lambda value: os.write(into, json.dumps(value).encode() + b"\n")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    try:
        for number in batch:
            say("next")
            if found := judge(cases, seed, number, place):
                say(found)
        say("done")
    finally:
        os._exit(0)
