#include "kernels/cuda/mma/forward.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/launch.h"

namespace eva_attn::cuda::mma {

void chunk_summary_fwd(DType dtype, const SummaryParams& p, cudaStream_t stream) {
    dtype == DType::kHalf ? Forward<__half>::chunk_summary(p, stream)
                          : Forward<__nv_bfloat16>::chunk_summary(p, stream);
}

void window_attention_fwd(DType dtype, const AttentionParams& p, cudaStream_t stream) {
    dtype == DType::kHalf ? Forward<__half>::window_attention(p, stream)
                          : Forward<__nv_bfloat16>::window_attention(p, stream);
}

} // namespace eva_attn::cuda::mma
