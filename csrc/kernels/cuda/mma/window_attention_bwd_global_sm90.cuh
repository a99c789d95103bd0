// First kernel of the joint attention's backward with Hopper's asynchronous copies and products: delta, and
// the gradients of the landmarks, without dropout, padding, prefix tokens or excluded landmarks. A warpgroup
// keeps 64 landmarks and meets the queries of a piece of the sequence, which its first thread loads ahead.
#pragma once

#include <climits>
#include <type_traits>

#include "kernels/cuda/dependent_launch.cuh"
#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/persistent.cuh"
#include "kernels/cuda/mma/warpgroup_product.cuh"
#include "kernels/cuda/mma/windows.cuh"
#include "kernels/cuda/tma.cuh"

namespace eva_attn::cuda::mma {

template <class S_, int kHeadDim_>
struct GlobalGradSm90Traits {
    using S = S_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kThreads = kWarpgroupSize;
    static constexpr int kCtasPerSm = kHeadDim == 64 ? 3 : 2;
    static constexpr int kStages = kHeadDim == 64 ? 3 : 2;
    using Tile = WarpgroupTile<S, kHeadDim>;

    // Queries and gradients of outputs, or landmark keys and values.
    struct Pair {
        Tile first, second;
    };
    struct Shared {
        Pair landmarks;
        Pair stages[kStages];
        Tile output;                // used first in a step, so that the next one's has the rest of it to come
        float logsumexp[kTileRows]; // times log2(e)
        float delta[kTileRows];
        uint64_t landmarks_full, stage_full[kStages], output_full;
    };
};

struct GlobalGradSm90Maps {
    CUtensorMap query, grad_output, output, landmark_key, landmark_value;
};

// Compiled for Hopper alone, as the launch bounds tell.
template <class Traits>
__global__ void __launch_bounds__(kHasWarpgroups ? Traits::kThreads : kWarpSize, Traits::kCtasPerSm)
    window_attention_bwd_global_sm90_kernel(const __grid_constant__ AttentionParams p,
                                            const __grid_constant__ GlobalGradSm90Maps maps) {
    if constexpr (kHasWarpgroups) {
        using S = typename Traits::S;
        using RowTile = typename Traits::Tile;
        using Pair = typename Traits::Pair;
        constexpr int kHeadDim = Traits::kHeadDim, kStages = Traits::kStages;
        extern __shared__ __align__(1024) char global_grad_memory[];
        auto& shared = *reinterpret_cast<typename Traits::Shared*>(global_grad_memory);
        wait_for_dependencies();

        const Geometry& g = p.shape.geometry;
        const int heads = static_cast<int>(p.shape.heads);
        const int landmarks = static_cast<int>(p.num_landmarks), tokens = static_cast<int>(g.num_tokens());
        const int column_blocks = (landmarks + kTileRows - 1) / kTileRows;
        int block = blockIdx.x;
        const int head = block % heads;
        block /= heads;
        const int column_block = block % column_blocks;
        block /= column_blocks;
        const int piece = block % static_cast<int>(p.pieces);
        const int batch = block / static_cast<int>(p.pieces);
        const int64_t bh = int64_t{batch} * heads + head;

        const int tiles = (tokens + kTileRows - 1) / kTileRows;
        const int step = static_cast<int>(p.pieces);
        int tile = piece;
        const int first_column = column_block * kTileRows;
        const int chunk_width = static_cast<int>(g.chunk_width);
        if (g.is_causal && column_block > 0) // a chunk is visible from its end on
            tile = first_in_turn(piece, step, (first_column + 1) * chunk_width / kTileRows);

        const auto load_rows = [&](RowTile& to, const CUtensorMap& map, int row, uint64_t* full) {
#pragma unroll
            for (int panel = 0; panel < RowTile::kPanels; ++panel)
                load_box(to.panel[panel], map, full, 64 * panel, row, 0, head, batch);
        };
        const auto load_pair = [&](Pair& to, const CUtensorMap& first, const CUtensorMap& second, int row,
                                   uint64_t* full) {
            barrier_arrive_expect(full, sizeof(Pair));
            load_rows(to.first, first, row, full);
            load_rows(to.second, second, row, full);
        };
        const auto load_queries = [&](int tile, int slot) {
            load_pair(shared.stages[slot], maps.query, maps.grad_output, kTileRows * tile,
                      &shared.stage_full[slot]);
        };
        const auto load_output = [&](int tile) {
            barrier_arrive_expect(&shared.output_full, sizeof(RowTile));
            load_rows(shared.output, maps.output, kTileRows * tile, &shared.output_full);
        };
        if (threadIdx.x == 0) {
            barrier_init(&shared.landmarks_full, 1);
            barrier_init(&shared.output_full, 1);
            for (int i = 0; i < kStages; ++i) barrier_init(&shared.stage_full[i], 1);
            barrier_init_fence();
            load_pair(shared.landmarks, maps.landmark_key, maps.landmark_value, first_column,
                      &shared.landmarks_full);
            for (int i = 0; i < kStages && tile + i * step < tiles; ++i) {
                load_queries(tile + i * step, i);
                if (i == 0) load_output(tile);
            }
        }
        float* const delta = static_cast<float*>(p.delta) + bh * tokens;
        const float* const logsumexp = static_cast<const float*>(p.logsumexp) + bh * tokens;
        const auto logsumexp_of = [&](int tile) {
            const int token = kTileRows * tile + threadIdx.x;
            return threadIdx.x < kTileRows && token < tokens ? logsumexp[token] * kLog2e : kInfinity;
        };
        float next_logsumexp = logsumexp_of(tile);

        const int lane = threadIdx.x % kWarpSize, pair = lane % 4 * 2;
        const int own = threadIdx.x / kWarpSize * 16; // first row of the warp
        const float scale_log2 = static_cast<float>(p.scale) * kLog2e;
        float bias[2];
        int column[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            column[r] = first_column + own + lane / 4 + 8 * r;
            bias[r] = column[r] < landmarks ? global_bias(p, TokenBox{}, batch, column[r]) : -kInfinity;
        }
        __syncthreads(); // barriers are ready
        barrier_wait(&shared.landmarks_full, 0);

        float grad_key[kHeadDim / 8][4] = {}, grad_value[kHeadDim / 8][4] = {};
        RingCursor at;
        uint32_t output_phase = 0;
#pragma unroll 1
        for (; tile < tiles; tile += step, at.advance(kStages), output_phase ^= 1) {
            const Pair& stage = shared.stages[at.slot];
            const int first_query = kTileRows * tile;
            barrier_wait(&shared.stage_full[at.slot], at.phase);
            // Landmarks on M, queries on N.
            float score[kTileRows / 8][4], grad_weight[kTileRows / 8][4];
            warpgroup_fence();
            begin_transposed_product(score, shared.landmarks.first, stage.first);
            begin_transposed_product(grad_weight, shared.landmarks.second, stage.second);
            warpgroup_commit();

            barrier_wait(&shared.output_full, output_phase);
            float product[2][4] = {};
#pragma unroll
            for (int panel = 0; panel < RowTile::kPanels; ++panel)
                multiply_rows<16>(product, stage.second.tile(panel), shared.output.tile(panel), own);
            for_diagonal(product, [&](int row, float sum) { shared.delta[own + row] = sum; });
            if (threadIdx.x < kTileRows) shared.logsumexp[threadIdx.x] = next_logsumexp;
            __syncthreads();
            if (tile + step < tiles) {
                if (threadIdx.x == 0) load_output(tile + step);
                next_logsumexp = logsumexp_of(tile + step);
            }
            const int token = first_query + threadIdx.x;
            if (column_block == 0 && threadIdx.x < kTileRows && token < tokens)
                delta[token] = shared.delta[threadIdx.x];

            warpgroup_wait();
            fence_registers(score);
            fence_registers(grad_weight);
            if (g.is_causal && first_query < (first_column + kTileRows) * chunk_width) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int hidden = (column[r] + 1) * chunk_width - first_query;
#pragma unroll
                    for (int n = 0; n < kTileRows / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            if (8 * n + pair + e < hidden) score[n][2 * r + e] = -kInfinity;
                }
            }
            uint32_t weight[kTileRows / 16][4], grad_score[kTileRows / 16][4];
            weigh_queries<S>(weight, grad_score, score, grad_weight, scale_log2, bias, shared.logsumexp,
                             shared.delta, DropoutFactors<false>{});
            warpgroup_fence();
            begin_product(grad_value, weight, stage.second);
            begin_product(grad_key, grad_score, stage.first);
            warpgroup_commit();
            warpgroup_wait();
#pragma unroll
            for (int panel = 0; panel < RowTile::kPanels; ++panel) {
                fence_registers(panel_of(grad_value, panel));
                fence_registers(panel_of(grad_key, panel));
            }
            __syncthreads();
            if (threadIdx.x == 0 && tile + kStages * step < tiles)
                load_queries(tile + kStages * step, at.slot);
        }

        store_global_gradients<S>(p, bh * p.pieces + piece, landmarks, column, grad_key, grad_value);
    }
}

// False where this kernel was not compiled for the device, or does not do what is asked.
template <class Traits>
bool launch_window_attention_bwd_global_sm90(const AttentionParams& p, cudaStream_t stream) {
    const Geometry& g = p.shape.geometry;
    const auto kernel = window_attention_bwd_global_sm90_kernel<Traits>;
    if (p.dropout.threshold > 0 || p.extents || p.key_padding_mask || g.num_prefix_tokens > 0 ||
        p.num_landmarks == 0)
        return false;
    const int64_t blocks =
        p.shape.batch * p.shape.heads * p.pieces * detail::ceil_div(p.num_landmarks, kTileRows);
    if (blocks == 0 || g.num_tokens() == 0) return true;
    constexpr int kBytes = sizeof(typename Traits::Shared);
    static LimitsOf limits_of;
    const KernelLimits& limits = limits_of(kernel);
    if (blocks > INT_MAX || limits.threads < Traits::kThreads || limits.shared_bytes < kBytes) return false;

    GlobalGradSm90Maps maps;
    using S = typename Traits::S;
    const auto make_token_map = [&](CUtensorMap& map, const Rows& rows) {
        return make_map<S>(map, p.shape, rows, 1, g.num_tokens(), 1, kTileRows);
    };
    if (!make_token_map(maps.query, p.query) || !make_token_map(maps.grad_output, p.grad_output) ||
        !make_token_map(maps.output, p.output) ||
        !make_landmark_map<S>(maps.landmark_key, p, p.landmark_key, kTileRows) ||
        !make_landmark_map<S>(maps.landmark_value, p, p.landmark_value, kTileRows))
        return false;
    launch_dependent(kernel, blocks, Traits::kThreads, kBytes, stream, p, maps);
    return true;
}

} // namespace eva_attn::cuda::mma
