"""Processes that are killed: `kill -9` before an operation on files, or at a moment.

Children are forked before JAX has started anything, so each costs a second and not ten.
"""

import os
import signal
import time

OPERATIONS = ("replace", "mkdir", "rmdir", "unlink", "fsync", "ftruncate")


def child(work, *, before=None, after=None):
    """How a forked process ends that runs `work()`: -9 if it was killed, else its exit status.

    Args:
      before: it dies instead of its operation of this number, the first is 0.
      after: seconds until it is killed.
    """
    process = os.fork()
    if process == 0:
        status = 1
        try:
            if before is not None:
                die_before(before)
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else bool(stop.code)
        finally:
            os._exit(status)
    if after is not None:
        _kill(process, after)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_before(count):
    """Have this process die instead of an operation on files."""
    seen = 0

    def dying(name):
        operation = getattr(os, name)

        def one(*args, **options):
            nonlocal seen
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return operation(*args, **options)

        return one

    for name in OPERATIONS:
        setattr(os, name, dying(name))


def _kill(process, after):
    """Unless it has ended by then."""
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(min(0.002, after))
    os.kill(process, signal.SIGKILL)
