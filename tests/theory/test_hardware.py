"""Machines: one source of truth for chips, exact bandwidths, and a measured one."""

import dataclasses

import pytest

from jaxquant.theory import this_machine as measured
from jaxquant.theory.hardware import HARDWARE, hardware
from jaxquant.theory.this_machine import this_machine
from pallas_kernels.cost.chips import CHIPS


def test_accelerators_are_those_of_the_kernels_table():
    for name, chip in CHIPS.items():
        row = HARDWARE[name]
        assert (row.memory, row.bandwidth, row.flops, row.ops, row.unit) == (
            chip.memory, chip.bandwidth, chip.flops, chip.ops, chip.unit
        )  # fmt: skip


def test_every_row_has_a_source_and_sound_figures():
    for name, row in HARDWARE.items():
        assert row.name == name == name.lower() and row.source and row.date.startswith("20")
        assert min(row.memory, row.bandwidth, row.flops) > 0 and row.ops >= row.flops
        assert row.watts is None or 1e-12 < row.energy_per_bit < 1e-10
    families = [f"m{n}{kind}" for n in "1234" for kind in ("", " pro", " max", " ultra")]
    assert {n for n in HARDWARE if n[0] == "m"} == {*families} - {"m4 ultra"}  # which is not made


def test_bandwidth_is_the_bus_times_its_rate():
    """None below what the makers print, so that a bound remains one."""
    printed = {"m1": 68, "m1 max": 400, "m2": 100, "m3 pro": 150, "m4": 120, "m4 pro": 273,
               "m4 max": 546, "m2 ultra": 800, "laptop ddr5-5600": 89.6, "v4": 1228}  # fmt: skip
    for name, rate in printed.items():
        assert rate <= HARDWARE[name].bandwidth / 1e9 < 1.03 * rate, name
    assert HARDWARE["v5p"].bandwidth == 2765e9  # JAX's table has 2460e9


def test_peaks_of_integers():
    assert HARDWARE["tpu7x"].peak(True) == HARDWARE["tpu7x"].flops < HARDWARE["tpu7x"].ops
    assert HARDWARE["a100"].peak(True) == 2 * HARDWARE["a100"].peak(False)


def test_names():
    assert hardware("H100") is HARDWARE["h100"] and hardware("M1 Max").name == "m1 max"
    with pytest.raises(ValueError, match=r"one of v4, v5e.*laptop lpddr5x-8533, got 'm9'"):
        hardware("m9")


def test_titles_are_those_that_users_know():
    titles = {name: HARDWARE[name].title for name in ("m1 max", "h100", "v5e", "laptop ddr5-5600")}
    assert list(titles.values()) == [
        "Apple M1 Max", "NVIDIA H100", "TPU v5e", "Laptop CPU, DDR5-5600"
    ]  # fmt: skip
    assert len({row.title for row in HARDWARE.values()}) == len(HARDWARE)
    assert not any("e9" in row.source or "e12" in row.source for row in HARDWARE.values())


def test_bad_figures():
    for field in ("memory", "bandwidth", "flops", "ops", "watts"):
        for wrong in (0, -1.0, float("nan"), float("inf"), "1", True):
            with pytest.raises(ValueError, match=f"{field} must be positive and finite"):
                dataclasses.replace(HARDWARE["h100"], **{field: wrong})
    with pytest.raises(ValueError, match="unit must be one of .*'int8'.*, got 'INT8'"):
        dataclasses.replace(HARDWARE["h100"], unit="INT8")  # which would halve its 8-bit peak


def test_this_machine_is_measured(monkeypatch):
    """By a clock that says that every run takes a second, each figure is the work of one run.

    A small array is read again within a run, so that starting threads does not slow it down.
    """
    ticks = iter(range(10**6))
    monkeypatch.setattr(measured, "_ROWS", 8)
    monkeypatch.setattr(measured, "_WIDTH", 128)
    monkeypatch.setattr(measured.time, "perf_counter", lambda: float(next(ticks)))
    row = this_machine(1 << 22, runs=1, memory=3.0)
    assert row.bandwidth == 1 << 26 and row.memory == 3.0 and row.name == "this machine"
    assert row.flops == row.ops == 2 * 8 * 128 * 128
    assert dataclasses.replace(row, memory=4.0) != row and "4194304 bytes" in row.source


def test_bad_arguments(monkeypatch):
    for wrong in ({"size": 10}, {"runs": 0}, {"memory": 0.0}, {"size": "1"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            this_machine(**wrong)

    def unknown(_):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(measured.os, "sysconf", unknown, raising=False)
    with pytest.raises(ValueError, match="pass memory=BYTES"):
        this_machine()
