// What the backward kernels share: boxes of positions, dropout, rows of eight elements.
#pragma once

#include "kernels/cuda/mma/tile.cuh"

namespace eva_attn::cuda::mma {

struct Box32 {
    int y0, y1, x0, x1;

    __device__ bool contains(const Box32& other) const {
        return y0 <= other.y0 && other.y1 <= y1 && x0 <= other.x0 && other.x1 <= x1;
    }
};

// Whether the gradients of a window come in one pass.
inline bool is_one_block(const Geometry& g) {
    return g.window_height * g.window_width <= 64 && !g.windows_overlap();
}

// In how many slices the `tiles` of each item are dealt to blocks of which `slots` run at a time, such as to
// end soonest; a block's start costs about as much as a tile.
inline int64_t count_slices(int64_t items, int64_t tiles, int64_t slots) {
    int64_t best = 1, best_time = INT64_MAX;
    for (int64_t slices = 1; slices <= detail::min(tiles, 1024); ++slices) {
        const int64_t time = detail::ceil_div(items * slices, slots) * (detail::ceil_div(tiles, slices) + 1);
        if (time < best_time) best = slices, best_time = time;
    }
    return best;
}

template <bool kHasDropout>
struct DropoutWeights {
    uint64_t seed, threshold;
    uint32_t bh;
    float scale;

    __device__ DropoutWeights(const AttentionParams& p, int64_t bh_index)
        : seed(kHasDropout ? static_cast<uint64_t>(*p.dropout_seed) : 0), threshold(p.dropout.threshold),
          bh(static_cast<uint32_t>(bh_index)), scale(static_cast<float>(p.dropout.scale)) {}

    // What the weight of an entry is multiplied by.
    __device__ float factor(int query, int entry) const {
        if constexpr (!kHasDropout) return 1.0f;
        const PhiloxWords words = philox4x32_10(seed, entry / 4, query, bh, 0);
        const uint32_t low = entry % 2 ? words.word[1] : words.word[0];
        const uint32_t high = entry % 2 ? words.word[3] : words.word[2];
        return (entry % 4 < 2 ? low : high) >= threshold ? scale : 0.0f;
    }
};

// Eight elements of a row.
template <class S>
__device__ inline void unpack_row(float (&x)[8], const uint4& row) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<S>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}
__device__ inline void load_floats(float (&x)[8], const float* from) {
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ inline void store_floats(float* to, const float (&x)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// Of eight elements each.
template <class S>
__device__ inline float dot(const S* a, const S* b) {
    const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
    float sum = 0;
    const auto add = [&](uint32_t u, uint32_t v) {
        const float2 f = unpack<S>(u), h = unpack<S>(v);
        sum += f.x * h.x + f.y * h.y;
    };
    add(x.x, y.x), add(x.y, y.y), add(x.z, y.z), add(x.w, y.w);
    return sum;
}

} // namespace eva_attn::cuda::mma
