// Instantiates the backward kernels; head dims are padded to 64 or 128 in shared memory. Those for 128, and
// for a prefix beside windows of several blocks, take dropout in any case, which costs them little.
#pragma once

#include "kernels/cuda/mma/backward.h"
#include "kernels/cuda/mma/chunk_summary_bwd.cuh"
#include "kernels/cuda/mma/chunk_summary_bwd_few.cuh"
#include "kernels/cuda/mma/window_attention_bwd.cuh"
#include "kernels/cuda/mma/window_attention_bwd_blocks.cuh"
#include "kernels/cuda/mma/window_attention_bwd_global.cuh"
#include "kernels/cuda/mma/window_attention_bwd_global_sm90.cuh"
#include "kernels/cuda/mma/window_attention_bwd_prefix.cuh"
#include "kernels/cuda/mma/window_attention_bwd_sm90.cuh"
#include "kernels/cuda/mma/window_attention_bwd_tile_sm90.cuh"

namespace eva_attn::cuda::mma {

template <class S>
void Backward<S>::chunk_summary(const SummaryParams& p, cudaStream_t stream) {
    if (launch_chunk_summary_bwd_few<S>(p, stream)) return;
    p.shape.head_dim <= 64 ? launch_chunk_summary_bwd<S, 64>(p, stream)
                           : launch_chunk_summary_bwd<S, 128>(p, stream);
}

template <class S>
int64_t Backward<S>::projection_pieces(const SummaryParams& p) {
    if (has_few_members(p.shape)) return count_few_members_blocks(p);
    return p.shape.head_dim <= 64 ? count_projection_pieces<S, 64>(p) : count_projection_pieces<S, 128>(p);
}

template <class S>
void Backward<S>::window_attention_global(const AttentionParams& p, cudaStream_t stream) {
    if (p.shape.head_dim > 64) {
        if (!launch_window_attention_bwd_global_sm90<GlobalGradSm90Traits<S, 128>>(p, stream))
            launch_window_attention_bwd_global<GlobalGradTraits<S, 128>>(p, stream);
        return;
    }
    // Fewer landmarks without masks are bound by what either kernel waits for.
    const bool is_large = p.shape.geometry.is_causal || p.num_landmarks > kTileRows;
    if (!is_large || !launch_window_attention_bwd_global_sm90<GlobalGradSm90Traits<S, 64>>(p, stream))
        launch_window_attention_bwd_global<GlobalGradTraits<S, 64>>(p, stream);
}

template <class S>
int64_t Backward<S>::global_pieces(const AttentionParams& p) {
    return p.shape.head_dim <= 64 ? count_global_pieces<GlobalGradTraits<S, 64>>(p)
                                  : count_global_pieces<GlobalGradTraits<S, 128>>(p);
}

template <class S, bool kHasPrefix>
void launch_windows(const AttentionParams& p, cudaStream_t stream) {
    const bool is_narrow = p.shape.head_dim <= 64;
    if (is_one_block(p.shape.geometry)) {
        if (is_narrow && launch_window_attention_bwd_tile_sm90<TileGradSm90Traits<S>>(p, stream)) return;
        using Wide = WindowGradTraits<S, 128, true, kHasPrefix>;
        using General = WindowGradTraits<S, 64, true, kHasPrefix>;
        using Plain = WindowGradTraits<S, 64, false, kHasPrefix>;
        !is_narrow               ? launch_window_attention_bwd<Wide>(p, stream)
        : is_general<General>(p) ? launch_window_attention_bwd<General>(p, stream)
                                 : launch_window_attention_bwd<Plain>(p, stream);
    } else if (!(is_narrow ? launch_window_attention_bwd_sm90<WindowGradSm90Traits<S, 64>>(p, stream)
                           : launch_window_attention_bwd_sm90<WindowGradSm90Traits<S, 128>>(p, stream))) {
        using Wide = BlockGradTraits<S, 128, true, kHasPrefix>;
        using Dropout = BlockGradTraits<S, 64, true, kHasPrefix>;
        using Plain = BlockGradTraits<S, 64, kHasPrefix, kHasPrefix>;
        !is_narrow                ? launch_window_attention_bwd_blocks<Wide>(p, stream)
        : p.dropout.threshold > 0 ? launch_window_attention_bwd_blocks<Dropout>(p, stream)
                                  : launch_window_attention_bwd_blocks<Plain>(p, stream);
    }
}

template <class S>
void Backward<S>::window_attention(const AttentionParams& p, cudaStream_t stream) {
    if (p.shape.geometry.num_prefix_tokens > 0) {
        launch_windows<S, true>(p, stream);
        launch_prefix_gradients<S>(p, stream);
    } else {
        launch_windows<S, false>(p, stream);
    }
}

template <class S>
int64_t Backward<S>::prefix_pieces(const AttentionParams& p) {
    const Geometry& g = p.shape.geometry;
    if (g.num_prefix_tokens == 0) return 0;
    return is_one_block(g) ? Backward<S>::bias_pieces(p)
                           : g.num_windows() * detail::ceil_div(g.window_height * g.window_width, 64);
}

template <class S>
int64_t Backward<S>::bias_pieces(const AttentionParams& p) {
    return p.shape.head_dim <= 64 ? count_bias_pieces<WindowGradTraits<S, 64, false>>(p)
                                  : count_bias_pieces<WindowGradTraits<S, 128, true>>(p);
}

template <class S>
int64_t Backward<S>::shared_bytes(const AttentionParams& p) {
    return p.shape.head_dim <= 64 ? sizeof(typename WindowGradTraits<S, 64, false>::Shared)
                                  : sizeof(typename WindowGradTraits<S, 128, true>::Shared);
}

} // namespace eva_attn::cuda::mma
