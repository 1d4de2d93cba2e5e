"""Reading a compiled program: loops, collectives and their axes, arithmetic, memory traffic."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_torch.studies.pod_plan.collectives import Collective, _group, find_collectives, layer_of
from dalle_torch.studies.pod_plan.hlo import Array, Instruction, parse
from dalle_torch.studies.pod_plan.work import _hits, count_work
from tests.unit.studies.pod_plan.program import FUSED, NEWER, TEXT

MESH = {device: divmod(device, 4) for device in range(8)}


def test_the_body_of_a_loop_runs_as_often_as_its_counter_says() -> None:
    program = parse(TEXT)
    assert program.times == {"main": 1, "condition": 1, "body": 5}
    assert program.unknown_loops == 0


def test_xlas_own_number_of_turns_counts_first() -> None:
    told = TEXT.replace(
        'metadata={op_name="xla__scan/while.9"}', 'backend_config={"known_trip_count":{"n":"7"},"flag_configs":[]}'
    )
    assert parse(told).times["body"] == 7


def test_a_loop_whose_turns_nobody_knows_counts_once_and_is_told() -> None:
    program = parse(TEXT.replace("%bound = u32[]{:T(256)} constant(5)", "%bound = u32[] get-tuple-element(%state.1)"))
    assert (program.times["body"], program.unknown_loops) == (1, 1)


def test_shapes_are_read_past_their_layouts() -> None:
    program = parse(TEXT)
    state = program.computations["body"].instructions["state"]
    assert [str(array) for array in state.results] == ["u32[]", "u32[]", "f32[8,16]", "f32[5,8,16]", "bf16[16,16]"]
    assert state.bytes == 4 + 4 + 512 + 2560 + 512


def test_a_text_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry"):
        parse("HloModule nothing")


def test_collectives_have_their_axis_their_layer_and_their_turns() -> None:
    found = find_collectives(parse(TEXT), MESH, ("dp", "mp"))
    assert found == [
        Collective("all-reduce", "mp", 4, "encoder forward aten__mm", "f32[8,16]", 512, 5),
        Collective("collective-permute", "dp", 2, "added by the compiler", "f32[8,16]", 512, 1),
        Collective("all-gather", "dp", 2, "aten__view", "f32[16,16]", 1024, 1),
    ]
    # By the ring: a sum goes around twice, all but one part of it; what is gathered once.
    assert [one.moved for one in found] == [512 * 5 * 2 * 3 / 4, 512, 1024 / 2]


def test_an_axis_is_that_of_the_mesh_whatever_the_devices_numbers() -> None:
    turned = {device: divmod(device, 4)[::-1] for device in range(8)}
    assert [one.axis for one in find_collectives(parse(TEXT), turned, ("dp", "mp"))] == ["dp", "mp", "mp"]


def test_a_permutation_has_the_axes_of_all_its_pairs() -> None:
    # The first device keeps what it has; one sends to another group of its copy, one to another copy.
    moved = TEXT.replace("source_target_pairs={{0,4},{4,0}}", "source_target_pairs={{0,0},{1,2},{2,5},{5,1}}")
    found = find_collectives(parse(moved), MESH, ("dp", "mp"))
    assert [one.axis for one in found if one.kind == "collective-permute"] == ["dp and mp"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.randoms())
def test_groups_in_short_form_are_those_of_the_transposed_array(sizes: list[int], random: object) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    members = sizes[order[-1]]
    count = math.prod(sizes)
    text = f"replica_groups=[{count // members},{members}]<=[{','.join(map(str, sizes))}]"
    text += f"T({','.join(map(str, order))})" if len(order) > 1 else ""
    expected = np.arange(count).reshape(sizes).transpose(order).reshape(-1, members)[0]
    instruction = Instruction("x", "all-reduce", (), (), text, False)
    assert _group(instruction, count) == expected.tolist()


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=(0,4,1,5,2,6,3,7) {'c'}", [0, 4, 1, 5]),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}", [0, 2]),
        ("mesh['a'=2,'c'=4] {'a','c'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("mesh['a'=8] {'a':(1)2}", [0, 4]),
        ("mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("mesh['a'=8] {'a':(4)2}", [0, 1]),
    ],
)
def test_groups_are_read_from_a_mesh(groups: str, first: list[int]) -> None:
    instruction = Instruction("r", "all-reduce", (), (), f"channel_id=1, replica_groups={groups}, to_apply=%add", False)
    assert _group(instruction, 8) == first


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("xla__scan/call.812/decoder.4/aot_backward.4256/aten__mm", "decoder backward aten__mm"),
        ("optimizer.3/aten__view;aten__add", "optimizer aten__view"),
        ("", "added by the compiler"),
    ],
)
def test_a_layer_is_named_without_torch_xlas_counting(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_work_counts_every_turn_and_the_passes_of_full_precision() -> None:
    work = count_work(parse(TEXT))
    in_loop, after = 2 * 8 * 16 * 16, 2 * 8 * 8 * 16
    assert work.flops == 5 * in_loop + after
    assert work.passes == 5 * in_loop + 6 * after
    fusion = 512 + 512 + 4 + 512  # a row of the stack, the weights, the counter; the result
    summed, counted = 512 + 512, 3 * 4
    condition = 3 * (4 + 4 + 1) - 6  # two comparisons of words; their conjunction of truth values
    permuted, square, gathered, end = 512 + 512, 512 + 512 + 256, 512 + 1024, 3 * 512
    assert work.bytes == 5 * (fusion + summed + counted) + condition + square + gathered + permuted + end


def test_a_part_read_by_a_fusion_inside_a_fusion_is_a_part() -> None:
    inner = """\
%inner (q0: f32[5,8,16], q1: u32[]) -> f32[1,8,16] {
  %q0 = f32[5,8,16]{2,1,0:T(8,128)} parameter(0)
  %q1 = u32[]{:T(256)} parameter(1)
  %none = s32[] constant(0)
  ROOT %taken.1 = f32[1,8,16]{2,1,0} dynamic-slice(%q0, %q1, %none, %none), dynamic_slice_sizes={1,8,16}
}

%fused (p0"""
    nested = TEXT.replace("%fused (p0", inner).replace(
        "dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}\n  %flat",
        "fusion(%p0, %p1), kind=kLoop, calls=%inner\n  %flat",
    )
    assert "calls=%inner" in nested
    assert count_work(parse(nested)) == count_work(parse(TEXT))


def test_what_lies_in_a_cores_own_memory_moves_nothing() -> None:
    program = parse(NEWER)
    assert [array.space for array in program.computations["main"].instructions["fetched"].results] == [1, 0, 2]
    fetched, halves, kept = 1024, 2 * 512, 512  # read alone; both halves; the sum is written back, half of it
    rows = 16 + 64 + 64  # numbers, rows of the table read and written, by the core that fetches
    softmax = 2 * 2 * 4 * 4 * 2 + 2 * 2 * 4 * 8 * 2 + 2 * 2 * 4 * 8 * 2  # bfloat16: weights, values, result
    assert count_work(program).bytes == fetched + halves + kept + rows + softmax


def test_products_of_the_kernel_of_attention_are_counted() -> None:
    work = count_work(parse(NEWER))
    assert work.flops == work.passes == 2 * (2 * 2 * 4 * 8) * 4


def test_what_an_asynchronous_start_names_runs() -> None:
    assert parse(NEWER).times == {"main": 1, "reserved": 1, "offloaded": 1}


def test_a_collective_that_goes_on_through_other_work_is_one() -> None:
    program = parse(FUSED)
    assert program.continuations == {"gone_on", "ended"}
    assert find_collectives(program, MESH, ("dp", "mp")) == [
        Collective("all-reduce", "mp", 4, "added by the compiler", "f32[8,16]", 512, 1),
        Collective("all-gather", "mp", 4, "added by the compiler", "bf16[8,8]", 128, 1),
    ]


def test_fusions_move_what_they_read_and_write_in_the_devices_memory() -> None:
    gather = 32 + 128  # where it begins: what it is made of, what comes out
    beside = 3 * (64 + 64)  # of the fusions that it goes on in, three turns: their own operand and result
    # A part of the block is read, what is put is read and written once: the other two results stay in the core.
    kept = 2 * 64 + 256 + 256
    summed, negated = 512 + 512, 512 + 512
    assert count_work(parse(FUSED)).bytes == gather + beside + kept + summed + negated


def test_each_branch_counts() -> None:
    assert parse(FUSED).times == {"main": 1, "again": 1, "turn": 3, "first": 1, "second": 1}


def test_what_starts_beside_other_work_moves_what_goes_in_and_comes_out() -> None:
    text = """\
ENTRY %main (a: f32[8,4], b: f32[2,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[2,4]{1,0} parameter(1)
  %i = s32[] constant(0)
  %scattering = ((f32[8,4]{1,0}), f32[2,4]{1,0}, u32[]) reduce-scatter-start(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %gathering = ((f32[2,4]{1,0}, f32[2,4]{1,0}), (f32[8,4]{1,0}, f32[8,4]{1,0}), u32[]) all-gather-start(%b, %b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %putting = ((f32[8,4]{1,0}, f32[2,4]{1,0}, s32[], s32[]), f32[8,4]{1,0}, u32[]) dynamic-update-slice-start(%a, %b, %i, %i)
  ROOT %put = f32[8,4]{1,0} dynamic-update-slice-done(%putting)
}
"""  # noqa: E501  # as XLA breaks lines
    program = parse(text)
    found = {one.kind: (one.shape, one.bytes) for one in find_collectives(program, MESH, ("dp", "mp"))}
    assert found == {"reduce-scatter": ("f32[8,4]", 128), "all-gather": ("f32[8,4], f32[8,4]", 256)}
    assert count_work(program).bytes == (128 + 32) + (2 * 32 + 2 * 128) + (32 + 32)


def test_a_batched_product_written_as_a_window_counts_what_is_there() -> None:
    # XLA's form of N products for a TPU: the window as large as the batch, and all but one entry of it filling.
    for batch in (1, 4, 16):
        settings = {"stride": str(max(batch - 1, 1)), "lhs_dilate": str(batch), "pad": "0_0"}
        assert _hits(batch, batch, batch, settings) == batch


def test_a_plain_window_counts_all_of_it_but_its_rim() -> None:
    assert _hits(5, 3, 3, {}) == 9
    assert _hits(5, 5, 3, {"pad": "1_1"}) == 13


def test_types_without_memory_have_no_bytes() -> None:
    assert Array("token", ()).bytes == 0
    assert Array("bf16", (3, 5)).bytes == 30
    assert Array("f8e4m3b11fnuz", (3, 5)).bytes == 15
