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
