"""Collectives read from HLO text: of hand-written modules, and of small compiled programs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emu_jax import hlo, sharding

LOOPS = """HloModule step, num_partitions=4

%inner_cond (p: (s32[], f32[8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gather = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, \
replica_groups={{0,1},{2,3}}, dimensions={1}, op_name="jit(step)/up"
}

%outer_cond (p: (s32[])) -> pred[] {
  ROOT %less = pred[] fusion(%p), kind=kLoop, calls=%compared
}

%compared (p: (s32[])) -> pred[] {
  %n = s32[] constant(99)
}

%outer_body (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%inner_cond, body=%inner_body
  %sum = (f32[10]{0}, bf16[4,5]{1,0}) all-reduce(%a, %b), channel_id=2, replica_groups={}, \
to_apply=%add
}

%all-reduce-scatter.7 (p: f32[64]) -> f32[16] {
  %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=4, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.9, %at), dynamic_slice_sizes={16}
}

%start_fusion (p: f32[4]) -> f32[16] {
  %all-gather.1 = f32[16]{0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%done_fusion (p: f32[4]) -> f32[16] {
  %all-gather.2 = f32[16]{0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.2 = (s32[]) while(%tuple), condition=%outer_cond, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %scattered = f32[16]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.7
  %started = f32[16]{0} fusion(%w), kind=kCustom, calls=%start_fusion
  %done = f32[16]{0} fusion(%started), kind=kCustom, calls=%done_fusion
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%w), channel_id=6, replica_groups=[1,4]<=[4], \
dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ag)
  %cp = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=7, \
source_target_pairs={{0,1},{1,0}}
  %rs = f32[5]{0} reduce-scatter(%y), channel_id=8, replica_groups=[2,2]<=[2,2]T(1,0), \
dimensions={0}, to_apply=%add
}
"""


def test_loops_multiply_and_every_collective_counts_once():
    found = {c.name: c for c in hlo.Module(LOOPS).collectives()}
    table = {
        name: (c.kind, c.bytes, c.runs, c.in_loop, c.asynchronous) for name, c in found.items()
    }
    assert table == {
        # The inner loop's 3 iterations run in each of the outer loop's 5.
        "gather": ("all-gather", 8 * 16 * 2, 15, True, False),
        "sum": ("all-reduce", 40 + 40, 5, True, False),
        "all-reduce.9": ("reduce-scatter", 256, 1, False, False),
        # A chain of two fusions.
        "all-gather.1": ("all-gather", 64, 1, False, True),
        "ag": ("all-gather", 64, 1, False, True),
        "cp": ("collective-permute", 24, 1, False, True),
        "rs": ("reduce-scatter", 40, 1, False, False),
    }
    assert (
        found["gather"].groups == ((0, 1), (2, 3))
        and found["sum"].groups == ((0, 1, 2, 3),)
        and found["gather"].source == "jit(step)/up"
    )
    assert found["rs"].groups == ((0, 2), (1, 3)) and found["cp"].groups == ((0, 1), (0, 1))


def test_bytes_received():
    found = {c.name: c.bytes_received for c in hlo.Module(LOOPS).collectives()}
    assert found == {
        "gather": 128,
        "sum": 2 * 0.75 * 80,
        "all-reduce.9": 0.75 * 256,
        "all-gather.1": 48,
        "ag": 48,
        "cp": 24,
        "rs": 20,
    }


@pytest.mark.parametrize(
    ("kind", "groups", "received", "crossing"),
    [
        # The half of the array that comes from the other slice is divided between two devices.
        ("all-gather", ((0, 1, 2, 3),), 75, 25),
        ("reduce-scatter", ((0, 1, 2, 3),), 75, 25),
        ("all-reduce", ((0, 1, 2, 3),), 150, 50),
        ("all-to-all", ((0, 1, 2, 3),), 75, 50),
        ("all-reduce", ((0, 2), (1, 3)), 100, 100),
        ("all-reduce", ((0, 1), (2, 3)), 100, 0),
        ("collective-permute", ((0, 1), (1, 2), (2, 3), (0, 3)), 100, 50),
    ],
)
def test_bytes_between_two_slices_of_two(kind, groups, received, crossing):
    one = hlo.Collective(kind, "c", 100, groups, 1, False, False, "")
    assert one.bytes_received == pytest.approx(received) and one.bytes_between(
        (0, 0, 1, 1)
    ) == pytest.approx(crossing)
    assert one.bytes_between((0, 0, 0, 0)) == 0


def test_a_reduction_between_slices_counts_once():
    """libtpu writes such a reduction as a send and a receive; only the receive counts.

    For 2xv5e:4x4, each moves 512 KiB to or from the host.
    """
    attributes = (
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.1_0",'
        '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:15}"'
    )
    line = (
        "  %recv = (f32[128,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all), "
        f"channel_id=1, is_host_transfer=true, frontend_attributes={{{attributes}}}\n"
    )
    module = hlo.Module(
        "HloModule m, num_partitions=4\n\nENTRY %main (a: f32[1]) -> f32[1] {\n"
        + line
        + line.replace("recv", "send")
        + "}\n"
    )
    (one,) = module.collectives()
    assert (one.kind, one.runs) == (hlo.BETWEEN_SLICES, 1)
    assert one.bytes_received == one.bytes_between((0, 0, 1, 1))
    assert one.bytes_received == pytest.approx(2**19, abs=8)


def test_an_unknown_trip_count_is_read_from_the_condition():
    module = hlo.Module(LOOPS.replace(', backend_config={"known_trip_count":{"n":"5"}}', ""))
    assert module.runs["inner_body"] == 3 * 99


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups={}", []),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'data'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        (
            "replica_groups=mesh['a'=3,'b'=1,'c'=2], device_ids=([2,3]T(1,0)) {'a'}",
            [[0, 1, 2], [3, 4, 5]],
        ),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [0, 1]]),
    ],
)
def test_groups(notation, groups):
    assert (
        hlo.groups(
            f"%x = f32[2]{{0}} all-reduce(%y), channel_id=1, {notation}, use_global_device_ids=true"
        )
        == groups
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[128]{0:T(1024)(128)(2,1)S(1)}", 256),
        ("pred[7]{0}", 7),
        ("s32[]", 4),
        ("f8e4m3fn[10]{0}", 10),
        ("u8[3,3]{1,0}", 9),
        ("(f32[4]{0}, /*index=5*/bf16[2]{0}, u32[]{:S(2)})", 20),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo._bytes(shape) == size


def test_a_compiled_scan():
    """Seven gathers of 4 shards, seven sums over 2 devices, and one over 4 after the loop."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P(), check_vma=False)
    def run(w, x):
        def turn(x, _):
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jax.lax.psum(jnp.tanh(whole * x), "tensor"), None

        return jax.lax.psum(jax.lax.scan(turn, x, length=7)[0], "fsdp")

    w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = hlo.Module(_text(jax.jit(run).lower(w, x))).collectives()
    seen = sorted((c.kind, c.bytes, c.runs * c.in_loop or c.runs, len(c.groups[0])) for c in found)
    gathers = [row for row in seen if row[0] == "all-gather"]
    # XLA may move the gather out of the loop.
    assert gathers in ([("all-gather", 2048, 7, 4)], [("all-gather", 2048, 1, 4)])
    assert [row for row in seen if row[0] == "all-reduce"] == [
        ("all-reduce", 2048, 1, 4),
        ("all-reduce", 2048, 7, 2),
    ]


def _text(lowered):
    text = lowered.compile().as_text()
    assert text
    return text
