// A tile of scores [64, 64] as the accumulators of a warpgroup hold it: the biases that it begins with where
// it is a whole window's, and the columns that nobody sees.
#pragma once

#include "kernels/cuda/mma/persistent.cuh"

namespace eva_attn::cuda::mma {

using ScoreTile = float[8][4];
constexpr int kScoreTileVectors = 8 * kWarpgroupSize; // of four numbers side by side in a thread

// The first row of a thread, and 8 further; its first columns, and 8 n further.
__device__ inline int score_row() {
    return threadIdx.x % kWarpgroupSize / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
}
__device__ inline int score_column() { return threadIdx.x % 4 * 2; }

// From the table of a head, by kWarpgroups; rows are queries unless transposed.
template <int kWarpgroups, bool kIsTransposed = false, int kTiles = 8>
__device__ inline void fill_bias_tile(const Windows& w, const float* table, float4* tile) {
    for (int n = threadIdx.x / kWarpgroupSize; n < kTiles; n += kWarpgroups) {
        float bias[4];
        for (int i = 0; i < 4; ++i) {
            const int row = score_row() + i / 2 * 8, column = 8 * n + score_column() + i % 2;
            const int query = kIsTransposed ? column : row, key = kIsTransposed ? row : column;
            const int from = min(query, w.queries.size() - 1);
            bias[i] = key < w.keys.size() ? table[w.key_place(key) - w.query_place(from)] : -kInfinity;
        }
        tile[n * kWarpgroupSize + threadIdx.x % kWarpgroupSize] = float4{bias[0], bias[1], bias[2], bias[3]};
    }
}
template <int kTiles>
__device__ inline void begin_with_bias(float (&score)[kTiles][4], const float4* tile) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const float4 bias = tile[n * kWarpgroupSize + threadIdx.x % kWarpgroupSize];
        score[n][0] = bias.x;
        score[n][1] = bias.y;
        score[n][2] = bias.z;
        score[n][3] = bias.w;
    }
}

// Bit 2 n + i of `hidden` stands for column 8 n + score_column() + i, in the thread's two rows.
template <int kTiles>
__device__ inline void hide(float (&score)[kTiles][4], const uint32_t (&hidden)[2]) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        if (((hidden[0] | hidden[1]) >> 4 * part & 15) == 0) continue;
#pragma unroll
        for (int n = 2 * part; n < 2 * part + 2 && n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (hidden[i / 2] >> (2 * n + i % 2) & 1) score[n][i] = -kInfinity;
    }
}
// Such bits of all columns but the first `visible` ones.
__device__ inline uint32_t columns_from(int visible) {
    if (visible >= 64) return 0;
    return ~0u << (visible / 8 * 2 + max(0, min(visible % 8 - score_column(), 2)));
}
// Of a window that the grid's border cuts, from position 64 `block` on.
template <int kTiles>
__device__ inline void hide_outside(float (&score)[kTiles][4], const TokenBox& box, int block) {
    const int first = block * 64 + score_column();
    uint32_t outside = 0;
#pragma unroll 1
    for (int i = 0; i < 16; ++i)
        outside |= static_cast<uint32_t>(box.token(first + i / 2 * 8 + i % 2) < 0) << i;
    hide(score, {outside, outside});
}

} // namespace eva_attn::cuda::mma
