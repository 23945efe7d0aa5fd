"""The command, called in this process."""

import pytest

from jaxquant_models.cli.commands import main


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit status, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call
