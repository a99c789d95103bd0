// The forward kernels of one dtype.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/params.h"

namespace eva_attn::cuda::mma {

template <class S>
struct Forward {
    static void chunk_summary(const SummaryParams&, cudaStream_t);
    static void window_attention(const AttentionParams&, cudaStream_t);
};

} // namespace eva_attn::cuda::mma
