"""Runs of the command that end in the midst of their work: in this process, by an exception."""

import os

import jax
import numpy as np
import pytest

from jaxquant.storage import checkpoint
from jaxquant_models.cli.commands import main


class KilledError(BaseException):
    """What no handler of errors takes for one."""


def stopped_at(count, *args):
    """Run the command until it has written so many files, the last of which is not in its place.

    It leaves what `kill -9` would, but for locks, which a dead process does not hold either.
    """
    before, writes = os.replace, 0

    def replace(a, b):
        nonlocal writes
        writes += 1
        if writes == count:
            raise KilledError
        before(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KilledError):
            main([str(a) for a in args])


def same_bits(folder):
    """Of the checkpoints "whole" and "cut" in a folder, all arrays."""
    whole, cut = (jax.tree.leaves(checkpoint.load(folder / n)) for n in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
