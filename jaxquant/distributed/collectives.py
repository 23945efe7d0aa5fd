"""The collectives of a compiled program, parsed from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Bytes of one element by dtype, as HLO text spells both; packed, where it is less than one byte.
WIDTHS = {
    "pred": 1.0, "token": 0.0, "c64": 8.0, "c128": 16.0, "bf16": 2.0, "f4e2m1fn": 0.5,
    **dict.fromkeys((
        "f8e3m4", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz",
        "f8e8m0fnu",
    ), 1.0),
    **{f"f{n}": n / 8 for n in (16, 32, 64)},
    **{f"{sign}{n}": n / 8 for sign in "su" for n in (1, 2, 4, 8, 16, 32, 64)},
}  # fmt: skip

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|(?:branch|true|false)_computations?)="
    r"\{?(%?[\w.\-]+(?:, %[\w.\-]+)*)"
)
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COUNT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_OPERATION = re.compile(r"= (.*?) ([a-z][\w\-]*?)(-start)?\(")
# What only collectives have: attributes (apart from texts in quotes), and beginnings of opcodes.
_ATTRIBUTE = re.compile(r" (?:replica_groups|source_target_pairs)=")
_OPCODE = re.compile(r"all-|ragged-|collective-|reduce-scatter|send$|recv$")
_QUOTED = re.compile(r'"[^"]*"')
_ENDS = ("-done", "-update")  # later parts of an asynchronous operation, which its start counts
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_GROUPS = (
    re.compile(r"replica_groups=\{\{([\d,]+)\}"),
    re.compile(r"replica_groups=\[\d+,(\d+)\]"),
    re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}"),
)
_MODULE = re.compile(r"^HloModule .*$", re.M)
_DEVICES = re.compile(r"\b(?:replica_count|num_partitions)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      dtype: the dtype as HLO text spells it, such as "s32".
      shape: shape of the result on one device.
      group_size: number of devices in each group that takes part.
      count: how often the operation runs in one run of the program.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    group_size: int
    count: int

    @property
    def bytes(self) -> int:
        """Bytes of the result on one device, summed over all its runs."""
        return self.count * math.ceil(math.prod(self.shape) * width(self.dtype))

    @property
    def received(self) -> float:
        """Least number of bytes that one device receives from others, summed over all its runs.

        The result of a ragged all-to-all is assumed to be full, with equal parts from all devices.
        """
        others = (self.group_size - 1) / self.group_size
        factor = {
            "all-reduce": 2 * others, "reduce-scatter": self.group_size - 1, "all-gather": others,
            "all-to-all": others, "ragged-all-to-all": others, "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }  # fmt: skip
        return self.bytes * factor[self.kind]


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled program.

    If the compiler splits a collective into pieces, to overlap it with computation, the pieces
    share a channel and the name of the operation that they come from, and they count as one
    collective. A collective in the body of a loop runs once per trip; the number of trips is the
    one that the compiler recorded or, without it, the largest constant in the loop's condition.
    The collectives of all branches of a conditional are counted.

    Args:
      text: the HLO text of the program, as `jax.stages.Compiled.as_text` returns it.
    Returns:
      One `Collective` for each result of each collective operation.
    Raises:
      ValueError: the text has a collective operation that is not in `KINDS`, or a dtype that is not
        in `WIDTHS`; it gives the participating devices in an unknown form; or the number of trips
        of a loop that contains collectives is not known.

    >>> line = "%g = s32[8,4]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}"
    >>> (one,) = collectives("ENTRY %main (p: s32[4,4]) -> s32[8,4] {\\n  " + line + "\\n}")
    >>> one.kind, one.bytes, one.received
    ('all-gather', 128, 64.0)
    """
    lines, devices = dict(_computations(text)), _devices(text)
    times = _times(lines)
    found: dict[tuple, list[Collective]] = {}
    for name, body in lines.items():
        for i, line in enumerate(body):
            parts = list(_of_line(line, times[name], devices))
            if not parts:
                continue
            channel, origin = _CHANNEL.search(line), _ORIGIN.search(line)
            own = (channel[1], origin and origin[1]) if channel else (name, i)
            key = (*own, *(dataclasses.replace(part, count=1) for part in parts))
            if key not in found or found[key][0].count < parts[0].count:
                found[key] = parts
    return [one for parts in found.values() for one in parts]


def width(dtype: str) -> float:
    """Return the number of bytes that one element of a dtype takes, such as 0.5 for 4 bits.

    Args:
      dtype: the dtype as HLO text spells it, one of `WIDTHS`.
    Raises:
      ValueError: the dtype is unknown.

    >>> width("bf16"), width("pred"), width("f8e4m3fn"), width("s4"), width("u2")
    (2.0, 1.0, 1.0, 0.5, 0.25)
    """
    if dtype not in WIDTHS:
        raise ValueError(
            f"the dtype must be one of {', '.join(WIDTHS)}, got {dtype!r}; this version of XLA may "
            "have a new dtype: report it with this message"
        )
    return WIDTHS[dtype]


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the lines of every computation; the name of the entry is ""."""
    name: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if (head := _HEAD.match(line)) is not None:
            name, lines = "" if head[1] else head[2], []
        elif line == "}" and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _devices(text: str) -> int:
    """Return the number of devices of a program; 0 if the text does not state it."""
    module = _MODULE.search(text)
    counts = _DEVICES.findall(module[0]) if module else ()
    return math.prod(map(int, counts)) if counts else 0


def _times(lines: Mapping[str, list[str]]) -> dict[str, float]:
    """Return how often every computation runs; NaN where the trips of a loop are not known.

    The text lists every computation before those that call it.
    """
    times: dict[str, float] = {**dict.fromkeys(lines, 0), "": 1}
    for name in reversed(list(lines)):
        for line in lines[name]:
            loop = _LOOP.search(line)
            counts = {} if loop is None else {loop[2]: _trips(line, lines.get(loop[1], []))}
            called = [n.lstrip("%") for of in _CALLED.findall(line) for n in of.split(", ")]
            for other in filter(times.__contains__, called):
                times[other] += times[name] * counts.get(other, 1)
    return times


def _trips(loop: str, condition: list[str]) -> float:
    if (known := _KNOWN.search(loop)) is not None:
        return int(known[1])
    return max((int(n) for line in condition for n in _COUNT.findall(line)), default=math.nan)


def _of_line(line: str, times: float, devices: int) -> Iterator[Collective]:
    match = _collective(line)
    if match is None:
        return
    if math.isnan(times):
        raise ValueError(
            "the text must say how often its loops run, but the number of trips of the loop around "
            f"this collective is not known: {line.strip()[:300]!r}; pass the text of a program "
            "whose loops have constant lengths, such as jax.lax.scan"
        )
    for dtype, shape in _results(match):
        width(dtype)  # raises ValueError if the dtype is unknown
        yield Collective(match[2], dtype, shape, _group(line, devices), int(times))


def _collective(line: str) -> re.Match[str] | None:
    """Return the type, opcode and "-start" of a collective, or None for any other line.

    Sends and receives are refused unless the other side is the host, not a device.
    """
    match = _OPERATION.search(line)
    if match is None or match[2].endswith(_ENDS) or "is_host_transfer=true" in line:
        return None
    if not (_OPCODE.match(match[2]) or _ATTRIBUTE.search(_QUOTED.sub("", line))):
        return None
    if match[2] not in KINDS:
        raise ValueError(
            f"the collectives must be among {', '.join(KINDS)}, got {match[2]!r} in "
            f"{line.strip()[:300]!r}; this version of XLA may have a new collective: report it "
            "with this message"
        )
    return match


def _results(match: re.Match[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the dtype and shape of each result of a collective.

    An asynchronous start may return more than the results: its operands come before them (the
    inner parentheses, if there are several), and counters after them. The start of an all-reduce
    returns only its results.
    """
    arrays = _arrays(match[1])
    if not match[3] or match[2] == "all-reduce":
        return arrays
    if not match[1].startswith("(("):
        return arrays[1:2]
    operands = len(_arrays(match[1][: _closing(match[1])]))
    results = 1 if match[2] == "ragged-all-to-all" else operands  # its operands include offsets
    return arrays[operands : operands + results]


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the dtype and shape of each array of a type; a bounded length is its bound."""
    shapes = [(dtype, shape.replace("<=", "")) for dtype, shape in _ARRAY.findall(text)]
    return [(d, tuple(int(n) for n in s.split(",") if n)) for d, s in shapes]


def _closing(text: str) -> int:
    """Return the index at which the first inner parenthesis of a type is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 1 and letter == ")":
            return i
    return len(text)


def _group(line: str, devices: int) -> int:
    """Return the number of devices in a group, from any of the forms in which XLA writes groups."""
    listed, counted, named = (pattern.search(line) for pattern in _GROUPS)
    if listed is not None:
        return listed[1].count(",") + 1
    if counted is not None:
        return int(counted[1])
    if named is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])  # 'x':(2)4 is a part of x
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if "source_target_pairs=" in line:
        return 2
    if "replica_groups={}" in line and devices:
        return devices
    raise ValueError(
        "expected replica_groups or source_target_pairs in a known form, got unknown groups of "
        f"devices in {line.strip()[:300]!r}; this version of XLA may write them in a new form: "
        "report it with this message"
    )
