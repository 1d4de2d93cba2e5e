"""A compiled program in XLA's words, small enough to count by hand: two devices of dp, four of mp."""

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[5,8,16], p1: u32[], p2: bf16[16,16]) -> f32[8,16] {
  %p0 = f32[5,8,16]{2,1,0:T(8,128)} parameter(0)
  %p1 = u32[]{:T(256)} parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8,16]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %flat = f32[8,16]{1,0:T(8,128)} bitcast(%row)
  %p2 = bf16[16,16]{1,0:T(8,128)(2,1)} parameter(2)
  ROOT %product = f32[8,16]{1,0:T(8,128)} dot(%flat, %p2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (u32[], u32[], f32[8,16], f32[5,8,16], bf16[16,16])) -> (u32[], u32[], f32[8,16], f32[5,8,16], bf16[16,16]) {
  %state = (u32[]{:T(256)}, u32[]{:T(256)}, f32[8,16]{1,0}, f32[5,8,16]{2,1,0}, /*index=4*/bf16[16,16]{1,0}) parameter(0)
  %count = u32[]{:T(256)} get-tuple-element(%state), index=0
  %high = u32[]{:T(256)} get-tuple-element(%state), index=1
  %stack = f32[5,8,16]{2,1,0} get-tuple-element(%state), index=3
  %weights = bf16[16,16]{1,0} get-tuple-element(%state), index=4
  %one = u32[] constant(1)
  %next = u32[]{:T(256)} add(%count, %one)
  %applied = f32[8,16]{1,0} fusion(%stack, %count, %weights), kind=kOutput, calls=%fused
  %whole = f32[8,16]{1,0} all-reduce(%applied), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="xla__scan/call.3/encoder.2/aot_forward.7/aten__mm"}
  ROOT %result = (u32[], u32[], f32[8,16], f32[5,8,16], bf16[16,16]) tuple(%next, %high, %whole, %stack, %weights)
}

%condition (state.1: (u32[], u32[], f32[8,16], f32[5,8,16], bf16[16,16])) -> pred[] {
  %state.1 = (u32[]{:T(256)}, u32[]{:T(256)}, f32[8,16]{1,0}, f32[5,8,16]{2,1,0}, /*index=4*/bf16[16,16]{1,0}) parameter(0)
  %nothing = u32[]{:T(256)} constant(0)
  %bound = u32[]{:T(256)} constant(5)
  %upper = u32[]{:T(256)} get-tuple-element(%state.1), index=1
  %same = pred[] compare(%upper, %nothing), direction=EQ
  %lower = u32[]{:T(256)} get-tuple-element(%state.1), index=0
  %less = pred[] compare(%lower, %bound), direction=LT
  ROOT %both = pred[] and(%same, %less)
}

ENTRY %main (input: f32[8,16], stack: f32[5,8,16], weights: bf16[16,16]) -> f32[8,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %rows = f32[5,8,16]{2,1,0:T(8,128)} parameter(1)
  %table = bf16[16,16]{1,0:T(8,128)(2,1)} parameter(2)
  %start = u32[]{:T(256)} constant(0)
  %begin = (u32[], u32[], f32[8,16], f32[5,8,16], bf16[16,16]) tuple(%start, %start, %input, %rows, %table)
  %loop = (u32[], u32[], f32[8,16], f32[5,8,16], bf16[16,16]) while(%begin), condition=%condition, body=%body, metadata={op_name="xla__scan/while.9"}
  %done = f32[8,16]{1,0} get-tuple-element(%loop), index=2
  %square = f32[8,8]{1,0} dot(%done, %done), lhs_contracting_dims={1}, rhs_contracting_dims={1}, operand_precision={highest,highest}
  %gathered = f32[16,16]{1,0} all-gather(%done), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, metadata={op_name="aten__view.12"}
  %given = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[], u32[]) collective-permute-start(%done), channel_id=3, source_target_pairs={{0,4},{4,0}}
  %taken = f32[8,16]{1,0} collective-permute-done(%given)
  ROOT %end = f32[8,16]{1,0} add(%taken, %done)
}
"""  # noqa: E501  # as XLA breaks lines

NEWER = """\
HloModule jit_step, is_scheduled=true

%picked (t: f32[64,4], n: s32[4]) -> f32[4,4] {
  %t = f32[64,4]{1,0:T(8,128)} parameter(0)
  %n = s32[4]{0:T(128)} parameter(1)
  %promise = s32[4]{0:T(128)} custom-call(%n), custom_call_target="AssumeGatherIndicesInBound"
  ROOT %rows = f32[4,4]{1,0:T(8,128)} gather(%t, %promise), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,4}
}, execution_thread="sparsecore"

%offloaded (t.1: f32[64,4], n.1: s32[4]) -> f32[4,4] {
  %t.1 = f32[64,4]{1,0:T(8,128)} parameter(0)
  %n.1 = s32[4]{0:T(128)} parameter(1)
  ROOT %rows.1 = f32[4,4]{1,0:T(8,128)} fusion(%t.1, %n.1), kind=kCustom, calls=%picked
}, execution_thread="sparsecore"

%reserved (t.2: f32[64,4], n.2: s32[4]) -> f32[4,4] {
  %t.2 = f32[64,4]{1,0:T(8,128)} parameter(0)
  %n.2 = s32[4]{0:T(128)} parameter(1)
  %inner = ((f32[64,4]{1,0:T(8,128)}, s32[4]{0:T(128)}), f32[4,4]{1,0:T(8,128)}, u32[]{:S(8)}) call-start(%t.2, %n.2), async_execution_thread="sparsecore", to_apply=%offloaded
  ROOT %inner.1 = f32[4,4]{1,0:T(8,128)} call-done(%inner)
}, execution_thread="sparsecore"

ENTRY %main (table: f32[64,4], numbers: s32[4], input: f32[16,16], weights: bf16[2,2,4,4], values: bf16[2,2,4,8]) -> f32[16,16] {
  %table = f32[64,4]{1,0:T(8,128)} parameter(0)
  %numbers = s32[4]{0:T(128)} parameter(1)
  %input = f32[16,16]{1,0:T(8,128)} parameter(2)
  %weights = bf16[2,2,4,4]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %values = bf16[2,2,4,8]{3,2,1,0:T(8,128)(2,1)} parameter(4)
  %zero = s32[] constant(0)
  %start = ((), (), (s32[16384]{0:T(1024)}, s32[1]{0:S(2)})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="Reserve", called_computations={%reserved}
  %fed = ((f32[64,4]{1,0:T(8,128)}, s32[4]{0:T(128)}), f32[4,4]{1,0:T(8,128)}, s32[16384]{0:T(1024)}) custom-call-update(%start)
  %fetched = (f32[16,16]{1,0:T(8,128)S(1)}, f32[16,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%input)
  %here = f32[16,16]{1,0:T(8,128)S(1)} copy-done(%fetched)
  %upper = ((f32[16,16]{1,0:T(8,128)}), f32[8,16]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%input), slice={[0:8], [0:16]}
  %lower = ((f32[16,16]{1,0:T(8,128)}), f32[8,16]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%input), slice={[8:16], [0:16]}
  %upper.1 = f32[8,16]{1,0:T(8,128)S(1)} slice-done(%upper)
  %lower.1 = f32[8,16]{1,0:T(8,128)S(1)} slice-done(%lower)
  %joined = f32[16,16]{1,0:T(8,128)S(1)} custom-call(%upper.1, %lower.1), custom_call_target="ConcatBitcast"
  %sum = f32[16,16]{1,0:T(8,128)S(1)} add(%here, %joined)
  %half = f32[8,16]{1,0:T(8,128)S(1)} slice(%sum), slice={[0:8], [0:16]}
  %same = f32[16,16]{1,0:T(8,128)} custom-call(%input), custom_call_target="ConcatBitcast"
  %inside = f32[16,16]{1,0:T(8,128)S(1)} dynamic-update-slice(%sum, %half, %zero, %zero)
  %place = f32[16,16]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %promise.1 = s32[4]{0:T(128)} custom-call(%numbers), custom_call_target="AssumeGatherIndicesInBound"
  %attention = bf16[2,2,4,8]{3,2,1,0:T(8,128)(2,1)} custom-call(%weights, %values), custom_call_target="tpu_custom_call", metadata={op_name="online-softmax"}
  %done = f32[4,4]{1,0:T(8,128)} custom-call-done(%fed)
  ROOT %back = f32[16,16]{1,0:T(8,128)} dynamic-update-slice(%place, %half, %zero, %zero)
}
"""  # noqa: E501  # as XLA breaks lines, of a chip with memory for vectors and SparseCores

FUSED = """\
HloModule jit_step, is_scheduled=true

%begun (b0: bf16[2,8]) -> (bf16[2,8], bf16[8,8], u32[]) {
  %b0 = bf16[2,8]{1,0} parameter(0)
  %gather.1 = bf16[8,8]{1,0} all-gather(%b0), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%gone_on (g0: bf16[2,8], g1: bf16[8,8], g2: f32[4,4]) -> (f32[4,4], bf16[2,8], bf16[8,8]) {
  %g0 = bf16[2,8]{1,0} parameter(0)
  %g1 = bf16[8,8]{1,0} parameter(1)
  %g2 = f32[4,4]{1,0} parameter(2)
  %gather.2 = bf16[8,8]{1,0} all-gather(%g0), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %twice = f32[4,4]{1,0} add(%g2, %g2)
  ROOT %all = (f32[4,4]{1,0}, bf16[2,8]{1,0}, bf16[8,8]{1,0}) tuple(%twice, %g0, %gather.2)
}

%ended (e0: bf16[2,8], e1: bf16[8,8]) -> bf16[8,8] {
  %e0 = bf16[2,8]{1,0} parameter(0)
  %e1 = bf16[8,8]{1,0} parameter(1)
  %gather.3 = bf16[8,8]{1,0} all-gather(%e0), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %end.1 = bf16[8,8]{1,0} custom-call(%e0, %e1, %gather.3), custom_call_target="AsyncCollectiveDone"
}

%stays (s0: f32[8,16], s1: f32[4,16]) -> (f32[128], f32[128], f32[8,16]) {
  %s0 = f32[8,16]{1,0} parameter(0)
  %s1 = f32[4,16]{1,0} parameter(1)
  %nil = s32[] constant(0)
  %part = f32[2,16]{1,0} slice(%s0), slice={[0:2], [0:16]}
  %sum.1 = f32[8,16]{1,0} broadcast(%part), dimensions={0,1}
  %flat = f32[128]{0} bitcast(%sum.1)
  %put = f32[8,16]{1,0} dynamic-update-slice(%s0, %s1, %nil, %nil)
  %put.1 = f32[8,16]{1,0} dynamic-update-slice(%s0, %s1, %nil, %nil)
  %put.2 = f32[128]{0} bitcast(%put)
  ROOT %both = (f32[128]{0}, f32[128]{0}, f32[8,16]{1,0}) tuple(%flat, %put.2, %put.1)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%first (f0: f32[8,16]) -> f32[8,16] {
  ROOT %f0 = f32[8,16]{1,0} parameter(0)
}

%second (f1: f32[8,16]) -> f32[8,16] {
  %f1 = f32[8,16]{1,0} parameter(0)
  ROOT %minus = f32[8,16]{1,0} negate(%f1)
}

%turn (t: (bf16[2,8], bf16[8,8], f32[4,4], u32[])) -> (bf16[2,8], bf16[8,8], f32[4,4], u32[]) {
  %t = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, f32[4,4]{1,0}, u32[]) parameter(0)
  %t0 = bf16[2,8]{1,0} get-tuple-element(%t), index=0
  %t1 = bf16[8,8]{1,0} get-tuple-element(%t), index=1
  %t2 = f32[4,4]{1,0} get-tuple-element(%t), index=2
  %t3 = u32[] get-tuple-element(%t), index=3
  %going = (f32[4,4]{1,0}, bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%t0, %t1, %t2), kind=kCustom, calls=%gone_on
  %u2 = f32[4,4]{1,0} get-tuple-element(%going), index=0
  %u0 = bf16[2,8]{1,0} get-tuple-element(%going), index=1
  %u1 = bf16[8,8]{1,0} get-tuple-element(%going), index=2
  ROOT %next = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, f32[4,4]{1,0}, u32[]) tuple(%u0, %u1, %u2, %t3)
}

%again (c: (bf16[2,8], bf16[8,8], f32[4,4], u32[])) -> pred[] {
  %c = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, f32[4,4]{1,0}, u32[]) parameter(0)
  ROOT %on = pred[]{:S(6)} constant(true)
}

ENTRY %main (rows: bf16[2,8], square: f32[4,4], block: f32[8,16], new: f32[4,16], choice: pred[]) -> f32[8,16] {
  %rows = bf16[2,8]{1,0} parameter(0)
  %square = f32[4,4]{1,0} parameter(1)
  %block = f32[8,16]{1,0} parameter(2)
  %new = f32[4,16]{1,0} parameter(3)
  %choice = pred[]{:S(6)} parameter(4)
  %begin = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%rows), kind=kCustom, calls=%begun
  %r0 = bf16[2,8]{1,0} get-tuple-element(%begin), index=0
  %r1 = bf16[8,8]{1,0} get-tuple-element(%begin), index=1
  %none = u32[] constant(0)
  %state = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, f32[4,4]{1,0}, u32[]) tuple(%r0, %r1, %square, %none)
  %loop = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, f32[4,4]{1,0}, u32[]) while(%state), condition=%again, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
  %l0 = bf16[2,8]{1,0} get-tuple-element(%loop), index=0
  %l1 = bf16[8,8]{1,0} get-tuple-element(%loop), index=1
  %gathered = bf16[8,8]{1,0} fusion(%l0, %l1), kind=kCustom, calls=%ended
  %kept = (f32[128]{0:S(1)}, f32[128]{0}, f32[8,16]{1,0:S(1)}) fusion(%block, %new), kind=kLoop, calls=%stays
  %summing = f32[8,16]{1,0} all-reduce-start(%block), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %summed = f32[8,16]{1,0} all-reduce-done(%summing)
  ROOT %either = f32[8,16]{1,0} conditional(%choice, %summed, %summed), branch_computations={%first, %second}
}
"""  # noqa: E501  # a collective that goes on through a loop; results that stay in a core, behind a bitcast and in place
