"""Readers of outside files on mutated inputs: `python -m tests.fuzz`, or `make fuzz`.

An input is a number: from it and the seed follow which reader, which file and which mutations. A
reader may succeed or raise ValueError of one line; anything else is a finding, and so is a changed
array where a checksum could have told.
"""
