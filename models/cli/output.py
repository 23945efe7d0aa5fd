"""The output of a command: locked against other runs during the work, published at the end."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from pydantic import JsonValue

import jaxquant as jq
from jaxquant import storage
from jaxquant.durable.claims import claim
from jaxquant.durable.store import Folder, digest, is_started
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.console import line
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.readers.model import Model

RUN = "run"  # metadata key of a checkpoint for the digest of the run that made it


class Output:
    """The directory `--out` of a command, and the folder beside it that holds unfinished work.

    Attributes:
      out: the directory.
      path: the folder.
      finished: the contents of the folder, once `begin` has opened it.

    Args:
      out: the directory.
      overwrite: whether an existing checkpoint may be replaced.
      lossless: as in `readers.checkpoint.save_model`.
    Raises:
      ValueError: a checkpoint may not be written there.
    """

    def __init__(self, out: str | Path, overwrite: bool, *, lossless: bool = False) -> None:
        self.out = out
        self.overwrite = overwrite
        self.lossless = lossless
        self.path = folder_of(out)
        try:
            self._check()
        except ValueError:
            _sweep(self.path)
            raise

    def hold(self) -> None:
        """Lock the output against other runs until the command ends.

        Raises:
          ValueError: another run writes there.
        """
        click.get_current_context().with_resource(claim(self.path))
        interrupts.about(self._about)

    def begin(self, run: Mapping[str, JsonValue], *, refuse: bool = False) -> Folder:
        """Open the folder for the duration of the command.

        Args:
          run: the identity of the run.
          refuse: as in `Folder`.
        Raises:
          ValueError: as in `Folder`; or another run has finished in the meantime and published its
            output.
        """
        self.finished = Folder(self.path, run, refuse=refuse)
        click.get_current_context().with_resource(self.finished)
        self._check()
        if self.finished.started:
            line(f"continuing from {self.path}")
        elif self.finished.replaced:
            names = ", ".join(self.finished.replaced)
            line(
                f"{self.path} holds another run, which differs in {names}; starting from "
                "the beginning"
            )
        return self.finished

    def publish(self, model: Model, recipe: jq.Recipe | None, layers: Sequence[Path] = ()) -> None:
        """Write the result, and remove the folder, which is no longer needed.

        Args:
          model: the result.
          recipe: the recipe that made it, or None.
          layers: as in `readers.checkpoint.save_model`.
        """
        overwrite = self.overwrite or self._is_result()
        metadata = {RUN: self.finished.digest}
        save_model(self.out, model, recipe, overwrite, metadata, layers, lossless=self.lossless)
        interrupts.about(lambda: f"the output is in {self.out}")
        self.finished.remove()

    def _check(self) -> None:
        storage.check_target(self.out, self.overwrite or self._is_result())

    def _is_result(self) -> bool:
        """Return whether the folder's run was killed between publishing and cleaning up."""
        run = digest(self.path)
        if not run or not storage.is_checkpoint(self.out):
            return False
        try:
            return storage.stored_metadata(self.out).get(RUN) == run
        except ValueError:
            return False

    def _about(self) -> str:
        kept = self.path.is_dir() and is_started(self.path)
        more = f"; run the same command again to continue from {self.path}" if kept else ""
        return f"no output was written{more}"


def folder_of(out: str | Path) -> Path:
    """Return the folder that holds the unfinished work of a command that writes to `out`.

    Args:
      out: the directory.
    """
    out = Path(out).resolve()  # the same folder for every link to it
    return out.with_name(f"{out.name}.partial")


def _sweep(folder: Path) -> None:
    """Remove the empty folder of a run that was killed right after it finished."""
    if folder.is_dir():
        with contextlib.suppress(ValueError, OSError):
            claim(folder).close()
