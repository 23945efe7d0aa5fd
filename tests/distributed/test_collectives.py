"""Collectives read off the text of compiled programs."""

import pytest

from jaxquant.distributed.collectives import Collective, collectives
from tests.support.devices import failures_of

LOOP = """
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %g = s32[8,4]{1,0:T(8,128)} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], metadata={op_name="a"}
  %h = s32[8,4]{1,0:T(8,128)} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], metadata={op_name="a"}
  %i = s32[8,4]{1,0:T(8,128)} all-gather(%v), channel_id=1, replica_groups=[2,4]<=[8], metadata={op_name="b"}
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(80)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %l = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body, metadata={op_name="loop"}
  %r = (f32[16]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=2, replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%add
}
"""  # noqa: E501


def test_the_body_of_a_loop_counts_as_often_as_it_runs_and_pieces_count_once():
    assert collectives(LOOP) == [
        Collective("all-gather", "s32", (8, 4), 4, 80),
        Collective("all-gather", "s32", (8, 4), 4, 80),
        Collective("all-reduce", "f32", (16,), 2, 1),
        Collective("all-reduce", "bf16", (2, 3), 2, 1),
    ]
    unsigned = LOOP.replace("= s32[]{:T(128)} constant", "= u32[] constant")
    assert unsigned != LOOP and collectives(unsigned) == collectives(LOOP)


def entry(*lines, head="HloModule jit_f, replica_count=1, num_partitions=8\n"):
    return head + "ENTRY %main (x: f32[]) -> f32[] {\n  " + "\n  ".join(lines) + "\n}"


GROUP = "channel_id=1, replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"%g = (s32[2,4]{{1,0}}, s32[8,4]{{1,0}}) all-gather-start(%p), {GROUP}",
         [Collective("all-gather", "s32", (8, 4), 4, 1)]),
        ("%g = ((s32[2], f16[1]{0}), (s32[8], f16[4]{0})) all-gather-start(%p, %q), " + GROUP,
         [Collective("all-gather", "s32", (8,), 4, 1),
          Collective("all-gather", "f16", (4,), 4, 1)]),
        ("%c = (bf16[3,5]{1,0}, bf16[3,5]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
         "collective-permute-start(%p), channel_id=2, source_target_pairs={{0,1},{1,0}}",
         [Collective("collective-permute", "bf16", (3, 5), 2, 1)]),
        (f"%r = (f32[16]{{0}}, bf16[2,3]{{1,0}}) all-reduce-start(%a, %b), {GROUP}, to_apply=%add",
         [Collective("all-reduce", "f32", (16,), 4, 1),
          Collective("all-reduce", "bf16", (2, 3), 4, 1)]),
        (f"%r = f32[16]{{0}} all-reduce-start(%a), {GROUP}, to_apply=%add",
         [Collective("all-reduce", "f32", (16,), 4, 1)]),
        ("%r = f32[8,4]{1,0} ragged-all-to-all(%a, %b, %c, %d, %e, %f), " + GROUP,
         [Collective("ragged-all-to-all", "f32", (8, 4), 4, 1)]),
        ("%r = ((f32[2,4], f32[8,4], s32[4], s32[4], s32[4], s32[4]), f32[8,4]{1,0:T(8,128)}, "
         f"u32[]) ragged-all-to-all-start(%a, %b, %c, %d, %e, %f), {GROUP}",
         [Collective("ragged-all-to-all", "f32", (8, 4), 4, 1)]),
        (f"%b = bf16[3,5]{{1,0}} collective-broadcast(%p), {GROUP}",
         [Collective("collective-broadcast", "bf16", (3, 5), 4, 1)]),
        ("%b = ((bf16[3,5]{1,0:T(8,128)(2,1)}), bf16[3,5]{1,0}, u32[]{:S(2)}) "
         f"collective-broadcast-start(%p), {GROUP}",
         [Collective("collective-broadcast", "bf16", (3, 5), 4, 1)]),
        (f"%s = ((f32[16]{{0}}), f32[4]{{0}}, u32[]) reduce-scatter-start(%p), {GROUP}",
         [Collective("reduce-scatter", "f32", (4,), 4, 1)]),
        ("%d = bf16[3,5]{1,0} collective-broadcast-done(%b)", []),
        ('%f = f32[4]{0} fusion(%p), calls=%c, metadata={op_name="a replica_groups={{0,1}}"}', []),
        ("f = f32[4]{0} add(p, all-reduce.1, collective-x)", []),
        ("%s = (f32[4]{0}, u32[], token[]) send(%p, %t), channel_id=3, is_host_transfer=true", []),
        (f"%g = f32[<=8,4]{{1,0}} all-gather(%p), {GROUP}",
         [Collective("all-gather", "f32", (8, 4), 4, 1)]),
        ("%r = f32[16]{0} all-reduce(%a), channel_id=1, replica_groups={}, to_apply=%add",
         [Collective("all-reduce", "f32", (16,), 8, 1)]),
    ],
)  # fmt: skip
def test_what_a_start_returns_and_who_takes_part(line, found):
    assert collectives(entry(line)) == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"%g = f32[8]{{0}} all-sort(%p), {GROUP}", "got 'all-sort' in "),
        (f"%g = f32[8]{{0}} gather-some(%p), {GROUP}", "got 'gather-some' in "),
        ("%g = f32[8]{0} collective-swap-start(%p)", "got 'collective-swap' in "),
        ("%s = (f32[4]{0}, u32[], token[]) send(%p, %t), channel_id=3", "got 'send' in "),
        (f"%g = f7e3[8]{{0}} all-gather(%p), {GROUP}", "got 'f7e3'; this version of XLA may"),
    ],
)
def test_what_is_not_known_is_not_counted_in_silence(line, said):
    with pytest.raises(ValueError, match=said):
        collectives(entry(line))


@pytest.mark.parametrize(
    ("dtype", "taken"),
    [("s4", 12), ("u4", 12), ("s2", 6), ("u2", 6), ("pred", 24), ("s8", 24), ("f4e2m1fn", 12),
     ("bf16", 48), ("f8e4m3fn", 24), ("c64", 192)],
)  # fmt: skip
def test_bytes_of_narrow_numbers(dtype, taken):
    assert Collective("all-gather", dtype, (2, 4), 4, 3).bytes == taken


def test_groups_of_a_program_that_does_not_say_how_many_devices_it_has():
    with pytest.raises(ValueError, match="unknown groups of devices"):
        collectives(entry("%r = f32[16]{0} all-reduce(%a), replica_groups={}", head=""))


BRANCH = """
%yes (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%no (p: f32[4]) -> f32[4] {
  %s = f32[4]{0} all-gather(%p), channel_id=2, replica_groups={{0,1}}
}

"""


def test_both_branches_of_a_conditional_count():
    line = "%c = f32[4] conditional(%i, %x, %x), true_computation=%yes, false_computation=%no"
    assert [one.kind for one in collectives(BRANCH + entry(line))] == ["all-reduce", "all-gather"]


@pytest.mark.parametrize(
    ("config", "condition", "times"),
    [(', backend_config={"known_trip_count":{"n":"5"}}', "constant(80)", 5),
     ("", "constant(80)", 80), (', backend_config={"known_trip_count":{"n":"5"}}', "x()", 5)],
)  # fmt: skip
def test_what_the_compiler_knows_of_a_loop_comes_first(config, condition, times):
    (one, *_) = collectives(looped(config, condition))
    assert one.count == times


def looped(config, condition):
    text = LOOP.replace("constant(80)", condition)
    return text.replace("body=%body", f"body=%body{config}")


def test_a_loop_that_may_run_any_number_of_times():
    with pytest.raises(ValueError, match="must say how often its loops run"):
        collectives(looped("", "x()"))
    alone = "\n".join(line for line in looped("", "x()").splitlines() if "all-gather" not in line)
    assert [one.count for one in collectives(alone)] == [1, 1]


@pytest.mark.parametrize(
    ("kind", "received"),
    [("all-gather", 96), ("all-reduce", 192), ("reduce-scatter", 384), ("all-to-all", 96),
     ("ragged-all-to-all", 96), ("collective-permute", 128), ("collective-broadcast", 128)],
)  # fmt: skip
def test_what_a_device_receives(kind, received):
    """Of 128 bytes of results among four devices, which all have the same share of the data."""
    assert Collective(kind, "s32", (8, 4), 4, 1).received == received


CHECK = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxquant.distributed.collectives import collectives
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
put = lambda a, *s: jax.device_put(a, NamedSharding(mesh, P(*s)))
layer = lambda h, w: (jnp.tanh(h @ w), None)
fn = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0])
text = fn.lower(put(jnp.ones((8, 64)), None, "model"), put(jnp.ones((5, 64, 64)), None, "model"))
found = collectives(text.compile().as_text())
sums = [one for one in found if one.kind == "all-reduce"]
assert sums and all(one.group_size == 4 and one.count == 5 for one in sums), found
"""


def test_a_compiled_scan():
    assert failures_of({"scan": CHECK}, devices=8) == {}
