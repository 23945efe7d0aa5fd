"""Programs of two and four processes, on loopback, beside the same program in one process."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import jax
import pytest

import jaxquant as jq
from tests.distributed import program

# Hosts are forked from a process that has imported everything and started no backend: importing JAX
# fifteen times would take half of the time of these tests.
HOSTS = multiprocessing.get_context("forkserver")
HOSTS.set_forkserver_preload([program.__name__])


def start(count, folder, *commands, only=None, last=(), wait=20):
    """Start the hosts, or one of them; `last` are the commands of the last one, if they differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of = lambda i: last if last and i == count - 1 else commands
    logs = Path(folder).parent / f"{Path(folder).name} {port}"
    logs.mkdir()
    hosts = []
    for i in range(count) if only is None else [only]:
        files = [str(logs / f"{kind} {i}") for kind in ("out", "err")]
        given = (*files, port, count, i, str(folder), of(i), wait)
        hosts.append((HOSTS.Process(target=program.logged, args=given), *files))
        hosts[-1][0].start()
    return hosts


def ended(hosts, seconds=300):
    """Exit status, output and errors of each host."""
    for process, *_ in hosts:
        process.join(seconds)
    return [(process.exitcode, *(Path(f).read_text() for f in files)) for process, *files in hosts]


def found(hosts):
    """What host 0 found, where all hosts succeeded."""
    results = ended(hosts)
    assert [status for status, _, _ in results] == [0] * len(results), results[0][2][-2000:]
    return json.loads(results[0][1].splitlines()[-1])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return found(start(1, tmp_path_factory.mktemp("one"), "quantize", "score", "stack"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def killed(folder):
    """Host 1 of 2 is killed when five weights are rounded."""
    return ended(start(2, folder, "quantize", "die"), 120), sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def two(folder, killed):
    """The same command again."""
    hosts = start(2, folder, "quantize", "score", "stack")
    results = ended(hosts)
    assert [status for status, _, _ in results] == [0, 0], results[0][2][-2000:]
    return json.loads(results[0][1].splitlines()[-1]), results[0][2]


def same(a, b):
    assert a["ids"] == b["ids"]
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)
    assert a["weights"] == pytest.approx(b["weights"], rel=1e-5)


def test_a_killed_host_ends_the_others_and_nothing_is_half_written(killed):
    (first, second), left = killed
    assert second[0] == -9 and first[0] == 70, first
    assert "another host has ended or cannot be reached; run the same command again" in first[2]
    assert left == ["work"]


def test_the_same_command_goes_on_and_equals_one_process(two, one):
    same(two[0], one)


def test_every_host_rounds_its_own_layers(two, one):
    assert two[0]["stack"] == pytest.approx(one["stack"], rel=1e-5)


def test_what_was_rounded_before_is_not_rounded_again(two):
    assert "layers/attn/k/kernel[0] before" in two[1]
    assert "layers/mlp/up/kernel[1] now" in two[1]


def test_four_hosts_restore_what_two_have_saved(folder, two, one):
    same(found(start(4, folder, "score")), one)


@pytest.fixture(scope="module")
def lost(folder, two):
    """Three programs at once, for their hosts only wait: host 1 of each ends."""
    programs = {
        "killed": start(2, folder, "leave:1", "wait"),
        "failed": start(2, folder, "wait", last=("fail",)),
        "early": start(2, folder, "early"),
    }
    programs["early"][1][0].join(20)
    at_once = programs["early"][1][0].exitcode is not None
    return {name: ended(hosts) for name, hosts in programs.items()} | {"at once": at_once}


@pytest.mark.parametrize(
    "end, status, message",
    [
        ("killed", -9, ""),
        ("failed", 1, "Connection reset by the user's own peer"),
        ("early", 1, "bad configuration"),
    ],
)
def test_a_host_that_waits_for_a_lost_one_says_so(lost, end, status, message):
    waiting, ended_first = lost[end]
    assert waiting[0] == 70 and "another host has ended or cannot be reached" in waiting[2]
    assert ended_first[0] == status and message in ended_first[2], ended_first
    assert "another host" not in ended_first[2]  # an error of the program is no lost host


def test_an_error_before_jax_is_used_ends_its_host_at_once(lost):
    assert lost["at once"], "it waits for the other host"


@pytest.mark.parametrize(
    "index, message",
    [
        (0, "host 0 of 2: not all hosts arrived at 127.0.0.1:"),
        (1, "host 1 of 2: host 0 did not answer at 127.0.0.1:"),
    ],
)
def test_a_host_that_never_arrives(folder, index, message):
    ((status, _, errors),) = ended(start(2, folder, "score", only=index, wait=3))
    assert status in (1, 70) and message in errors, errors


@pytest.mark.parametrize("status", [0, 3])
def test_a_program_may_exit_within_the_block(folder, status):
    for found, _, errors in ended(start(2, folder, f"exit:{status}")):
        assert found == status and "another host" not in errors, errors


@pytest.mark.parametrize(
    "given, message",
    [
        (("10.0.0.1:8476", 4), "process_id together"),
        (("10.0.0.1", 4, 0), "coordinator_address must be"),
        (("10.0.0.1:99999", 4, 0), "from 1 to 65535"),
        (("10.0.0.1:8476", 0, 0), "num_processes must be"),
        (("10.0.0.1:8476", 4, 4), "process_id must be from 0 to 3"),
    ],
)
def test_arguments_that_name_no_host(given, message):
    with pytest.raises(ValueError, match=message), jq.distributed.initialize(*given):
        pass


def test_a_machine_that_is_in_no_cluster(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match="recognizes no cluster"), jq.distributed.initialize():
        pass


def test_a_process_that_has_used_jax_before():
    jax.devices()
    with (
        pytest.raises(RuntimeError, match="has used JAX already"),
        jq.distributed.initialize("127.0.0.1:8476", 2, 0),
    ):
        pass


def test_hosts_with_different_recipes(tmp_path):
    results = ended(start(2, tmp_path, "quantize:4", last=("quantize:3",)))
    for status, _, errors in results:
        assert status == 1
        assert "run differs between hosts: that of host 1 is not that of host 0" in errors
    assert os.listdir(tmp_path) == []
