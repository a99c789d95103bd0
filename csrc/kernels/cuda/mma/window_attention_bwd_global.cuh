// First kernel of the joint attention's backward: delta, and the gradients of the global columns, landmarks
// and prefix keys, summed over the queries of a piece of the sequence.
#pragma once

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"
#include "kernels/cuda/mma/windows.cuh"

namespace eva_attn::cuda::mma {

template <class S_, int kHeadDim_>
struct GlobalGradTraits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kThreads = 128;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 3 : 2;
    static constexpr int kBlockC = 64; // global columns, 16 a warp
    static constexpr int kBlockQ = 4096 / kHeadDim;
    static constexpr int kStages = 2;

    struct Stage {
        alignas(1024) S query[kBlockQ * kHeadDim];
        alignas(1024) S grad_output[kBlockQ * kHeadDim];
        S output[kBlockQ * kHeadDim];
        float logsumexp[kBlockQ]; // times log2(e)
        float delta[kBlockQ];
        Box32 window[kBlockQ]; // keys of the query's window, where its landmarks may be excluded
    };
    struct Shared {
        alignas(1024) S global_key[kBlockC * kHeadDim];
        alignas(1024) S global_value[kBlockC * kHeadDim];
        Box32 extent[kBlockC]; // of the landmark's valid members
        Stage stage[kStages];
    };
};

template <class Traits, bool kHasDropout, bool kHasPrefix>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    window_attention_bwd_global_kernel(const __grid_constant__ AttentionParams p) {
    using S = typename Traits::S;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads, kBlockQ = Traits::kBlockQ,
                  kBlockC = Traits::kBlockC, kStages = Traits::kStages;
    using RowTile = Tile<S, kHeadDim>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    wait_for_dependencies();

    const Geometry& g = p.shape.geometry;
    const int heads = static_cast<int>(p.shape.heads), head_dim = static_cast<int>(p.shape.head_dim);
    const int landmarks = static_cast<int>(p.num_landmarks);
    const int prefix = kHasPrefix ? static_cast<int>(g.num_prefix_tokens) : 0;
    const int tokens = static_cast<int>(g.num_tokens());
    const int columns = landmarks + prefix, column_blocks = max(1, (columns + kBlockC - 1) / kBlockC);
    int block = blockIdx.x;
    const int head = block % heads;
    block /= heads;
    const int column_block = block % column_blocks;
    block /= column_blocks;
    const int piece = block % static_cast<int>(p.pieces);
    const int batch = block / static_cast<int>(p.pieces);
    const int64_t bh = int64_t{batch} * heads + head;

    // All tiles have as many queries, but for the last.
    const int tiles = (tokens + kBlockQ - 1) / kBlockQ, tile_queries = (tokens + tiles - 1) / max(1, tiles);
    const int step = static_cast<int>(p.pieces);
    int tile = piece;
    const int first_column = column_block * kBlockC;
    const int chunk_width = static_cast<int>(g.chunk_width);
    if (g.is_causal) { // a chunk is visible from its end on
        const int first_tile = (first_column + 1) * chunk_width / tile_queries;
        if (column_block > 0) tile = first_in_turn(piece, step, first_tile);
    }

    const S* const query = head_rows<S>(p.query, batch, head);
    const S* const grad_output = head_rows<S>(p.grad_output, batch, head);
    const S* const output = head_rows<S>(p.output, batch, head);
    const float* const logsumexp = static_cast<const float*>(p.logsumexp) + bh * tokens;
    float* const delta = static_cast<float*>(p.delta) + bh * tokens;
    const bool* const mask = p.key_padding_mask ? p.key_padding_mask + int64_t{batch} * tokens : nullptr;

    const auto window_of = [&](int token) {
        const int position = token - prefix, width = static_cast<int>(g.grid_width);
        const int y = position / width / static_cast<int>(g.window_height);
        const int x = position % width / static_cast<int>(g.window_width);
        const Box box = g.key_box(int64_t{y} * g.window_columns() + x);
        return Box32{static_cast<int>(box.y0), static_cast<int>(box.y1), static_cast<int>(box.x0),
                     static_cast<int>(box.x1)};
    };
    float next_logsumexp = 0;
    const auto load_tile = [&](int tile, typename Traits::Stage& stage) {
        const auto token_of = [&](int row) {
            const int token = tile * tile_queries + row;
            return row < tile_queries && token < tokens && !(mask && mask[token]) ? token : -1;
        };
        using Gather = GatherRows<kBlockQ, kThreads, kHeadDim>;
        int row_token[Gather::kCount];
#pragma unroll
        for (int i = 0; i < Gather::kCount; ++i)
            row_token[i] = Gather::unit() * 8 < head_dim ? token_of(Gather::row(i)) : -1;
        gather_rows<Gather>(RowTile{stage.query}, query, p.query.token_stride, row_token);
        gather_rows<Gather>(RowTile{stage.grad_output}, grad_output, p.grad_output.token_stride, row_token);
        gather_rows<Gather>(RowTile{stage.output}, output, p.output.token_stride, row_token);
        if (threadIdx.x < kBlockQ) {
            const int token = token_of(threadIdx.x);
            next_logsumexp = token < 0 ? kInfinity : logsumexp[token];
        }
    };

    const RowTile global_key{shared.global_key}, global_value{shared.global_value};
    gather_globals<kBlockC, kThreads, kHasPrefix>(global_key, p, p.landmark_key, p.key, batch, head,
                                                  first_column);
    gather_globals<kBlockC, kThreads, kHasPrefix>(global_value, p, p.landmark_value, p.value, batch, head,
                                                  first_column);
    copy_commit();
    if (tile < tiles) load_tile(tile, shared.stage[0]);
    copy_commit();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int group = lane / 4, pair = lane % 4 * 2;
    const int own = warp * 16; // first column of the warp
    const float scale_log2 = static_cast<float>(p.scale) * kLog2e;
    const DropoutWeights<kHasDropout> dropout(p, bh);
    const bool excludes = p.exclude_window_landmarks && p.extents;
    TokenBox nowhere{}; // contains no chunk
    nowhere.num_prefix_tokens = prefix;
    float bias[2];
    int column[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        column[r] = first_column + own + group + 8 * r;
        bias[r] = column[r] < columns ? global_bias(p, nowhere, batch, column[r]) : -kInfinity;
    }
    if (excludes && threadIdx.x < kBlockC) {
        const int own_column = first_column + threadIdx.x;
        if (own_column < landmarks) {
            const int32_t* const extent =
                p.extents + batch * p.extents_batch_stride + 4 * int64_t{own_column};
            shared.extent[threadIdx.x] = Box32{extent[0], extent[1], extent[2], extent[3]};
        } else if (kHasPrefix) {
            shared.extent[threadIdx.x] = Box32{-1, 0, -1, 0}; // inside of no window
        }
    }

    float grad_key[kHeadDim / 8][4] = {}, grad_value[kHeadDim / 8][4] = {};
    for (int i = 0; tile < tiles; tile += step, ++i) {
        typename Traits::Stage& stage = shared.stage[i % kStages];
        const int first_query = tile * tile_queries;
        copy_wait<0>();
        __syncwarp(); // a warp has waited for its own copies only, and reads those before the barrier
        constexpr int kOwnRows = kBlockQ * kWarpSize / kThreads;
        float product[kOwnRows / 8][4] = {};
        multiply_rows<kOwnRows>(product, RowTile{stage.grad_output}, RowTile{stage.output}, warp * kOwnRows);
        for_diagonal(product, [&](int row, float sum) { stage.delta[warp * kOwnRows + row] = sum; });
        if (threadIdx.x < kBlockQ) {
            stage.logsumexp[threadIdx.x] = next_logsumexp * kLog2e;
            if (excludes) stage.window[threadIdx.x] = window_of(first_query + threadIdx.x);
        }
        publish_tiles();
        __syncthreads();
        if (tile + step < tiles) load_tile(tile + step, shared.stage[(i + 1) % kStages]);
        copy_commit();
        const int token = first_query + threadIdx.x;
        if (column_block == 0 && threadIdx.x < tile_queries && token < tokens)
            delta[token] = stage.delta[threadIdx.x];

        const RowTile queries{stage.query}, grad_outputs{stage.grad_output};
        const int count = min(tile_queries, tokens - first_query);
        // Global columns on M, queries on N.
        float score[kBlockQ / 8][4], grad_weight[kBlockQ / 8][4];
        begin_products<kHeadDim>();
        multiply_transposed(score, global_key, own, queries, count);
        multiply_transposed(grad_weight, global_value, own, grad_outputs, count);
        end_products<kHeadDim>(score, grad_weight);
        if (g.is_causal || excludes || (kHasPrefix && first_query < prefix)) {
#pragma unroll
            for (int n = 0; n < kBlockQ / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int q = 8 * n + pair + e % 2;
                    const bool hidden =
                        (g.is_causal && first_query + q < (column[e / 2] + 1) * chunk_width) ||
                        (excludes && stage.window[q].contains(shared.extent[own + group + e / 2 * 8])) ||
                        (kHasPrefix && first_query + q < prefix && column[e / 2] < landmarks);
                    if (hidden) score[n][e] = -kInfinity;
                }
        }
        const auto kept = dropout.template factors<kBlockQ / 8>(
            [&](int n, int e) { return first_query + 8 * n + pair + e % 2; },
            [&](int, int e) { return global_entry<kHasPrefix>(column[e / 2], landmarks, tokens); });
        uint32_t weight[kBlockQ / 16][4], grad_score[kBlockQ / 16][4];
        weigh_queries<S>(weight, grad_score, score, grad_weight, scale_log2, bias, stage.logsumexp,
                         stage.delta, kept);
        begin_products<kHeadDim>();
        multiply(grad_value, weight, grad_outputs, count);
        multiply(grad_key, grad_score, queries, count);
        end_products<kHeadDim>(grad_value, grad_key);
    }

    store_global_gradients<S>(p, bh * p.pieces + piece, columns, column, grad_key, grad_value);
}

template <class Traits>
int64_t count_column_blocks(const AttentionParams& p) {
    const int64_t columns = p.num_landmarks + p.shape.geometry.num_prefix_tokens;
    return detail::max(1, detail::ceil_div(columns, Traits::kBlockC));
}

// Enough blocks for the GPUs of the day, by the shape alone.
template <class Traits>
int64_t count_global_pieces(const AttentionParams& p) {
    const Geometry& g = p.shape.geometry;
    const int64_t tiles = detail::ceil_div(g.num_tokens(), Traits::kBlockQ);
    return count_slices(p.shape.batch * p.shape.heads * count_column_blocks<Traits>(p), tiles,
                        132 * Traits::kCtasPerSm);
}

template <class Traits>
void launch_window_attention_bwd_global(const AttentionParams& p, cudaStream_t stream) {
    const int64_t blocks = p.shape.batch * p.shape.heads * p.pieces * count_column_blocks<Traits>(p);
    if (blocks == 0 || p.shape.geometry.num_tokens() == 0) return;
    constexpr bool kAlwaysDropout = Traits::kHeadDim == 128;
    const bool has_dropout = p.dropout.threshold > 0, has_prefix = p.shape.geometry.num_prefix_tokens > 0;
    auto* const kernel = has_dropout  ? has_prefix ? window_attention_bwd_global_kernel<Traits, true, true>
                                                   : window_attention_bwd_global_kernel<Traits, true, false>
                         : has_prefix ? window_attention_bwd_global_kernel<Traits, kAlwaysDropout, true>
                                      : window_attention_bwd_global_kernel<Traits, kAlwaysDropout, false>;
    constexpr int kBytes = sizeof(typename Traits::Shared);
    static LimitsOf limits_of[2][2];
    limits_of[has_dropout][has_prefix](kernel);
    launch_dependent(kernel, blocks, Traits::kThreads, kBytes, stream, p);
}

} // namespace eva_attn::cuda::mma
