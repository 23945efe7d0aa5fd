"""Small files as they should be, and what each reader makes of them."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import traceback
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import storage
from jaxquant.durable.store import Folder
from jaxquant.lossless import archive_format
from jaxquant.lossless.archive_read import extract
from jaxquant.lossless.plane_coding import CODINGS
from jaxquant.storage import checkpoint
from jaxquant_models.architectures.rope import frequencies
from jaxquant_models.cli.quantize_request import recipe_of_file
from jaxquant_models.readers.encoder import bert_config_from_hf, load_encoder
from jaxquant_models.readers.gguf import read_gguf
from jaxquant_models.readers.gguf_tokenizer import tokenizer_from_gguf
from jaxquant_models.readers.huggingface import read_hf
from jaxquant_models.readers.huggingface_config import config_from_hf, read_config_json
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.schemas.strict import read_json
from tests.fuzz.mutations import BLIND, Mutation, of_archive, of_gguf, of_json, of_safetensors
from tests.support import archives, gguf_files, tiny_bert
from tests.support.dfloat11 import compressed_folder
from tests.support.gguf_vocabularies import byte_fields, piece_fields
from tests.support.tiny_llama import (
    BASE,
    FAMILIES,
    byte_tokenizer_json,
    random_tensors,
    shard,
    write_folder,
)

TEXT = "He said: 12 é\u0301 日本 <s></s>\n\t"
RUN = {"seed": 1, "recipe": ["rtn", 4], "text": "abc"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Files that lie in one folder, and a reader of it.

    Attributes:
      files: that may be mutated, with the mutations made for their kind.
      read: the folder to anything; where `same`, equal to what it made of the files as they were.
    """

    folder: Path
    files: dict[str, list[Mutation]]
    read: Callable[[Path], Any]
    same: Any = None


def cases(place: Path) -> dict[str, list[Case]]:
    """Readers by name, with their seed corpus, written below a folder.

    Another process writes it, and reads what is to stay the same: a process that has computed with
    JAX cannot be forked, its threads would be missing.
    """
    kept = place / "same.pickle"
    pid = os.fork()
    if pid == 0:
        try:
            made = _cases(place, write=True)
            read = {
                c.folder.name: c.read(c.folder)
                for reader in ("checkpoint", "partial", "archive")
                for c in made[reader]
            }
            kept.write_bytes(pickle.dumps(read))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.waitpid(pid, 0)
    same = pickle.loads(kept.read_bytes())
    found = _cases(place, write=False)
    put = lambda c: dataclasses.replace(c, same=same.get(c.folder.name))
    return {reader: [put(case) for case in group] for reader, group in found.items()}


def _cases(place: Path, write: bool) -> dict[str, list[Case]]:
    return {
        "gguf": _gguf(place, write),
        "safetensors": _folders(place, "st", ["model.safetensors"], write),
        "dfloat11": _compressed(place, write),
        "config": _configs(place, write),
        "index": _index(place, write),
        "tokenizer": _tokenizers(place, write),
        "checkpoint": _checkpoints(place, write),
        "partial": _partial(place, write),
        "recipe": _recipes(place, write),
        "archive": _archives(place, write),
    }


def _own(name: str) -> list[Mutation]:
    kinds = {".json": of_json, ".gguf": of_gguf, ".safetensors": of_safetensors,
             ".jqz": of_archive}  # fmt: skip
    return [kinds[Path(name).suffix]] if Path(name).suffix in kinds else []


def _case(folder: Path, names: list[str], read: Callable) -> Case:
    return Case(folder, {name: [*BLIND, *_own(name) * 8] for name in names}, read)


def _gguf(place: Path, write: bool) -> list[Case]:
    found = []
    for family in ("llama", "qwen2", "llama-llama3"):
        hf, folder = FAMILIES[family], place / f"gguf-{family}"
        if write:
            folder.mkdir()
            tensors = gguf_files.to_gguf(hf, random_tensors(hf))
            gguf_files.write(folder / "m.gguf", hf, tensors)
        found.append(
            _case(folder, ["m.gguf"], lambda f: read_gguf(f / "m.gguf")[1].whole(np.float32))
        )
    return found


def _folders(place: Path, kind: str, names: list[str], write: bool) -> list[Case]:
    found = []
    for family in ("llama", "qwen3", "llama-llama3"):
        hf, folder = FAMILIES[family], place / f"{kind}-{family}"
        if write:
            write_folder(folder, hf, random_tensors(hf))
            (folder / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
        found.append(_case(folder, names, lambda f: read_hf(f)[1].whole(np.float32)))
    bert = place / f"{kind}-bert"
    if write:
        bert.mkdir()
        tiny_bert.write(bert)
    return [*found, _case(bert, names[:1], load_encoder)]


def _compressed(place: Path, write: bool) -> list[Case]:
    folder = place / "dfloat11"
    if write:
        compressed_folder(folder, BASE, random_tensors(BASE), threads=64)
    read = lambda f: read_hf(f)[1].whole(np.float32)
    return [_case(folder, ["model.safetensors", "config.json"], read)]


def _configs(place: Path, write: bool) -> list[Case]:
    """Most are read alone, for a model of other sizes takes a while to trace."""
    whole = _folders(place, "config", ["config.json", "generation_config.json"], write)
    parts = [lambda f: frequencies(config_from_hf(read_config_json(f)))] * 3
    parts += [lambda f: bert_config_from_hf(read_json(f / "config.json"))]
    alone = [dataclasses.replace(c, read=read) for c, read in zip(whole, parts, strict=True)]
    return [*whole, *alone * 9]


def _index(place: Path, write: bool) -> list[Case]:
    folder = place / "index"
    if write:
        tensors = random_tensors(BASE)
        shard(write_folder(folder, BASE, tensors), tensors)
    read = lambda f: read_hf(f)[1].whole(np.float32)
    return [_case(folder, ["model.safetensors.index.json"], read)]


def _tokenizers(place: Path, write: bool) -> list[Case]:
    made = {
        "file": byte_tokenizer_json,
        "bytes": lambda: tokenizer_from_gguf(byte_fields("llama-bpe")).to_json(),
        "pieces": lambda: tokenizer_from_gguf(piece_fields()).to_json(),
    }
    for name, text in made.items():
        if write:
            (place / f"tokenizer-{name}").mkdir()
            file = place / f"tokenizer-{name}" / "tokenizer.json"
            file.write_text(text(), encoding="utf-8")
    return [_case(place / f"tokenizer-{name}", ["tokenizer.json"], _round_trip) for name in made]


def _round_trip(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    tokenizer.check_rows(2**24)
    tokenizer.decode(tokenizer.encode(TEXT, special=True))


CHECKPOINTS = {
    "rtn": jq.rtn(bits=4), "groups": jq.rtn(bits=3, group_size=32), "float8": jq.float8(),
    "ternary": jq.ternary(), "nf": jq.normal_float(),
}  # fmt: skip


def _checkpoints(place: Path, write: bool) -> list[Case]:
    found = []
    for name, method in CHECKPOINTS.items():
        folder = place / f"checkpoint-{name}"
        if write:
            w = jax.random.normal(jax.random.key(0), (64, 32))
            params = {"layer": {"kernel": jq.quantize_array(w, method), "bias": jnp.arange(3.0)}}
            recipe = jq.Recipe([("*kernel", method), ("*", jq.KEEP)])
            checkpoint.save(folder, params, recipe=recipe, metadata={"name": name, "n": [1, 2.5]})
        found.append(_case(folder, _names(folder), _loaded))
    return found


def _names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _loaded(folder: Path) -> Any:
    recipe, metadata = storage.stored_recipe(folder), storage.stored_metadata(folder)
    leaves, treedef = jax.tree.flatten(checkpoint.load(folder))
    arrays = [(str(a.dtype), a.shape, np.asarray(a).tobytes()) for a in leaves]
    return json.dumps([str(treedef), recipe.to_json(), metadata]), arrays


def _partial(place: Path, write: bool) -> list[Case]:
    folder = place / "partial"
    if write:
        made, rng = Folder(folder, RUN), np.random.default_rng(0)
        for i in range(4):
            made[f"matrix {i}"] = {"codes": rng.integers(0, 99, (5, 7), np.int32),
                                   "scale": rng.normal(size=4).astype(np.float32)}  # fmt: skip
        made.close()
    return [_case(folder, _names(folder), _resumed)]


def _resumed(folder: Path) -> Any:
    """What is there to go on with: any of it may be missing, for it is made again."""
    kept = Folder(folder, RUN)
    found = {name: {k: v.tobytes() for k, v in kept[name].items()} for name in kept}
    kept.close()
    return found


def _recipes(place: Path, write: bool) -> list[Case]:
    if write:
        methods = [jq.rtn(bits=4), jq.gptq(bits=3), jq.duquant(), jq.flatquant(), jq.lsq(bits=2),
                   jq.entropy_coded(bits=2), jq.trellis(bits=2), jq.vptq(), jq.awq()]  # fmt: skip
        whole = [jq.Recipe([("*kernel", m), ("*", jq.KEEP)]).to_json() for m in methods]
        short = {"method": "gptq", "bits": 3, "group_size": 64, "activations": "int8"}
        rules = [{"pattern": "*l", **short}, {"pattern": "*", "method": "keep"}]
        for i, recipe in enumerate([*whole, rules]):
            (place / f"recipe-{i}").mkdir()
            (place / f"recipe-{i}" / "recipe.json").write_text(json.dumps(recipe))
    return [_case(f, ["recipe.json"], _planned) for f in sorted(place.glob("recipe-*"))]


def _archives(place: Path, write: bool) -> list[Case]:
    """Of a few tensors, in chunks of a kilobyte and in one chunk each, in both codings."""
    found = []
    for coding, size in itertools.product(CODINGS, (archives.SMALL, archive_format.CHUNK)):
        folder = place / f"archive-{coding}-{size}"
        if write:
            folder.mkdir()
            data, sections = archives.numbers()
            with unittest.mock.patch.object(archive_format, "CHUNK", size):
                archives.archive_of(folder, data, sections, coding=coding)
            (folder / "source").unlink()
        found.append(_case(folder, ["whole.jqz"], _extracted))
    return found


def _extracted(folder: Path) -> bytes:
    extract(folder / "whole.jqz", folder / "again", threads=1)
    found = (folder / "again").read_bytes()
    (folder / "again").unlink()
    return found


def _planned(folder: Path) -> None:
    recipe = recipe_of_file(str(folder / "recipe.json"))
    if jq.Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) != recipe:
        raise RuntimeError("a recipe is not what its JSON form says")
    hash(recipe), str(recipe)


def copy(case: Case, target: Path) -> None:
    """The case's files, fresh."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(case.folder, target)
