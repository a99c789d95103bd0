// The CUDA kernels, to be launched on a stream. Errors of a launch are left to cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/params.h"

namespace eva_attn::cuda {

// Any head dim up to 256, any option, every dtype.
namespace simt {

void decode_step(DType, const DecodeParams&, cudaStream_t);

void chunk_summary_fwd(DType, const SummaryParams&, cudaStream_t);
void chunk_summary_bwd(DType, const SummaryParams&, cudaStream_t);

void window_attention_fwd(DType, const AttentionParams&, cudaStream_t);
// delta, then grad_global_key and grad_global_value.
void window_attention_bwd_global(DType, const AttentionParams&, cudaStream_t);
// grad_query, grad_key, grad_value (chunk terms included) and grad_relative_bias.
void window_attention_bwd(DType, const AttentionParams&, cudaStream_t);

} // namespace simt

// Tensor cores, for bfloat16 and half. What `supports` refuses is the simt kernels' to do: it returns null,
// or the reason why not, in words.
namespace mma {

const char* supports(DType, const SummaryParams&);
const char* supports(DType, const AttentionParams&);

void chunk_summary_fwd(DType, const SummaryParams&, cudaStream_t);
void chunk_summary_bwd(DType, const SummaryParams&, cudaStream_t);

void window_attention_fwd(DType, const AttentionParams&, cudaStream_t);
void window_attention_bwd_global(DType, const AttentionParams&, cudaStream_t);
void window_attention_bwd(DType, const AttentionParams&, cudaStream_t);

} // namespace mma

} // namespace eva_attn::cuda
