"""A directory that appears whole: made aside, then put in its place in one step.

What it takes the place of is gone only once it is there. What a killed process leaves aside is
known by its lock (`claims`), is no live process's, and goes, or comes back, at the next start.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxquant.durable.claims import Claim, Taken, claim

NEW, OLD = "new", "old"
# What rename says of a place that is taken by a directory with files in it, or by a file.
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# What an exchange says where the system or the file system has none.
UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV)


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path beside the target to make its successor at, for `publish`; gone afterwards.

    What killed processes have left beside the target is removed before.
    """
    restore(target)
    for left in _leftovers(target):
        left.clear()
    held = _place(target)
    try:
        yield held.path / NEW
    finally:
        old = held.path / OLD
        if old.exists() and not os.path.lexists(target):  # the only one there is
            shutil.rmtree(held.path / NEW, ignore_errors=True)
            held.close()
        else:
            held.clear()


def publish(new: Path, target: Path, *, replace: bool) -> None:
    """Put a directory in its place: at every moment the target is as it was, or the new one.

    Args:
      new: as `aside` gave it.
      replace: whether the target may be a directory with files in it.
    Raises:
      FileExistsError: it is one, and `replace` is off, or it is a file.
    """
    try:
        os.replace(new, target)
        return
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        if not replace or not target.is_dir():
            raise FileExistsError(errno.EEXIST, "it exists", str(target)) from None
    if _exchanged(new, target):
        return
    old = new.with_name(OLD)  # a kill between the two leaves no target, until `restore`
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise


def restore(target: Path) -> None:
    """Put back what a killed `publish` had taken away from the target."""
    if os.path.lexists(target):
        return
    for left in _leftovers(target):
        with left:
            old = left.path / OLD
            if old.is_dir() and not os.path.lexists(target):
                os.replace(old, target)


def _place(target: Path) -> Claim:
    while True:
        path = target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")
        # Another process may take a directory without a lock yet for a killed one's.
        with contextlib.suppress(Taken):
            return claim(path, share=False)


def _leftovers(target: Path) -> Iterator[Claim]:
    """What is beside the target that `_place` made and no live process holds."""
    pattern = re.compile(re.escape(f".{target.name}.saving-") + "[0-9a-f]{8}")
    try:
        found = [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)]
    except OSError:  # no such place, or not ours to read
        return
    for path in found:
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(ValueError, OSError):
                yield claim(path, share=False)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether the two have changed places, in one step; False where that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        arguments = (*names, 2)  # RENAME_SWAP
    else:
        swap = getattr(libc, "renameat2", None)
        arguments = (-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    if swap is None:
        return False
    if swap(*arguments) == 0:
        return True
    if (code := ctypes.get_errno()) in UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(b))
