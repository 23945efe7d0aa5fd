"""Where a command writes: held against other runs while it works, published whole at its end."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import click
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.durable.claims import claim
from jaxquant.durable.store import Folder, digest
from jaxquant.storage import checkpoint
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.console import line
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.readers.model import Model

RUN = "run"  # in a checkpoint's metadata: the digest of the run that made it


class Output:
    """The directory `--out` of a command, and the folder beside it that keeps its work meanwhile.

    Attributes:
      out: the directory.
      path: the folder.
      finished: the contents of the folder, once `begin` has opened it.

    Raises:
      ValueError: a checkpoint may not be written there.
    """

    def __init__(self, out: str | Path, overwrite: bool) -> None:
        self.out = out
        self.overwrite = overwrite
        self.path = folder_of(out)
        try:
            self._check()
        except ValueError:
            _sweep(self.path)
            raise

    def hold(self) -> None:
        """Keep other runs from writing there until the command ends.

        Raises:
          ValueError: another run writes there.
        """
        click.get_current_context().with_resource(claim(self.path))
        interrupts.about(self._about)

    def begin(self, run: Mapping[str, JsonValue], *, refuse: bool = False) -> Folder:
        """Open the folder for as long as the command runs.

        Raises:
          ValueError: as `Folder`; or another run has ended meanwhile, whose output is there now.
        """
        self.finished = Folder(self.path, run, refuse=refuse)
        click.get_current_context().with_resource(self.finished)
        self._check()
        if len(self.finished):
            line(f"going on from {self.path}")
        elif self.finished.replaced:
            names = ", ".join(self.finished.replaced)
            line(f"{self.path} kept another run, of other {names}; this one begins anew")
        return self.finished

    def publish(self, model: Model, recipe: jq.Recipe | None) -> None:
        """Write the result, and remove the folder, which is not needed any more."""
        overwrite = self.overwrite or self._is_result()
        save_model(self.out, model, recipe, overwrite, {RUN: self.finished.digest})
        interrupts.about(lambda: f"the output is in {self.out}")
        self.finished.remove()

    def _check(self) -> None:
        checkpoint.check_target(self.out, self.overwrite or self._is_result())

    def _is_result(self) -> bool:
        """Whether the folder's run has written there, and was killed before it could tidy up."""
        run = digest(self.path)
        if not run or not checkpoint.is_checkpoint(self.out):
            return False
        try:
            return checkpoint.stored_metadata(self.out).get(RUN) == run
        except ValueError:
            return False

    def _about(self) -> str:
        kept = self.path.is_dir() and any(self.path.glob("*.bin"))
        more = f"; the same command goes on from {self.path}" if kept else ""
        return f"no output was written{more}"


def folder_of(out: str | Path) -> Path:
    """Where a command that writes to `out` keeps its work, until it is done."""
    out = Path(out).resolve()  # one folder, whatever links lead there
    return out.with_name(f"{out.name}.partial")


def _sweep(folder: Path) -> None:
    """Remove the empty folder of a run that was killed just when it was over."""
    if folder.is_dir():
        with contextlib.suppress(ValueError, OSError):
            claim(folder).close()
