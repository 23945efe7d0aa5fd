"""What is done to the bytes of a file: blindly, or by the structure of its kind."""

import copy
import json
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator

from jaxquant.lossless import plane_coding
from jaxquant.lossless.archive_format import CHUNK_HEAD, HEAD, MAGIC, TRAILER, VERSION

DEEP, HUGE = "@deep@", "@huge@"  # stand-ins, for Python writes neither
VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64, 0.0, -0.5, 1e300,
    1e-300, math.nan, math.inf, "", "a", "1e-5", "../x", "\ud800", "\0", "x" * 10_000, [], {}, [[]],
    [1, "a"], {"a": {}}, {"type": "Chain", "parts": []}, DEEP, HUGE,
]  # fmt: skip
WORDS = [
    0,
    1,
    2,
    7,
    9,
    12,
    13,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
]

Mutation = Callable[[random.Random, bytes], bytes]


def flip(rng: random.Random, data: bytes) -> bytes:
    """One to four bits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A few bytes by others."""
    at, size = _place(rng, data), rng.choice([1, 2, 4, 8, 16])
    return data[:at] + rng.randbytes(size) + data[at + size :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    """The end is cut, or all of it."""
    return data[: rng.choice([0, 1, 8, _place(rng, data), len(data) - 1])]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were not there."""
    at = _place(rng, data)
    return data[:at] + rng.choice([b"\0", b"\xff", b'"', b"}", b"[", rng.randbytes(9)]) + data[at:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """A part of it, copied or moved to another place."""
    a, b = sorted((_place(rng, data), _place(rng, data)))
    at, part = _place(rng, data), data[a : min(b, a + 4096)]
    kept = data[:a] + data[b:] if rng.random() < 0.5 else data
    return kept[:at] + part + kept[at:]


def _place(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


BLIND: list[Mutation] = [flip, overwrite, truncate, insert, splice]


def of_json(rng: random.Random, data: bytes) -> bytes:
    """One to three values replaced, dropped, doubled or renamed."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # mutated before
        return flip(rng, data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _changed(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.05 and "{" in text:
        key = json.dumps(rng.choice(sorted(value)) if isinstance(value, dict) and value else "a")
        text = text.replace("{", f"{{{key}: 1, ", 1)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{HUGE}"', "1" + "0" * 5000).encode()


def _changed(rng: random.Random, value: object) -> object:
    places, new = list(_places(value)), copy.deepcopy(rng.choice(VALUES))
    if not places:
        return new
    holder, key = rng.choice(places)
    how = rng.random()
    if how < 0.6:
        holder[key] = new
    elif how < 0.75:
        del holder[key]
    elif how < 0.9:  # the value of another place
        other, there = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[there]))
    elif isinstance(holder, dict):
        holder[rng.choice(["", "type", "x", "\ud800", key + "_"])] = holder.pop(key)
    else:
        holder.insert(key, new)
    return value


def _places(value: object) -> Iterator[tuple]:
    """(container, key) of every value below, of long lists and objects the first few."""
    if not isinstance(value, dict | list):
        return
    keys = list(value)[:40] if isinstance(value, dict) else range(min(len(value), 40))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header as JSON, its length kept right or not."""
    size = int.from_bytes(data[:8], "little")
    header = of_json(rng, data[8 : 8 + size])
    size = len(header) if rng.random() < 0.9 else rng.choice(WORDS)
    return struct.pack("<Q", size) + header + data[8 + len(data[8 : 8 + size]) :]


def of_gguf(rng: random.Random, data: bytes) -> bytes:
    """One to three numbers of the header: counts, lengths, types, values, sizes, offsets."""
    try:
        numbers = _numbers(data)
    except (KeyError, struct.error):  # mutated before
        return flip(rng, data)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, size = rng.choice(numbers)
        out[at : at + size] = (rng.choice(WORDS) % 256**size).to_bytes(size, "little")
    return bytes(out)


def of_archive(rng: random.Random, data: bytes) -> bytes:
    """Chunks moved, doubled or dropped, or one to three numbers of the head, table and chunks.

    The checksum of the head is made right again, so that what it protects is looked at.
    """
    try:
        table, bodies, trailer = _parts(data)
    except (ValueError, struct.error):  # mutated before
        return flip(rng, data)
    if bodies and rng.random() < 0.4:
        i, j = rng.randrange(len(bodies)), rng.randrange(len(bodies))
        how = rng.choice(["swap", "double", "drop"])
        if how == "swap":
            bodies[i], bodies[j] = bodies[j], bodies[i]
        else:
            bodies[i : i + 1] = [bodies[i]] * 2 if how == "double" else []
        return _archive(table) + b"".join(bodies) + trailer
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if bodies and rng.random() < 0.6:
            i = rng.randrange(len(bodies))
            bodies[i] = _number(rng, bodies[i], rng.choice([0, 4, 8, 13]), 4)
        elif rng.random() < 0.2:
            trailer = _number(rng, trailer, 0, 8)
        elif table:
            table = _number(rng, table, rng.randrange(len(table)), rng.choice([1, 2, 8]))
    return _archive(table) + b"".join(bodies) + trailer


def _number(rng: random.Random, data: bytes, at: int, size: int) -> bytes:
    new = (rng.choice(WORDS) % 256**size).to_bytes(size, "little")
    return data[:at] + new + data[at + size :]


def _parts(data: bytes) -> tuple[bytes, list[bytes], bytes]:
    """(table, chunks, trailer) of an archive."""
    _, _, code, size, coded, _ = HEAD.unpack_from(data)
    at = HEAD.size + coded
    table = (
        bytes(plane_coding.decode(code, memoryview(data)[HEAD.size : at], size)) if size else b""
    )
    bodies, end = [], len(data) - TRAILER.size
    while at < end:
        start, at = at, at + CHUNK_HEAD.size + CHUNK_HEAD.unpack_from(data, at)[1]
        bodies.append(data[start:at])
    return table, bodies, data[end:]


def _archive(table: bytes) -> bytes:
    """The head and the table of an archive, the table raw."""
    head = HEAD.pack(MAGIC, VERSION, plane_coding.RAW, len(table), len(table), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head + table)) + table


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _numbers(data: bytes) -> list[tuple[int, int]]:
    """(place, bytes) of the header's numbers; of an array's elements the first few."""
    found, at = [(4, 4), (8, 8), (16, 8)], 24

    def number(size: int, kept: bool = True) -> int:
        nonlocal at
        if kept:
            found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text(kept: bool = True) -> None:
        nonlocal at
        size = number(8, kept)
        at += size

    def value(kind: int, kept: bool = True) -> None:
        if kind == 8:
            text(kept)
        elif kind == 9:
            inner = number(4)
            for i in range(min(number(8), 999)):
                value(inner, i < 4)
        else:
            number(_SIZES[kind], kept)

    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    for _ in range(min(pairs, 99)):
        text()
        value(number(4))
    for _ in range(min(tensors, 99)):
        text()
        for _ in range(min(number(4), 9)):
            number(8)
        number(4), number(8)
    return found
