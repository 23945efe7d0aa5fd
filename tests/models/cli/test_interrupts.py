"""SIGINT and SIGTERM: one line and status 130, from the first line on, wherever they come."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxquant_models
from jaxquant_models.cli import interrupts
from jaxquant_models.cli.commands import main

ENTRIES = {
    "script": ["-c", "from jaxquant_models.cli.entry import main; main()"],
    "package": ["-m", "jaxquant_models"],
    "module": ["-m", "jaxquant_models.cli.commands"],
}
SAID = "error: interrupted; no output was written\n"


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends(process, *signals):
    """Seconds until a process that was signalled has said its one line and ended."""
    sent = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1 * (len(signals) > 1))
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, SAID)
    return time.monotonic() - sent


def armed(process):
    """Whether it handles SIGTERM, which Python does not by itself."""
    said = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = (line.split()[1] for line in said.splitlines() if line.startswith("SigCgt"))
    return int(mask, 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is handled")
@pytest.mark.parametrize(("entry", "number"), [("script", 2), ("package", 2), ("module", 15)])
def test_while_it_imports(entry, number):
    process = start(*ENTRIES[entry], "inspect", "none")
    while not armed(process):
        assert process.poll() is None
        time.sleep(0.001)
    ends(process, number)


def test_nothing_heavy_is_imported_before():
    code = "import sys, jaxquant_models.cli.entry; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "click", "rich", "flax"} & set(found.stdout.split())


def test_names_of_the_package():
    """`generate` is the function, whoever has imported the module of that name before."""
    code = "import jaxquant_models as m, jaxquant_models.runs.generate as g; "
    code += "from jaxquant_models import Llama; assert m.generate is g.generate; m.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        getattr(jaxquant_models, "nothing")  # noqa: B009


WORK = """
import ctypes, gc, sys, threading, time
from jaxquant_models.cli import interrupts
interrupts.GRACE = float(sys.argv[2])

class Slow:
    def __del__(self):
        time.sleep(1)

def callback(*_):
    print("at work", flush=True)
    for _ in range(100):
        time.sleep(0.01)

def work(how):
    if how == "callback":  # what is raised there is lost; JAX has such callbacks
        gc.callbacks.append(callback)
        gc.collect()
        gc.callbacks.clear()
        time.sleep(600)
    print("at work", flush=True)
    if how == "native":
        ctypes.CDLL(None).sleep(600)
    while how == "swallowed":
        try:
            time.sleep(600)
        except BaseException:
            pass
    while how == "deleted":
        Slow()
    if how == "thread":
        thread = threading.Thread(target=time.sleep, args=(600,))
        thread.start()
        thread.join()

with interrupts.working(own=True):
    try:
        work(sys.argv[1])
    except interrupts.Interrupted:
        interrupts.leave()
"""


@pytest.mark.parametrize("how", ["callback", "native", "swallowed", "deleted", "thread"])
def test_while_it_works(how):
    """Where Python does not hear of it, or what is raised is lost, it ends all the same."""
    process = start("-c", WORK, how, "0.5")
    process.stdout.readline()
    ends(process, signal.SIGINT)


def test_a_second_one_ends_it_at_once():
    process = start("-c", WORK, "swallowed", "600")
    process.stdout.readline()
    assert ends(process, signal.SIGINT, signal.SIGINT) < 60


def test_what_else_is_lost_is_told():
    code = "from jaxquant_models.cli import interrupts\n"
    code += "class A:\n  def __del__(self): raise OSError('gone')\n"
    code += "with interrupts.working(own=True): A()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "OSError: gone" in done.stderr


def test_called_from_python_it_leaves_handlers_as_they_were(monkeypatch):
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    monkeypatch.setattr(
        "jaxquant_models.cli.commands.cli.main",
        lambda *_, **__: os.kill(os.getpid(), signal.SIGINT),
    )
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "x"])
    assert stop.value.code == 130
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_the_end_of_a_file_is_no_interruption(monkeypatch, run):
    def ended(*_, **__):
        raise EOFError("expected 8 bytes")

    monkeypatch.setattr("jaxquant_models.readers.registry.outline", ended)
    status, _, err = run("inspect", "x")
    assert (status, err.strip().splitlines()[-1]) == (
        1, "error: unexpected end of a file: expected 8 bytes"
    )  # fmt: skip
