# ruff: noqa: E501 (lines as libtpu writes them)
"""HLO text as libtpu 0.0.24 prints it, cut down from dumps of small train steps on v5e-4."""

from __future__ import annotations

# A step on a mesh of fsdp=2 x tensor=2. Its loop counts in two 32-bit words, runs three times, gathers one weight
# before it is used and the other one beside the first product.
STEP = r"""HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }, buffer_donor={ (1, {}) }, entry_computation_layout={(bf16[3,640,256]{2,1,0:T(8,128)(2,1)}, bf16[12,512]{1,0:T(8,128)(2,1)}, f32[24,40]{1,0:T(8,128)})->(bf16[3,640,256]{2,1,0:T(8,128)(2,1)}, f32[24,40]{1,0:T(8,128)})}, allow_spmd_sharding_propagation_to_output={true}, num_partitions=4

%fused_product (param_0.1: bf16[12,512], param_1.1: bf16[512,640]) -> bf16[12,640] {
  %param_0.1 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.1 = bf16[512,640]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[12,640]{1,0:T(8,128)(2,1)S(1)} convolution(%param_0.1, %param_1.1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/up (a) = {b}" source_file="/x/step.py" source_line=11}, backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"777777"}}
}

%fused_start (param_0.2: bf16[640,256]) -> (bf16[640,256], bf16[640,512], u32[]) {
  %param_0.2 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.27 = bf16[640,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=15, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.6 = (bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, bf16[640,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.27), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.64 (param_0.3: bf16[640,256], param_1.3: bf16[12,512], param_2.3: bf16[512,640]) -> (bf16[12,640], bf16[640,512]) {
  %param_0.3 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.3 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %param_2.3 = bf16[512,640]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %fusion.5 = bf16[12,640]{1,0:T(8,128)(2,1)S(1)} fusion(%param_1.3, %param_2.3), kind=kOutput, calls=%fused_product
  %all-gather.29 = bf16[640,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.3), channel_id=15, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %tuple.65 = (bf16[12,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%fusion.5, %all-gather.29)
}

%fused_done (param_0.4: bf16[640,256]) -> bf16[640,512] {
  %param_0.4 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.31 = bf16[640,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.4), channel_id=15, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %custom-call.8 = bf16[640,512]{1,0:T(8,128)(2,1)S(1)} custom-call(%all-gather.31), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.2 (input_0.2: bf16[640,512]) -> bf16[640,256] {
  %input_0.2 = bf16[640,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.14 = bf16[640,512]{1,0:T(8,128)(2,1)} all-reduce(%input_0.2), channel_id=20, replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add.clone
  %constant.284 = u32[] constant(0)
  %constant.shard_id_table.4 = u32[4]{0:T(128)} constant({0, 0, 1, 1})
  %partition-id.9 = u32[] partition-id()
  %dynamic-slice.57 = u32[1]{0:T(128)} dynamic-slice(%constant.shard_id_table.4, %partition-id.9), dynamic_slice_sizes={1}
  %bitcast.74 = u32[]{:T(128)} bitcast(%dynamic-slice.57)
  ROOT %dynamic-slice.58 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.14, %constant.284, %bitcast.74), dynamic_slice_sizes={640,256}
}

%add.clone (x.2: bf16[], y.1: bf16[]) -> bf16[] {
  %y.1 = bf16[]{:T(256)} parameter(1)
  %x.2 = bf16[]{:T(256)} parameter(0)
  ROOT %add.18 = bf16[]{:T(256)} add(%x.2, %y.1)
}

%wide.condition (wide.param.1: (u32[], u32[], bf16[12,512], bf16[256,640], bf16[640,256], /*index=5*/bf16[640,512])) -> pred[] {
  %constant.1061 = u32[]{:T(128)} constant(0)
  %constant.1062 = u32[]{:T(128)} constant(3)
  %constant.1060 = s32[]{:T(128)} constant(0)
  %wide.param.1 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[12,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1220 = u32[]{:T(128)} get-tuple-element(%wide.param.1), index=1
  %compare.132 = pred[]{:T(512)} compare(%get-tuple-element.1220, %constant.1061), direction=EQ
  %get-tuple-element.1221 = u32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %compare.133 = pred[]{:T(512)} compare(%get-tuple-element.1221, %constant.1062), direction=LT
  %and.33 = pred[]{:T(512)} and(%compare.132, %compare.133)
  %bitcast-convert.51 = s32[]{:T(128)} bitcast-convert(%get-tuple-element.1220)
  %compare.131 = pred[]{:T(512)} compare(%bitcast-convert.51, %constant.1060), direction=LT
  ROOT %or.24 = pred[]{:T(512)} or(%compare.131, %and.33)
}

%wide.body (wide.param.2: (u32[], u32[], bf16[12,512], bf16[256,640], bf16[640,256], /*index=5*/bf16[640,512])) -> (u32[], u32[], bf16[12,512], bf16[256,640], bf16[640,256], /*index=5*/bf16[640,512]) {
  %constant.1056 = u32[]{:T(128)} constant(1)
  %wide.param.2 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[12,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1516 = u32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %add.416 = u32[]{:T(128)S(6)} add(%get-tuple-element.1516, %constant.1056)
  %compare.139 = pred[]{:T(512)} compare(%add.416, %get-tuple-element.1516), direction=LT
  %get-tuple-element.1517 = u32[]{:T(128)} get-tuple-element(%wide.param.2), index=1
  %add.417 = u32[]{:T(128)S(6)} add(%get-tuple-element.1517, %constant.1056)
  %copy.280 = u32[]{:T(128)} copy(%add.416)
  %select.111 = u32[]{:T(128)} select(%compare.139, %add.417, %get-tuple-element.1517)
  %get-tuple-element.3 = bf16[256,640]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=3
  %all-gather.48 = bf16[512,640]{1,0:T(8,128)(2,1)S(1)} all-gather(%get-tuple-element.3), channel_id=14, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, use_global_device_ids=true, backend_config={"collective_algorithm_config":{"emitter":"1DAllGatherNonMajorDim","debug":"\ngroup_size = 2 \nhas_reordering_map: false} "}}
  %get-tuple-element.4 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=4
  %async-collective-start = (bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, bf16[640,512]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%get-tuple-element.4), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_start
  %get-tuple-element.2 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=2
  %fusion.64 = (bf16[12,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) fusion(%get-tuple-element.4, %get-tuple-element.2, %all-gather.48), kind=kOutput, calls=%async_collective_fusion.64, metadata={op_name="jit(step)/while/body/up"}, backend_config={"flag_configs":[],"window_config":{"kernel_window_bounds":["64","5"],"estimated_cycles":"3000","iteration_bounds":["1","1","1"]}}
  %async-collective-done = bf16[640,512]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.4), kind=kCustom, calls=%fused_done
  %get-tuple-element.40 = bf16[12,640]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.64), index=0
  %convolution.2 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} convolution(%get-tuple-element.40, %async-collective-done), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/down"}, backend_config={"window_config":{"estimated_cycles":"2000"}}
  %all-reduce.13 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} all-reduce(%convolution.2), channel_id=4, replica_groups=[2,2]<=[4], use_global_device_ids=true, to_apply=%add.clone, metadata={op_name="jit(step)/while/body/down"}
  %get-tuple-element.5 = bf16[640,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.2), index=5
  %fusion.62 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.5), kind=kCustom, calls=%all-reduce-scatter.2
  %add.36 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} add(%get-tuple-element.2, %all-reduce.13), backend_config={"window_config":{"estimated_cycles":"500"}}
  ROOT %tuple.59 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[12,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%copy.280, %select.111, %add.36, %get-tuple-element.3, %fusion.62, /*index=5*/%get-tuple-element.5)
}

%async_computation (param_0.127: f32[24,40]) -> f32[8,40] {
  %param_0.127 = f32[24,40]{1,0:T(8,128)} parameter(0)
  ROOT %slice.1 = f32[8,40]{1,0:T(8,128)S(1)} slice(%param_0.127), slice={[0:8], [0:40]}, backend_config={"window_config":{"estimated_cycles":"70"}}
}

ENTRY %main.9_spmd (param.4: bf16[3,640,256], param.5: bf16[12,512], param.6: f32[24,40]) -> (bf16[3,640,256], f32[24,40]) {
  %constant.487 = u32[]{:T(128)} constant(0)
  %param.4 = bf16[3,640,256]{2,1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[1,2,2]<=[2,2]T(1,0)}
  %param.5 = bf16[12,512]{1,0:T(8,128)(2,1)} parameter(1), sharding={devices=[2,1,2]<=[4] last_tile_dim_replicate}
  %param.6 = f32[24,40]{1,0:T(8,128)} parameter(2)
  %copy-start.3 = (bf16[12,512]{1,0:T(8,128)(2,1)S(1)}, bf16[12,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%param.5)
  %slice-start = ((f32[24,40]{1,0:T(8,128)}), f32[8,40]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) async-start(%param.6), calls=%async_computation
  %copy.272 = u32[]{:T(128)} copy(%constant.487)
  %copy.273 = u32[]{:T(128)} copy(%constant.487)
  %bitcast.1 = bf16[256,640]{1,0:T(8,128)(2,1)S(1)} bitcast(%param.4)
  %bitcast.2 = bf16[640,256]{1,0:T(8,128)(2,1)S(1)} bitcast(%param.4)
  %broadcast.1 = bf16[640,512]{1,0:T(8,128)(2,1)S(1)} broadcast(%constant.487), dimensions={}, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %copy-done.3 = bf16[12,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.3)
  %tuple.192 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[12,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%copy.272, %copy.273, %copy-done.3, %bitcast.1, %bitcast.2, /*index=5*/%broadcast.1)
  %while.6 = (u32[]{:T(128)}, u32[]{:T(128)}, bf16[12,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,640]{1,0:T(8,128)(2,1)S(1)}, bf16[640,256]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/bf16[640,512]{1,0:T(8,128)(2,1)S(1)}) while(%tuple.192), condition=%wide.condition, body=%wide.body, metadata={op_name="jit(step)/while"}
  %slice-done = f32[8,40]{1,0:T(8,128)S(1)} async-done(%slice-start)
  %dot.1 = f32[8,8]{1,0:T(8,128)} dot(%slice-done, %slice-done), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/gram"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %tuple.63 = (bf16[3,640,256]{2,1,0:T(8,128)(2,1)}, f32[24,40]{1,0:T(8,128)}) tuple(%param.4, %param.6)
}
"""
