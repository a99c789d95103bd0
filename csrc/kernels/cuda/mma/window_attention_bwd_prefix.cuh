// The joint attention's backward for prefix tokens, whose queries see all keys. Each block of a window's keys
// takes what those queries give it, and leaves what it gives them to the last kernel: that of the prefix's
// own gradients.
#pragma once

#include "kernels/cuda/mma/bwd_utils.cuh"
#include "kernels/cuda/mma/product.cuh"

namespace eva_attn::cuda::mma {

constexpr int kMaxPrefixTokens = 8; // the columns of a product

// The prefix's queries beside 64 keys, 16 of each of the block's four warps.
template <class S, int kHeadDim>
struct PrefixQueries {
    static constexpr int kThreads = 4 * kWarpSize;
    static constexpr int kUnits = kHeadDim / 8;
    static constexpr int kTiles = kUnits / 4; // of a warp's share of the channels
    using RowTile = Tile<S, kHeadDim>;

    struct Shared {
        alignas(128) S query[kMaxPrefixTokens * kHeadDim];
        alignas(128) S grad_output[kMaxPrefixTokens * kHeadDim];
        alignas(128) S grad_score[64 * kMaxPrefixTokens]; // [key, query]
        alignas(16) float logsumexp[kMaxPrefixTokens];    // times log2(e)
        alignas(16) float delta[kMaxPrefixTokens];
    };

    Shared& shared;

    // Begins to copy their rows.
    __device__ void load(const AttentionParams& p, int batch, int head) const {
        const Geometry& g = p.shape.geometry;
        const int prefix = static_cast<int>(g.num_prefix_tokens);
        const bool* const mask = p.key_padding_mask ? p.key_padding_mask + batch * g.num_tokens() : nullptr;
        const auto token_of = [&](int i) { return i < prefix && !(mask && mask[i]) ? i : -1; };
        const S* const query = head_rows<S>(p.query, batch, head);
        const S* const grad_output = head_rows<S>(p.grad_output, batch, head);
#pragma unroll 1
        for (int i = threadIdx.x; i < kMaxPrefixTokens * kUnits; i += kThreads) {
            const int row = i / kUnits, unit = i % kUnits;
            const int token = unit * 8 < p.shape.head_dim ? token_of(row) : -1;
            copy_async_at(token, RowTile{shared.query}.unit(row, unit),
                          query + token * p.query.token_stride + unit * 8);
            copy_async_at(token, RowTile{shared.grad_output}.unit(row, unit),
                          grad_output + token * p.grad_output.token_stride + unit * 8);
        }
        if (threadIdx.x >= kMaxPrefixTokens) return;
        const int token = token_of(threadIdx.x);
        const int64_t at = (batch * p.shape.heads + head) * g.num_tokens() + token;
        shared.logsumexp[threadIdx.x] =
            token < 0 ? kInfinity : static_cast<const float*>(p.logsumexp)[at] * kLog2e;
        shared.delta[threadIdx.x] = token < 0 ? 0.0f : static_cast<const float*>(p.delta)[at];
    }

    // The (dropped) weights of the warp's keys, from row `own` on, and the gradients of their scores, packed
    // as the first half of a product's first operand. Tokens of the lane's two keys: -1 where hidden.
    template <bool kHasDropout>
    __device__ void weigh(uint32_t (&weight)[2], uint32_t (&grad_score)[2], RowTile keys, RowTile values,
                          int own, const int (&key_token)[2], float scale_log2,
                          const DropoutWeights<kHasDropout>& dropout) const {
        const int lane = threadIdx.x % kWarpSize, group = lane / 4, pair = lane % 4 * 2;
        float score[1][4], grad_weight[1][4];
        multiply_transposed(score, keys, own, RowTile{shared.query}, kMaxPrefixTokens);
        multiply_transposed(grad_weight, values, own, RowTile{shared.grad_output}, kMaxPrefixTokens);
        const auto kept = dropout.template factors<1>([&](int, int e) { return pair + e % 2; },
                                                      [&](int, int e) { return key_token[e / 2]; });
        const float2 lse = *reinterpret_cast<const float2*>(&shared.logsumexp[pair]);
        const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[pair]);
        float weights[4], ds[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float logit = key_token[e / 2] < 0 ? -kInfinity : score[0][e] * scale_log2;
            weights[e] = exp2_approx(logit - (e % 2 ? lse.y : lse.x));
            ds[e] = weights[e] * (kept(grad_weight[0][e], 0, e) - (e % 2 ? delta.y : delta.x));
            weights[e] = kept(weights[e], 0, e);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            weight[r] = pack<S>(weights[2 * r], weights[2 * r + 1]);
            grad_score[r] = pack<S>(ds[2 * r], ds[2 * r + 1]);
            S* const row = shared.grad_score + (own + group + 8 * r) * kMaxPrefixTokens;
            *reinterpret_cast<uint32_t*>(row + pair) = grad_score[r];
        }
    }

    // gradient += factor [16 keys, queries] * rows [queries, kHeadDim].
    __device__ static void add(float (&gradient)[kUnits][4], const uint32_t (&factor)[2], RowTile rows) {
        const int lane = threadIdx.x % kWarpSize;
        const uint32_t a[4] = {factor[0], factor[1], 0, 0};
#pragma unroll
        for (int d = 0; d < kUnits; d += 4) {
            uint32_t b[4];
            load_matrix_transposed(b, rows.unit(lane % 8, d + lane / 8));
#pragma unroll
            for (int i = 0; i < 4; ++i) multiply_add<S>(gradient[d + i], a, b[i], 0);
        }
    }
    __device__ void add_to_values(float (&gradient)[kUnits][4], const uint32_t (&weight)[2]) const {
        add(gradient, weight, RowTile{shared.grad_output});
    }
    __device__ void add_to_keys(float (&gradient)[kUnits][4], const uint32_t (&grad_score)[2]) const {
        add(gradient, grad_score, RowTile{shared.query});
    }

    // From all 64 keys, the warp's quarter of the channels of the queries' gradients: a lane has two of each
    // eight of query lane / 4. After a barrier behind `weigh`.
    __device__ void add_to_queries(float (&gradient)[kTiles][2], RowTile keys) const {
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        float sum[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[n][e] = e < 2 ? gradient[n][e] : 0.0f;
#pragma unroll
        for (int first = 0; first < 64; first += 32) {
            uint32_t from[4]; // of eight keys each
            load_matrix_transposed(from, shared.grad_score + (first + lane) * kMaxPrefixTokens);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const uint32_t a[4] = {from[2 * k], 0, from[2 * k + 1], 0};
#pragma unroll
                for (int n = 0; n < kTiles; n += 2) {
                    uint32_t b[4];
                    keys.load_b(b, first + 16 * k, warp * kTiles + n);
                    multiply_add<S>(sum[n], a, b[0], b[1]);
                    multiply_add<S>(sum[n + 1], a, b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) gradient[n][e] = sum[n][e];
    }
    // As the summand number `piece` of all.
    __device__ static void store_queries(const AttentionParams& p, const float (&gradient)[kTiles][2],
                                         int64_t piece) {
        const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
        const int prefix = static_cast<int>(p.shape.geometry.num_prefix_tokens), query = lane / 4;
        const int head_dim = static_cast<int>(p.shape.head_dim);
        if (query >= prefix) return;
        const float scale = static_cast<float>(p.scale);
        float* const out = static_cast<float*>(p.grad_prefix_query) + (piece * prefix + query) * head_dim;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const int d = 8 * (warp * kTiles + n) + lane % 4 * 2;
            if (d < head_dim)
                *reinterpret_cast<float2*>(out + d) =
                    make_float2(scale * gradient[n][0], scale * gradient[n][1]);
        }
    }
};

struct NoPrefix {};
template <class S, int kHeadDim, bool kHasPrefix>
using PrefixShared = std::conditional_t<kHasPrefix, typename PrefixQueries<S, kHeadDim>::Shared, NoPrefix>;

// The gradients of the prefix's rows: the summands in order, and what its queries get from its own keys. One
// token a warp, two channels of each 64 a lane.
template <class S>
__global__ void __launch_bounds__(4 * kWarpSize)
    prefix_gradients_kernel(const __grid_constant__ AttentionParams p) {
    constexpr int kParts = 2;
    wait_for_dependencies();
    const Geometry& g = p.shape.geometry;
    const int prefix = static_cast<int>(g.num_prefix_tokens);
    const int head_dim = static_cast<int>(p.shape.head_dim);
    const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / kWarpSize;
    const int64_t bh = row / prefix, batch = bh / p.shape.heads, head = bh % p.shape.heads;
    const int token = static_cast<int>(row % prefix), column = threadIdx.x % kWarpSize * 2;
    if (batch >= p.shape.batch) return;

    const auto place = [&](const Rows& rows, int token, int d) {
        return reinterpret_cast<uint32_t*>(const_cast<S*>(head_rows<S>(rows, batch, head)) +
                                           token * rows.token_stride + d);
    };
    const auto read = [&](float2(&x)[kParts], const Rows& rows, int token) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int d = 64 * i + column;
            x[i] = d < head_dim ? unpack<S>(*place(rows, token, d)) : float2{};
        }
    };
    const auto write = [&](const float2(&x)[kParts], const Rows& rows) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int d = 64 * i + column;
            if (d < head_dim) *place(rows, token, d) = pack<S>(x[i].x, x[i].y);
        }
    };
    // Of the summands [B H, pieces, rows, D], row number `row` of each.
    const auto sum = [&](float2(&x)[kParts], const void* terms, int64_t pieces, int64_t rows, int64_t row) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int d = 64 * i + column;
            x[i] = float2{};
            if (d >= head_dim) continue;
            const float* const from =
                static_cast<const float*>(terms) + (bh * pieces * rows + row) * head_dim + d;
#pragma unroll 8
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const float2 term = *reinterpret_cast<const float2*>(from + piece * rows * head_dim);
                x[i].x += term.x;
                x[i].y += term.y;
            }
        }
    };
    const auto dot_of = [](const float2(&x)[kParts], const float2(&y)[kParts]) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < kParts; ++i) dot += x[i].x * y[i].x + x[i].y * y[i].y;
#pragma unroll
        for (int offset = 1; offset < kWarpSize; offset *= 2) dot += __shfl_xor_sync(~0u, dot, offset);
        return dot;
    };

    const int64_t columns = p.num_landmarks + prefix;
    float2 gradient[kParts];
    sum(gradient, p.grad_global_key, p.pieces, columns, p.num_landmarks + token);
    write(gradient, p.grad_key);
    sum(gradient, p.grad_global_value, p.pieces, columns, p.num_landmarks + token);
    write(gradient, p.grad_value);

    sum(gradient, p.grad_prefix_query, p.prefix_pieces, prefix, token);
    const float logsumexp = static_cast<const float*>(p.logsumexp)[bh * g.num_tokens() + token];
    if (logsumexp < kInfinity) {
        const float delta = static_cast<const float*>(p.delta)[bh * g.num_tokens() + token];
        const float scale = static_cast<float>(p.scale);
        const DropoutWeights<true> dropout(p, bh);
        float2 query[kParts], grad_output[kParts];
        read(query, p.query, token);
        read(grad_output, p.grad_output, token);
        for (int other = 0; other < prefix; ++other) {
            if (p.key_padding_mask && p.key_padding_mask[batch * g.num_tokens() + other]) continue;
            float2 key[kParts], value[kParts];
            read(key, p.key, other);
            read(value, p.value, other);
            const auto kept =
                dropout.template factors<1>([&](int, int) { return token; }, [&](int, int) { return other; });
            const float weight = exp2_approx((scale * dot_of(query, key) - logsumexp) * kLog2e);
            const float ds = scale * weight * (kept(dot_of(grad_output, value), 0, 0) - delta);
#pragma unroll
            for (int i = 0; i < kParts; ++i) {
                gradient[i].x += ds * key[i].x;
                gradient[i].y += ds * key[i].y;
            }
        }
    }
    write(gradient, p.grad_query);
}

template <class S>
void launch_prefix_gradients(const AttentionParams& p, cudaStream_t stream) {
    const int64_t rows = p.shape.batch * p.shape.heads * p.shape.geometry.num_prefix_tokens;
    if (rows == 0) return;
    launch_dependent(prefix_gradients_kernel<S>, detail::ceil_div(rows, 4), 4 * kWarpSize, 0, stream, p);
}

} // namespace eva_attn::cuda::mma
