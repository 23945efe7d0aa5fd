"""Training metrics, written as one line of JSON per step and as TensorBoard events."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from jaxquant_models.cli.output import Output


def check_metrics(metrics: str | None, output: Output) -> None:
    """Raise ValueError if the metrics would be written where the model is.

    Args:
      metrics: the value of `--metrics`, or None.
      output: the output of the command.
    """
    taken = (Path(output.out).resolve(), output.path)
    if metrics is not None and Path(metrics).resolve() in taken:
        raise ValueError(f"--metrics {metrics} is where the model will be written; give another")


class Metrics:
    """Writes numbers by step into a folder: metrics.jsonl and an events file."""

    def __init__(self, folder: Path | None) -> None:
        self.lines = self.events = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self.events = SummaryWriter(str(folder))

    @staticmethod
    @contextlib.contextmanager
    def to(folder: str | None) -> Iterator["Metrics"]:
        """Open the metrics for a `with` block; if folder is None, nothing is written.

        Args:
          folder: the folder, created if it does not exist; or None.
        """
        metrics = Metrics(None if folder is None else Path(folder))
        try:
            yield metrics
        finally:
            if metrics.lines is not None and metrics.events is not None:
                metrics.lines.close()
                metrics.events.close()

    def write(self, step: int, values: Mapping[str, float | None], stage: str = "") -> None:
        """Write the numbers of one step, except those that are None.

        Args:
          step: number of the step.
          values: name -> number.
          stage: name of the training stage, if there are several.
        """
        if self.lines is None or self.events is None:
            return
        known = {k: v for k, v in values.items() if v is not None and k != "step"}
        self.lines.write(
            json.dumps(({"stage": stage} if stage else {}) | {"step": step} | known) + "\n"
        )
        self.lines.flush()
        for name, value in known.items():
            if math.isfinite(value):
                self.events.add_scalar(f"{stage}/{name}" if stage else name, value, step)
