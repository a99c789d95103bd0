#include "kernels/cuda/mma/backward.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/launch.h"

namespace eva_attn::cuda::mma {

void chunk_summary_bwd(DType dtype, const SummaryParams& p, cudaStream_t stream) {
    dtype == DType::kHalf ? Backward<__half>::chunk_summary(p, stream)
                          : Backward<__nv_bfloat16>::chunk_summary(p, stream);
}
int64_t projection_pieces(DType dtype, const SummaryParams& p) {
    return dtype == DType::kHalf ? Backward<__half>::projection_pieces(p)
                                 : Backward<__nv_bfloat16>::projection_pieces(p);
}

void window_attention_bwd_global(DType dtype, const AttentionParams& p, cudaStream_t stream) {
    dtype == DType::kHalf ? Backward<__half>::window_attention_global(p, stream)
                          : Backward<__nv_bfloat16>::window_attention_global(p, stream);
}
int64_t global_pieces(DType dtype, const AttentionParams& p) {
    return dtype == DType::kHalf ? Backward<__half>::global_pieces(p)
                                 : Backward<__nv_bfloat16>::global_pieces(p);
}

void window_attention_bwd(DType dtype, const AttentionParams& p, cudaStream_t stream) {
    dtype == DType::kHalf ? Backward<__half>::window_attention(p, stream)
                          : Backward<__nv_bfloat16>::window_attention(p, stream);
}
int64_t bias_pieces(DType dtype, const AttentionParams& p) {
    return dtype == DType::kHalf ? Backward<__half>::bias_pieces(p) : Backward<__nv_bfloat16>::bias_pieces(p);
}
int64_t prefix_pieces(DType dtype, const AttentionParams& p) {
    return dtype == DType::kHalf ? Backward<__half>::prefix_pieces(p)
                                 : Backward<__nv_bfloat16>::prefix_pieces(p);
}

} // namespace eva_attn::cuda::mma
