// The CUDA kernels, to be launched on a stream. Errors of a launch are left to cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/params.h"

namespace eva_attn::cuda {

// int32 [batch, C, 4]: the box (y0, y1, x0, x1) of each chunk's valid members, empty where there are none.
void chunk_extents(const Geometry&, int64_t batch, const bool* key_padding_mask, int32_t* extents,
                   cudaStream_t);

// Add up what a chunk_summary_bwd left in `grad_projections`, and a window_attention_bwd in
// `grad_relative_bias`; the dtype is that of the accumulation.
void sum_projection_gradients(DType, const ProjectionGradients&, cudaStream_t);
void sum_bias_gradient(DType, const BiasGradient&, cudaStream_t);

// Any head dim up to 256, any option, every dtype.
namespace simt {

void decode_step(DType, const DecodeParams&, cudaStream_t);

void chunk_summary_fwd(DType, const SummaryParams&, cudaStream_t);
void chunk_summary_bwd(DType, const SummaryParams&, cudaStream_t);
// What tokens get from the gradients of their chunks, alone.
void chunk_terms(DType, const TermsParams&, cudaStream_t);

void window_attention_fwd(DType, const AttentionParams&, cudaStream_t);
// delta, then grad_global_key and grad_global_value.
void window_attention_bwd_global(DType, const AttentionParams&, cudaStream_t);
// grad_query, grad_key, grad_value (chunk terms included) and grad_relative_bias.
void window_attention_bwd(DType, const AttentionParams&, cudaStream_t);

// How many summands the backward kernels write, as below.
int64_t global_pieces(DType, const AttentionParams&);
int64_t bias_pieces(DType, const AttentionParams&);
int64_t projection_pieces(DType, const SummaryParams&);

} // namespace simt

// Tensor cores, for bfloat16 and half. What `supports` refuses is the simt kernels' to do: it returns null,
// or the reason why not, in words.
namespace mma {

const char* supports(DType, const SummaryParams&);
const char* supports(DType, const AttentionParams&);
// Of the backward kernels, which ask for more.
const char* supports_bwd(DType, const SummaryParams&);
const char* supports_bwd(DType, const AttentionParams&);

void chunk_summary_fwd(DType, const SummaryParams&, cudaStream_t);
void chunk_summary_bwd(DType, const SummaryParams&, cudaStream_t);

void window_attention_fwd(DType, const AttentionParams&, cudaStream_t);
void window_attention_bwd_global(DType, const AttentionParams&, cudaStream_t);
void window_attention_bwd(DType, const AttentionParams&, cudaStream_t);

// How many summands the backward kernels write, by the shape alone: `pieces`, `bias_pieces` and
// `prefix_pieces` of AttentionParams, `projection_pieces` of SummaryParams.
int64_t global_pieces(DType, const AttentionParams&);
int64_t bias_pieces(DType, const AttentionParams&);
int64_t prefix_pieces(DType, const AttentionParams&);
int64_t projection_pieces(DType, const SummaryParams&);

} // namespace mma

} // namespace eva_attn::cuda
