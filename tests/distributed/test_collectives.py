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


@pytest.mark.parametrize(
    ("kind", "received"),
    [("all-gather", 96), ("all-reduce", 192), ("reduce-scatter", 384), ("all-to-all", 96),
     ("collective-permute", 128)],
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
assert sums and all(one.group == 4 and one.times == 5 for one in sums), found
"""


def test_a_compiled_scan():
    assert failures_of({"scan": CHECK}, devices=8) == {}
