// Instantiates the forward kernels; head dims are padded to 64 or 128 in shared memory.
#pragma once

#include "kernels/cuda/mma/chunk_summary_fwd.cuh"
#include "kernels/cuda/mma/chunk_summary_fwd_tile.cuh"
#include "kernels/cuda/mma/forward.h"
#include "kernels/cuda/mma/prefix_attention_fwd.cuh"
#include "kernels/cuda/mma/window_attention_fwd.cuh"
#include "kernels/cuda/mma/window_attention_fwd_sm90.cuh"

namespace eva_attn::cuda::mma {

template <class S>
void Forward<S>::chunk_summary(const SummaryParams& p, cudaStream_t stream) {
    if (launch_chunk_summary_fwd_tile<S>(p, stream)) return;
    p.shape.head_dim <= 64 ? launch_chunk_summary_fwd<S, 64>(p, stream)
                           : launch_chunk_summary_fwd<S, 128>(p, stream);
}

template <class S>
void Forward<S>::window_attention(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const bool is_general = g.is_causal || p.dropout.threshold > 0 || p.key_padding_mask || p.landmark_bias ||
                            p.extents || g.num_prefix_tokens > 0;
    if (p.shape.head_dim <= 64) {
        launch_prefix_attention_fwd<S, 64>(p, stream);
        if (launch_window_attention_fwd_sm90<S, 64>(p, stream)) return;
        is_general ? launch_window_attention_fwd<S, 64, true>(p, stream)
                   : launch_window_attention_fwd<S, 64, false>(p, stream);
    } else {
        launch_prefix_attention_fwd<S, 128>(p, stream);
        if (launch_window_attention_fwd_sm90<S, 128>(p, stream)) return;
        is_general ? launch_window_attention_fwd<S, 128, true>(p, stream)
                   : launch_window_attention_fwd<S, 128, false>(p, stream);
    }
}

} // namespace eva_attn::cuda::mma
