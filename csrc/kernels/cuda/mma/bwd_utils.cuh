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
    for (int64_t slices = 1; slices <= detail::min(tiles, kMaxSlices); ++slices) {
        const int64_t time = detail::ceil_div(items * slices, slots) * (detail::ceil_div(tiles, slices) + 1);
        if (time < best_time) best = slices, best_time = time;
    }
    return best;
}

// What dropout makes of the numbers that a lane holds of a product's result, by bits.
template <bool kHasDropout>
struct DropoutFactors {
    uint32_t kept;
    float scale;

    __device__ float operator()(float x, int n, int e) const {
        if constexpr (!kHasDropout) return x;
        return kept >> (4 * n + e) & 1 ? x * scale : 0.0f;
    }
};

template <bool kHasDropout>
struct DropoutWeights {
    uint64_t seed, threshold;
    uint32_t bh;
    float scale;

    __device__ DropoutWeights(const AttentionParams& p, int64_t bh_index)
        : seed(kHasDropout && p.dropout_seed ? static_cast<uint64_t>(*p.dropout_seed) : 0),
          threshold(p.dropout.threshold), bh(static_cast<uint32_t>(bh_index)),
          scale(static_cast<float>(p.dropout.scale)) {}

    // Of kTiles x 4 numbers; query(n, e) and entry(n, e) belong to number e of tile n.
    template <int kTiles, class Query, class Entry>
    __device__ DropoutFactors<kHasDropout> factors(const Query& query, const Entry& entry) const {
        static_assert(4 * kTiles <= 32);
        uint32_t kept = ~0u;
        if (kHasDropout && threshold > 0) {
            kept = 0;
#pragma unroll 1
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = entry(n, e);
                    const PhiloxWords words = philox4x32_10(seed, column / 4, query(n, e), bh, 0);
                    kept |= static_cast<uint32_t>(words.of(column) >= threshold) << (4 * n + e);
                }
        }
        return {kept, scale};
    }
};

// From scores and the products of values and dO, with keys or landmarks on M and queries on N, to (dropped)
// weights and the gradients of the scores, packed as a product's first operand. `bias` is of the lane's two
// rows; log-sum-exps, in units of log 2, and deltas are of the queries.
template <class S, int kTiles, bool kHasDropout>
__device__ inline void weigh_queries(uint32_t (&weight)[kTiles / 2][4], uint32_t (&grad_score)[kTiles / 2][4],
                                     const float (&score)[kTiles][4], const float (&grad_weight)[kTiles][4],
                                     float scale_log2, const float (&bias)[2], const float* logsumexp,
                                     const float* delta, const DropoutFactors<kHasDropout>& kept) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        const float2 lse = *reinterpret_cast<const float2*>(&logsumexp[8 * n + pair]);
        const float2 row_delta = *reinterpret_cast<const float2*>(&delta[8 * n + pair]);
        float weights[4], ds[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float logit = score[n][e] * scale_log2 + bias[e / 2];
            weights[e] = exp2_approx(logit - (e % 2 ? lse.y : lse.x));
            ds[e] = weights[e] * (kept(grad_weight[n][e], n, e) - (e % 2 ? row_delta.y : row_delta.x));
            weights[e] = kept(weights[e], n, e);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            weight[n / 2][n % 2 * 2 + r] = pack<S>(weights[2 * r], weights[2 * r + 1]);
            grad_score[n / 2][n % 2 * 2 + r] = pack<S>(ds[2 * r], ds[2 * r + 1]);
        }
    }
}

template <int kTiles>
__device__ inline void multiply_all(float (&x)[kTiles][4], float factor) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[n][e] *= factor;
}

// gradient += factor * a chunk's term, for the rows whose chunks have terms. A row is loaded whole before its
// first use, so that memory's latency is waited for once.
template <class S, int kTiles>
__device__ inline void add_chunk_term(float (&gradient)[kTiles][4], const void* term,
                                      const int64_t (&chunk_row)[2], int head_dim, const float (&factor)[2]) {
    const S* const from = static_cast<const S*>(term) + threadIdx.x % 4 * 2;
    uint32_t x[kTiles] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (chunk_row[r] < 0) continue;
        if (r == 0 || chunk_row[1] != chunk_row[0]) {
#pragma unroll
            for (int d = 0; d < kTiles; ++d)
                if (8 * d < head_dim) x[d] = *reinterpret_cast<const uint32_t*>(from + chunk_row[r] + 8 * d);
        }
#pragma unroll
        for (int d = 0; d < kTiles; ++d) {
            const float2 pair = unpack<S>(x[d]);
            gradient[d][2 * r] += factor[r] * pair.x;
            gradient[d][2 * r + 1] += factor[r] * pair.y;
        }
    }
}

// What a lane's two rows of keys and values get as members of their chunks. Rows of chunks are as above,
// those of tokens count all (batch, head); pair_at(d, r): the lane's two elements of key r from column 8 d
// on.
template <class S, int kTiles, class PairAt>
__device__ inline void add_key_terms(float (&grad_key)[kTiles][4], float (&grad_value)[kTiles][4],
                                     const ChunkTerms& terms, const int64_t (&chunk_row)[2],
                                     const int64_t (&token_row)[2], int head_dim, const PairAt& pair_at) {
    float chunk_weight[2] = {}, chunk_grad[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (chunk_row[r] < 0) continue;
        chunk_weight[r] = static_cast<const float*>(terms.token_weight)[token_row[r]];
        chunk_grad[r] = static_cast<const float*>(terms.token_grad)[token_row[r]];
    }
    const float one[2] = {1, 1};
    add_chunk_term<S>(grad_value, terms.grad_beta, chunk_row, head_dim, chunk_weight);
    add_chunk_term<S>(grad_key, terms.omega, chunk_row, head_dim, chunk_grad);
    add_chunk_term<S>(grad_key, terms.grad_key_mean, chunk_row, head_dim, one);
#pragma unroll
    for (int d = 0; d < kTiles; ++d)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 key = unpack<S>(*pair_at(d, r));
            grad_key[d][2 * r] -= chunk_grad[r] * key.x;
            grad_key[d][2 * r + 1] -= chunk_grad[r] * key.y;
        }
}

// The first tile from `first` on that is a piece's, where pieces take tiles in turn, so that blocks read side
// by side.
__device__ inline int first_in_turn(int piece, int pieces, int first) {
    return piece + max(0, (first - piece + pieces - 1) / pieces) * pieces;
}

// product += a b^T of the rows [row, row + kRows) of both: row i's own product is on the diagonal.
template <int kRows, class S, int kHeadDim>
__device__ inline void multiply_rows(float (&product)[kRows / 8][4], Tile<S, kHeadDim> a, Tile<S, kHeadDim> b,
                                     int row) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int unit = 0; unit < kHeadDim / 8; unit += 4) {
        uint32_t from_a[2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k)
            load_matrix(from_a[k], a.unit(row + lane % kRows, unit + 2 * k + lane / 16));
#pragma unroll
        for (int r = 0; r < kRows / 8; ++r) {
            uint32_t from_b[4];
            b.load_b_transposed(from_b, row + 8 * r, unit);
            multiply_add<S>(product[r], from_a[0], from_b[0], from_b[1]);
            multiply_add<S>(product[r], from_a[1], from_b[2], from_b[3]);
        }
    }
}
// use(i, x): x is the number on the diagonal of row i, for the rows that the lane holds.
template <int kTiles, class Use>
__device__ inline void for_diagonal(const float (&product)[kTiles][4], const Use& use) {
    const int lane = threadIdx.x % kWarpSize, group = lane / 4;
    if (group / 2 != lane % 4) return;
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
        use(8 * r + group, group % 2 ? product[r][2 * r + 1] : product[r][2 * r]);
}

// What the queries of a piece give to the keys and values of the thread's two of `columns` global ones, as
// accumulators hold it; pieces count all (batch, head).
template <class S, int kTiles>
__device__ inline void store_global_gradients(const AttentionParams& p, int64_t piece, int columns,
                                              const int (&column)[2], const float (&grad_key)[kTiles][4],
                                              const float (&grad_value)[kTiles][4]) {
    const int head_dim = static_cast<int>(p.shape.head_dim), pair = threadIdx.x % 4 * 2;
    const auto store = [&](void* to, const float (&x)[kTiles][4], float factor) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool exists = column[r] < columns;
            const int64_t row = (piece * columns + column[r]) * head_dim;
            if (p.rounded_gradients) {
#pragma unroll
                for (int d = 0; d < kTiles; d += 2) {
                    const auto packed = [&](int n) {
                        return pack<S>(factor * x[n][2 * r], factor * x[n][2 * r + 1]);
                    };
                    const uint2 four = exchange_pairs(packed(d), packed(d + 1));
                    const int first = 8 * d + exchanged_column();
                    if (exists && first < head_dim)
                        *reinterpret_cast<uint2*>(static_cast<S*>(to) + row + first) = four;
                }
            } else if (exists) {
#pragma unroll
                for (int d = 0; d < kTiles; ++d)
                    if (8 * d < head_dim)
                        *reinterpret_cast<float2*>(static_cast<float*>(to) + row + 8 * d + pair) =
                            make_float2(factor * x[d][2 * r], factor * x[d][2 * r + 1]);
            }
        }
    };
    store(p.grad_global_key, grad_key, static_cast<float>(p.scale));
    store(p.grad_global_value, grad_value, 1);
}

// The row that a chunk of all has in the landmark gradients' first pieces, where a head has `chunks`.
__device__ inline int64_t landmark_row(const SummaryParams& p, int chunks, int chunk, int bh) {
    return chunk + bh * (p.pieces * p.global_columns - chunks);
}
// Columns, from `column` on, of a row of the landmark gradients' pieces.
template <class S>
__device__ inline const char* gradient_columns(const SummaryParams& p, const void* pieces, int64_t row,
                                               int column) {
    const int64_t at = row * static_cast<int>(p.shape.head_dim) + column;
    return static_cast<const char*>(pieces) + at * (p.rounded_gradients ? sizeof(S) : sizeof(float));
}
// Eight of them, of whose pieces every `step`-th from the `first` on is added up.
template <class S>
__device__ inline Float8 load_pieces(const SummaryParams& p, const char* from, int first = 0, int step = 1) {
    if (p.rounded_gradients) return unpack8<S>(*reinterpret_cast<const uint4*>(from));
    const int64_t stride = p.global_columns * p.shape.head_dim;
    const auto* const rows = reinterpret_cast<const float*>(from);
    Float8 sum{};
    if (first < static_cast<int>(p.pieces)) sum = load8(rows + first * stride);
#pragma unroll 4
    for (int piece = first + step; piece < static_cast<int>(p.pieces); piece += step) {
        const Float8 x = load8(rows + piece * stride);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.x[i] += x.x[i];
    }
    return sum;
}

// The gradient of a relative bias: of each offset key - query, the sum over the pairs of a window's
// positions, times `factor`.
template <int kThreads>
__device__ inline void store_bias_gradient(const float (&sum)[64][65], const Geometry& g,
                                           const BoxShape& window, float factor, float* out) {
    const int bias_width = static_cast<int>(g.bias_width);
    const int entries = static_cast<int>(g.bias_height) * bias_width;
    const int height = window.height, width = window.width;
    for (int i = threadIdx.x; i < entries; i += kThreads) {
        const int y = i / bias_width - static_cast<int>(g.bias_height) / 2,
                  x = i % bias_width - bias_width / 2;
        const int first_x = max(0, -x), end_x = min(width, width - x);
        float total = 0;
        for (int query_y = max(0, -y); query_y < min(height, height - y); ++query_y)
            for (int query_x = first_x; query_x < end_x; query_x += 8) {
                const int query = query_y * width + query_x;
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    total += query_x + j < end_x ? sum[query + j + y * width + x][query + j] : 0;
            }
        out[i] = factor * total;
    }
}

// A warp's 16 rows of gradients go out by way of its rows of a tile, from row `own` on.
template <class S, int kHeadDim>
__device__ inline void stage_gradient(const float (&gradient)[kHeadDim / 8][4], Tile<S, kHeadDim> staging,
                                      int own) {
    const int lane = threadIdx.x % kWarpSize, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            *reinterpret_cast<uint32_t*>(staging.unit(own + group + 8 * r, n) + pair) =
                pack<S>(gradient[n][2 * r], gradient[n][2 * r + 1]);
    __syncwarp();
}
// token_of(row): where row goes, negative: nowhere.
template <class S, int kHeadDim, class TokenOf>
__device__ inline void store_staged(Tile<S, kHeadDim> staging, int own, S* base, int64_t stride, int head_dim,
                                    const TokenOf& token_of) {
    constexpr int kUnits = kHeadDim / 8;
    const int lane = threadIdx.x % kWarpSize, unit = lane % kUnits;
    const int row_stride = static_cast<int>(stride);
    S* const column = base + unit * 8;
#pragma unroll
    for (int i = 0; i < kUnits / 2; ++i) {
        const int row = own + lane / kUnits + i * (kWarpSize / kUnits);
        const int token = token_of(row);
        if (token >= 0 && unit * 8 < head_dim)
            *reinterpret_cast<uint4*>(column + static_cast<int64_t>(token) * row_stride) =
                *reinterpret_cast<const uint4*>(staging.unit(row, unit));
    }
    __syncwarp();
}

} // namespace eva_attn::cuda::mma
