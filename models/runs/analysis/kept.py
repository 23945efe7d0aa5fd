"""Results of stages as JSON in the store of a command, with the seconds that each took."""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxquant.durable.store import Finished


class Kept:
    """JSON values in a store; what is there is not computed again.

    Args:
      finished: the store.
      tell: called with a line about each stage that was computed.
    """

    def __init__(self, finished: Finished, tell: Callable[[str], None]) -> None:
        self.finished, self.tell = finished, tell
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of a stage; its seconds are added to `seconds`.

        Args:
          name: name of the stage.
          compute: function that returns the result, a JSON value.
        """

        def timed() -> dict[str, Any]:
            start, cpu = time.perf_counter(), time.process_time()
            value = compute()
            took, cpu = time.perf_counter() - start, time.process_time() - cpu
            self.tell(f"{name}: {took:.1f} s, {cpu:.1f} s of CPU time")
            return {"value": value, "seconds": took}

        found = self.value(f"stage {name}", timed)
        self.seconds[name] = found["seconds"]
        return found["value"]

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that is kept under a name.

        Args:
          name: the name.
          compute: function that returns it.
        """
        key = f"analysis: {name}"
        try:
            arrays = self.finished[key]
        except KeyError:
            text = json.dumps(compute(), allow_nan=False)
            arrays = {"json": np.frombuffer(text.encode(), np.uint8)}
            self.finished[key] = arrays
        return json.loads(np.asarray(arrays["json"]).tobytes())
