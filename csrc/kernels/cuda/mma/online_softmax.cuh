// Softmax over columns that come in blocks, for the 16 rows of a warp.
#pragma once

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

constexpr int kBlockM = 64, kBlockN = 64; // queries of a tile, columns of a block

// Online softmax over the columns for rows `group` and `group + 8` of a warp's 16 queries, in units of log 2.
template <int kHeadDim>
struct OnlineSoftmax {
    float maximum[2] = {-kInfinity, -kInfinity};
    float sum[2] = {0.0f, 0.0f}; // of this lane's columns
    float output[kHeadDim / 8][4] = {};

    // From scores, still to be multiplied by `scale` > 0, to weights, in place.
    template <int kTiles>
    __device__ void update(float (&score)[kTiles][4], float scale, bool is_first) {
        float largest[2] = {-kInfinity, -kInfinity};
        find_largest(largest, score);
        const Step step = begin_step(largest, scale);
        if (!is_first) rescale_output(step);
        weigh(score, scale, step);
    }

    // The parts of an update: of the largest scores in this lane's columns, ...
    template <int kTiles>
    __device__ static void find_largest(float (&largest)[2], const float (&score)[kTiles][4]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float even = score[0][2 * r], odd = score[0][2 * r + 1];
#pragma unroll
            for (int n = 1; n < kTiles; ++n) {
                even = fmaxf(even, score[n][2 * r]);
                odd = fmaxf(odd, score[n][2 * r + 1]);
            }
            largest[r] = fmaxf(largest[r], fmaxf(even, odd));
        }
    }
    // ... what weights and output are scaled by, ...
    struct Step {
        float shift[2], rescale[2];
    };
    __device__ Step begin_step(const float (&largest)[2], float scale) {
        Step step;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float grown = fmaxf(maximum[r], scale * quad_max(largest[r]));
            step.shift[r] = grown == -kInfinity ? 0.0f : grown;
            step.rescale[r] = exp2_approx(maximum[r] - step.shift[r]);
            maximum[r] = grown;
            sum[r] *= step.rescale[r];
        }
        return step;
    }
    // ... or, as long as weights stay below 2^kSlack, are scaled by already; output is rescaled at once, ...
    static constexpr float kSlack = 8.0f;
    __device__ Step begin_rare_step(const float (&largest)[2], float scale, bool has_output) {
        if (__any_sync(~0u, scale * largest[0] > maximum[0] + kSlack ||
                                scale * largest[1] > maximum[1] + kSlack)) {
            const Step step = begin_step(largest, scale);
            if (has_output) rescale_output(step);
        }
        Step step;
#pragma unroll
        for (int r = 0; r < 2; ++r) step.shift[r] = maximum[r] == -kInfinity ? 0.0f : maximum[r];
        return step;
    }
    __device__ void rescale_output(const Step& step) {
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) output[d][i] *= step.rescale[i / 2];
    }
    // ... and the weights.
    template <int kTiles>
    __device__ void weigh(float (&score)[kTiles][4], float scale, const Step& step) {
        float added[4] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = exp2_approx(score[n][i] * scale - step.shift[i / 2]);
                added[i] += score[n][i];
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] += added[2 * r] + added[2 * r + 1];
    }

    // Weight columns 16 `step` onward as A of a product.
    template <class S, int kTiles>
    __device__ static void pack_weights(uint32_t (&a)[4], const float (&weight)[kTiles][4], int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = 2 * step + i / 2;
            a[i] = n < kTiles ? pack<S>(weight[n][i % 2 * 2], weight[n][i % 2 * 2 + 1]) : 0;
        }
    }

    // The output of row `group + 8 r` as it is in the end, times dropout's `kept_scale`, and its natural
    // log-sum-exp, +inf if it is empty.
    __device__ float finish_row(int r, float kept_scale) {
        const float total = quad_sum(sum[r]);
        const float factor = total > 0.0f ? kept_scale * reciprocal_approx(total) : 0.0f;
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i) output[d][2 * r + i] *= factor;
        return total > 0.0f ? (maximum[r] + log2_approx(total)) * kLn2 : kInfinity;
    }
    // ... and to rows of 8-column units.
    template <class S, class UnitOf>
    __device__ float store_row(int r, float kept_scale, UnitOf unit_of) {
        const float logsumexp = finish_row(r, kept_scale);
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
            *reinterpret_cast<uint32_t*>(unit_of(d) + threadIdx.x % 4 * 2) =
                pack<S>(output[d][2 * r], output[d][2 * r + 1]);
        return logsumexp;
    }
};

} // namespace eva_attn::cuda::mma
