"""The command, called in this process, and a tiny model for it."""

import pytest

from jaxquant_models.cli.commands import main
from tests.support.command import TEXT
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit status, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_folder(folder, BASE | {"max_position_embeddings": 1024}, random_tensors(BASE))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    (folder.parent / "text.txt").write_text(TEXT)
    return folder
