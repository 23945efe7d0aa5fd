"""Pieces of code that run in a process with several CPU devices."""

import json
import os
import subprocess
import sys

RUN = """
import json, sys, traceback
failures = {}
for name, code in json.load(sys.stdin).items():
    try:
        exec(code, {})
    except BaseException:
        failures[name] = traceback.format_exc()
json.dump(failures, sys.stdout)
"""


def failures_of(cases, devices):
    """The tracebacks of the cases that fail. They share a process, which takes seconds to start."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "XLA_FLAGS": flags.strip(),  # a leading space aborts JAX 0.11
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as for other tests, in tests/conftest.py
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(cases), capture_output=True, text=True,
        check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
