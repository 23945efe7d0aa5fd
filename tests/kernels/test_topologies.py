"""Slices of TPU pods."""

import pytest

from pallas_kernels.cost.chips import CHIPS
from pallas_kernels.cost.topologies import GENERATIONS, slice_of, slices


@pytest.mark.parametrize(
    ("name", "devices", "memory"),
    [("v5e:16x16", 256, 16e9), ("v5p:8x8x8", 512, 95e9), ("v6e:4x8", 32, 32e9),
     ("tpu7x:4x4x4", 128, 96e9), ("V5E:4X4", 16, 16e9), ("v5e:8x4", 32, 16e9),
     ("v5p:4x4x12", 192, 95e9), ("v5p:24x16x16", 6144, 95e9), ("tpu7x:16x16x36", 18432, 96e9)],
)  # fmt: skip
def test_slices(name, devices, memory):
    where = slice_of(name)
    assert (where.devices, where.memory) == (devices, memory)


def test_sizes_grow_and_every_generation_is_a_chip():
    for chip in GENERATIONS:
        sizes = [where.chips for where in slices(chip)]
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and chip in CHIPS


def test_one_device_receives_nothing_and_two_share_the_links_of_a_chip():
    assert slice_of("v5e:1x1").ici_bandwidth == float("inf")
    assert slice_of("tpu7x:2x2x1").ici_bandwidth == GENERATIONS["tpu7x"].ici_bandwidth / 2


@pytest.mark.parametrize(
    ("name", "error"),
    [("v5e:3x3", "those of v5e are v5e:1x1"), ("v5e", "no slice"), ("v5p:4x4", "v5p:8x8x8"),
     ("v5p:16x16x28", "up to 6,144 chips"), ("v5p:4x4x6", "known here"),
     ("v5p:0x4x4", "known here"), ("v9:2x2", "generation and a grid"),
     ("", "generation and a grid"), ("v5e:axb", "no slice")],
)  # fmt: skip
def test_what_is_no_slice(name, error):
    with pytest.raises(ValueError, match=error):
        slice_of(name)
