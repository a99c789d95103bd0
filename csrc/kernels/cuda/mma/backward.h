// The backward kernels of one dtype.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/params.h"

namespace eva_attn::cuda::mma {

template <class S>
struct Backward {
    static void chunk_summary(const SummaryParams&, cudaStream_t);
    static void window_attention_global(const AttentionParams&, cudaStream_t);
    static void window_attention(const AttentionParams&, cudaStream_t);

    static int64_t global_pieces(const AttentionParams&);
    static int64_t bias_pieces(const AttentionParams&);
    static int64_t prefix_pieces(const AttentionParams&);
    static int64_t projection_pieces(const SummaryParams&);

    static int64_t shared_bytes(const AttentionParams&); // of a block that takes whole windows
};

} // namespace eva_attn::cuda::mma
